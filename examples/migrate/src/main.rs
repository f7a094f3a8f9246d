//! `migrate`
#![deny(unsafe_code)]
mod cli;
mod process_guest;

fn main() {}
