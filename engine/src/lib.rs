//! Pageferry moves the memory of a running virtual machine to another host while it keeps working.
#![deny(unsafe_code)]

pub mod config;
pub mod error;
pub mod limits;
pub mod units;

pub mod barrier;
pub mod batch;
pub mod converge;
pub mod delta;
pub mod digest;
pub mod dirty;
pub mod encode;
pub mod host;
#[allow(unsafe_code)]
pub mod memory;
pub mod pattern;
pub mod place;
pub mod session;
pub mod stats;
pub mod transport;
pub mod vm;
pub mod wire;

pub mod driver;

pub use config::{DestinationConfig, OnTimeout, SourceConfig, Verify};
pub use driver::{Destination, Source};
pub use error::{Error, Failed, Unsettled};
pub use host::{Control, Observer};
pub use stats::Report;
pub use vm::{DestinationVm, SourceVm};
