//! `migrate`
#![deny(unsafe_code)]
mod cli;
mod guest;
#[allow(dead_code, unused_imports)]
mod machine;
mod process_guest;
mod report;
// Guest and host each use one half of it.
#[allow(dead_code)]
mod workload;
use clap::Parser;

fn main() {
    let cli = cli::Cli::parse();
    println!("{cli:#?}");
}
