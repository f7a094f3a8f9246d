//! `migrate`
#![deny(unsafe_code)]
mod cli;
mod guest;
mod process_guest;
mod report;
mod workload;
use clap::Parser;

fn main() {
    let cli = cli::Cli::parse();
    println!("{cli:#?}");
}
