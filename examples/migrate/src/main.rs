//! `migrate`
#![deny(unsafe_code)]
mod cli;
mod process_guest;
mod report;
use clap::Parser;

fn main() {
    let cli = cli::Cli::parse();
    println!("{cli:#?}");
}
