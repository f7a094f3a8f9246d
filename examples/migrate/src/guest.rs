//! A guest as the roles see it, whichever kind it is: something to migrate, and to question.

use std::time::Duration;

use pageferry::vm::{DestinationVm, SourceVm, VmResult};

/// What a guest said after checking its own memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum SelfCheck {
    /// Every byte of so many pages is what it must be.
    Ok {
        /// How many pages were checked.
        pages: u64,
    },
    /// The first wrong page, in words.
    Wrong(String),
    /// This guest does not know what its memory must hold (a Linux of the user's).
    Unable,
}

/// Questions to a guest, on whichever side it is.
pub(crate) trait Guest {
    /// Waits until memory is filled and the guest has begun its work, or `go_on` says no: that is an error.
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()>;

    /// How the guest ended, if it did by itself: a crash, a reset or a switch-off.
    fn ended(&self) -> Option<String>;

    /// A count of heartbeats that grows while the guest runs on this side; `None` when this guest
    /// has no heart (a Linux of the user's).
    fn heartbeats(&self) -> Option<u64>;

    /// Forgets the stalls so far: what is measured from here on belongs to the migration.
    fn reset_stall(&mut self) -> VmResult<()>;

    /// The longest time between two heartbeats since the last reset; the measurement moves with the guest.
    /// Across the hand-over the hosts' clocks count as well: the guest's own may stand still there.
    /// `None` when this guest does not tell.
    fn longest_stall(&mut self) -> VmResult<Option<Duration>>;

    /// Has the guest compare every byte of its memory with what it must hold.
    fn self_check(&mut self) -> VmResult<SelfCheck>;
}

/// A guest to migrate away.
pub(crate) trait SourceGuest: Guest + SourceVm {}

impl<T: Guest + SourceVm> SourceGuest for T {}

/// A guest to take in. It can be questioned once it has arrived.
pub(crate) trait DestinationGuest: Guest + DestinationVm {}

impl<T: Guest + DestinationVm> DestinationGuest for T {}
