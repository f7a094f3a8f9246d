//! `pageferry-sim`: runs migrations against everything that can go wrong, and says what broke.
#![deny(unsafe_code)]

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::main()
}
