//! The guest's own sense of time: vCPU 0 looks at the clock all the time and remembers the longest
//! gap. The memory of it moves with the guest, so a migration's standstill is one of the gaps.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

/// Time between two heartbeats of a guest that has nothing else to do.
pub(super) const BEAT: Duration = Duration::from_millis(1);

/// What moves with the guest.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct HeartState {
    last_look_ns: u64,
    longest_gap_ns: u64,
}

/// Looks at the clock. Written by vCPU 0 only; read by anybody.
#[derive(Debug, Default)]
pub(super) struct Heart {
    last_look_ns: AtomicU64,
    longest_gap_ns: AtomicU64,
    last_beat_ns: AtomicU64,
    beats: AtomicU64,
}

impl Heart {
    /// A heart that goes on where another was saved.
    pub(super) fn resumed(state: HeartState) -> Self {
        Self {
            last_look_ns: AtomicU64::new(state.last_look_ns),
            longest_gap_ns: AtomicU64::new(state.longest_gap_ns),
            ..Self::default()
        }
    }

    pub(super) fn save(&self) -> HeartState {
        HeartState {
            last_look_ns: self.last_look_ns.load(Ordering::Acquire),
            longest_gap_ns: self.longest_gap_ns.load(Ordering::Acquire),
        }
    }

    /// vCPU 0 looks at the clock.
    pub(super) fn look(&self) {
        self.look_at(now_ns());
    }

    fn look_at(&self, now: u64) {
        let last = self.last_look_ns.swap(now, Ordering::AcqRel);
        if last != 0 {
            self.longest_gap_ns.fetch_max(now.saturating_sub(last), Ordering::AcqRel);
        }
        if now.saturating_sub(self.last_beat_ns.load(Ordering::Relaxed)) >= BEAT.as_nanos() as u64 {
            self.last_beat_ns.store(now, Ordering::Relaxed);
            self.beats.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// Heartbeats on this side.
    pub(super) fn beats(&self) -> u64 {
        self.beats.load(Ordering::Acquire)
    }

    /// The longest gap since the last [`reset`](Self::reset).
    pub(super) fn longest_gap(&self) -> Duration {
        Duration::from_nanos(self.longest_gap_ns.load(Ordering::Acquire))
    }

    /// Forgets the gaps so far.
    pub(super) fn reset(&self) {
        self.longest_gap_ns.store(0, Ordering::Release);
    }
}

/// Wall-clock time: the only clock of a process guest that two hosts agree on (as well as their
/// clocks are set; a KVM guest has its time stamp counter instead).
fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_across_a_move_is_one_of_the_gaps() {
        let source = Heart::default();
        for now in [1_000_000, 2_000_000, 5_000_000] {
            source.look_at(now);
        }
        assert_eq!(source.longest_gap(), Duration::from_millis(3));
        let destination = Heart::resumed(source.save());
        destination.look_at(25_000_000);
        destination.look_at(25_100_000);
        assert_eq!(destination.longest_gap(), Duration::from_millis(20));
        destination.reset();
        destination.look_at(25_300_000);
        assert_eq!(destination.longest_gap(), Duration::from_micros(200));
    }

    #[test]
    fn the_first_look_is_no_gap_and_a_clock_set_back_is_none_either() {
        let heart = Heart::default();
        heart.look_at(1 << 60);
        heart.look_at(1 << 59);
        assert_eq!(heart.longest_gap(), Duration::ZERO);
    }

    #[test]
    fn looks_closer_together_than_a_beat_are_one_heartbeat() {
        let heart = Heart::default();
        let beat = BEAT.as_nanos() as u64;
        (0..100).for_each(|look| heart.look_at(10 * beat + look * beat / 10));
        assert_eq!(heart.beats(), 10);
    }
}
