//! A guest as the roles see it, whichever kind it is: something to migrate, and to question.

use std::time::{Duration, Instant};

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

/// How much a guest had written when it said so.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Written {
    /// When it was heard.
    pub(crate) at: Instant,
    /// Writes of a page since the guest began its work; a page written twice counts twice.
    pub(crate) pages: u64,
}

impl Written {
    /// Pages per second from an earlier word until `end`; nothing if this is no later word. What was written since it counts
    /// for nothing.
    pub(crate) fn rate(self, earlier: Self, end: Instant) -> Option<f64> {
        let seconds = end.saturating_duration_since(earlier.at).as_secs_f64();
        (self.at > earlier.at).then(|| self.pages.saturating_sub(earlier.pages) as f64 / seconds)
    }
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

    /// The guest's last word on how much it has written; `None` when it has not told yet, or does not tell.
    fn written(&self) -> Option<Written>;

    /// Has the guest compare every byte of its memory with what it must hold.
    fn self_check(&mut self) -> VmResult<SelfCheck>;
}

/// A guest to migrate away.
pub(crate) trait SourceGuest: Guest + SourceVm {}

impl<T: Guest + SourceVm> SourceGuest for T {}

/// A guest to take in. It can be questioned once it has arrived.
pub(crate) trait DestinationGuest: Guest + DestinationVm {}

impl<T: Guest + DestinationVm> DestinationGuest for T {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_from_a_word_to_an_end() {
        let at = Instant::now();
        let first = Written { at, pages: 100 };
        let second = Written { at: at + Duration::from_millis(500), pages: 1_100 };
        let end = at + Duration::from_secs(1);
        assert_eq!(second.rate(first, end), Some(1_000.0));
        assert_eq!(first.rate(first, end), None, "nothing was heard since");
    }
}
