//! Pageferry moves the memory of a running virtual machine to another host while it keeps working.
#![deny(unsafe_code)]

pub mod config;
pub mod error;
pub mod limits;
pub mod units;

pub mod barrier;
pub mod batch;
pub mod digest;
pub mod dirty;
pub mod encode;
pub mod host;
#[allow(unsafe_code)]
pub mod memory;
pub mod place;
pub mod stats;
pub mod transport;
pub mod vm;
pub mod wire;
