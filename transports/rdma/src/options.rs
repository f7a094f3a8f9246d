//! What a user may choose.

use std::time::Duration;

/// Choices for both ends. The defaults are meant to be right.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RdmaOptions {
    /// Bytes that the lanes of one dialer or acceptor may have registered with the device, which locks them in memory.
    /// `None` (default) for what the host lets this process lock (`ulimit -l`), or 2 MiB times 8 a lane for a process without
    /// a limit. Decides how many lanes there can be and how long the windows are in which guest memory is registered.
    pub locked_memory: Option<u64>,
    /// Registers whole regions of guest memory on every lane, in place of windows that come and go: nothing
    /// is asked for during the migration, but all guest memory is locked. Default false.
    pub pin_all: bool,
    /// A lane on which nothing moves for this long asks the peer's device whether it is there. Default 3 s. A peer that is
    /// gone is noticed within a second or so after that, and at once where something is being sent.
    pub probe_after: Duration,
}

impl Default for RdmaOptions {
    fn default() -> Self {
        Self { locked_memory: None, pin_all: false, probe_after: Duration::from_secs(3) }
    }
}
