//! Rates and time left, for the observer.

use std::time::Duration;

use super::super::Counters;

use crate::stats::Progress;
use crate::units::PAGE_SIZE;

/// How often the observer hears of progress.
pub(super) const PROGRESS: Duration = Duration::from_millis(200);

/// Turns counters into rates for the observer.
#[derive(Default)]
pub(super) struct Meter {
    pub(super) round_pages: u64,
    pub(super) round_base: u64,
    pub(super) dirty_rate: Option<f64>,
    pub(super) last: Option<(Duration, u64)>,
    pub(super) wire_rate: f64,
    pub(super) covered_rate: f64,
    pub(super) last_covered: u64,
}

impl Meter {
    pub(super) fn begin_round(&mut self, _round: u32, pages: u64, counters: &Counters) {
        self.round_pages = pages;
        self.round_base = Counters::read(&counters.pages);
    }

    /// A progress report, if one is due.
    pub(super) fn progress(&mut self, now: Duration, counters: &Counters) -> Option<Progress> {
        let wire_bytes = Counters::read(&counters.wire_bytes);
        let pages = Counters::read(&counters.pages);
        let (last, last_bytes) = *self.last.get_or_insert((now, wire_bytes));
        let interval = now.saturating_sub(last);
        if interval < PROGRESS {
            return None;
        }
        let seconds = interval.as_secs_f64();
        let smooth = |old: f64, new: f64| if old == 0.0 { new } else { old * 0.7 + new * 0.3 };
        self.wire_rate = smooth(self.wire_rate, (wire_bytes - last_bytes) as f64 / seconds);
        self.covered_rate = smooth(self.covered_rate, (pages - self.last_covered) as f64 / seconds);
        self.last = Some((now, wire_bytes));
        self.last_covered = pages;
        let remaining_pages = self.round_pages.saturating_sub(pages - self.round_base);
        Some(Progress {
            round: 0,
            round_pages: self.round_pages,
            remaining_pages,
            wire_bytes,
            guest_bytes: pages * PAGE_SIZE as u64,
            wire_rate: self.wire_rate,
            dirty_rate: self.dirty_rate,
            elapsed: now,
            remaining: self.remaining(remaining_pages),
        })
    }

    /// The rounds still to come shrink geometrically by dirty rate over covered rate.
    fn remaining(&self, remaining_pages: u64) -> Option<Duration> {
        let dirtied = self.dirty_rate.unwrap_or(0.0) / PAGE_SIZE as f64;
        let net = self.covered_rate - dirtied;
        (net > 0.0).then(|| Duration::from_secs_f64((remaining_pages as f64 / net).min(1e7)))
    }
}
