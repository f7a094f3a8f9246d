//! `migrate`
#![deny(unsafe_code)]
// Guest and host each use one half of it.
#[allow(dead_code)]
mod workload;

#[allow(dead_code, unused_imports)]
mod machine;

fn main() {}
