//! `migrate`
#![deny(unsafe_code)]
#[allow(dead_code)]
mod guest;
// Guest and host each use one half of it.
#[allow(dead_code)]
mod workload;

fn main() {}
