//! `migrate`: moves a running guest from one process to another, and proves that every byte arrived.
//!
//! Read it from the command line inwards: [`cli`] says what can be asked for, [`roles`] does it
//! (`demo`, `receive`, `send`), [`process_guest`] is what moves, [`progress`] shows the way and
//! [`report`] the end.
#![deny(unsafe_code)]

mod cli;
mod guest;
#[allow(dead_code, unused_imports)]
mod machine;
mod process_guest;
mod progress;
mod report;
mod roles;
// Guest and host each use one half of it.
#[allow(dead_code)]
mod workload;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    roles::run(&cli::Cli::parse().command).into()
}
