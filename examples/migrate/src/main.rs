//! `migrate`: moves a running guest from one process to another, and proves that every byte arrived.
//!
//! Read it from the command line inwards: [`cli`] says what can be asked for, [`roles`] does it
//! (`demo`, `receive`, `send`), [`machine`] and [`process_guest`] are what moves, [`progress`] shows
//! the way and [`report`] the end. The guest under KVM runs [`payload`], whose work [`workload`]
//! defines for host and guest alike.
#![deny(unsafe_code)]

mod cli;
mod guest;
mod machine;
mod payload;
mod process_guest;
mod progress;
mod report;
mod roles;
// Guest and host each use one half of it.
#[allow(dead_code)]
mod workload;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, ExitStatus};

fn main() -> ExitCode {
    match Cli::try_parse() {
        Ok(cli) => roles::run(&cli.command).into(),
        Err(answer) => {
            // Nobody is left to tell if this cannot be printed.
            let _ = match answer.use_stderr().then(|| cli::without_pairings(&answer.render().to_string())).flatten() {
                Some(text) => std::io::stderr().write_all(text.as_bytes()),
                None => answer.print(),
            };
            if answer.use_stderr() { ExitStatus::Usage.into() } else { ExitCode::SUCCESS }
        }
    }
}
