//! The bandwidth cap: one budget over all lanes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Longest sleep before the rate and the end are looked at again.
const LOOK: Duration = Duration::from_millis(20);

/// What may be sent at once after a pause: a cap is an average over this time.
const BURST: Duration = Duration::from_millis(20);

/// Bytes per second that all lanes together may send.
#[derive(Debug)]
pub(super) struct Pacer {
    /// Bytes per second; 0 for no cap.
    rate: AtomicU64,
    closed: AtomicBool,
    /// Held by the lane whose frame is being paced: frames go one after the other, so that no lane
    /// waits for a share of everybody's first frame, and no debt is left when the guest stops.
    turn: Mutex<Budget>,
}

impl Pacer {
    pub(super) fn new(rate: Option<u64>) -> Self {
        Self { rate: AtomicU64::new(rate.unwrap_or(0)), closed: AtomicBool::new(false), turn: Mutex::default() }
    }

    pub(super) fn set_rate(&self, rate: Option<u64>) {
        self.rate.store(rate.unwrap_or(0), Ordering::Relaxed);
    }

    /// No lane waits any more.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    /// Takes `bytes` from the budget and waits until they have been earned. A change of the rate
    /// counts at once, for what is being waited for too.
    pub(super) fn take(&self, bytes: u64) {
        if self.rate.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut budget = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut left = bytes as f64;
        while left > 0.0 && !self.closed.load(Ordering::Relaxed) {
            let rate = self.rate.load(Ordering::Relaxed) as f64;
            if rate <= 0.0 {
                return;
            }
            let slice = left.min(rate * LOOK.as_secs_f64());
            left -= slice;
            let due = budget.book(Instant::now(), Duration::from_secs_f64(slice / rate));
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
}

/// When what was sent so far will have been earned.
#[derive(Debug, Default)]
struct Budget {
    paid_until: Option<Instant>,
}

impl Budget {
    /// Books a span of the link's time; returns when it is over: at most the span from now.
    fn book(&mut self, now: Instant, span: Duration) -> Instant {
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let due = self.paid_until.map_or(earliest, |at| at.max(earliest)) + span;
        self.paid_until = Some(due);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_time_earns_only_a_short_burst() {
        let mut budget = Budget::default();
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let burst_ago = |at: Instant| at.checked_sub(BURST).unwrap();
        assert_eq!(budget.book(start, second), burst_ago(start) + second);
        assert_eq!(budget.book(start, second), burst_ago(start) + 2 * second);
        let later = start + 10 * second;
        assert_eq!(budget.book(later, second), burst_ago(later) + second);
    }

    #[test]
    fn many_lanes_leave_no_debt_behind() {
        let pacer = Pacer::new(Some(100 << 20));
        std::thread::scope(|scope| {
            for _ in 0..64 {
                scope.spawn(|| pacer.take(64 << 10));
            }
        });
        let paid_until = pacer.turn.lock().unwrap().paid_until.unwrap();
        assert!(paid_until <= Instant::now() + LOOK);
    }

    #[test]
    fn no_cap_and_a_closed_pacer_never_wait() {
        Pacer::new(None).take(u64::MAX);
        let pacer = Pacer::new(Some(1));
        pacer.close();
        pacer.take(u64::MAX);
        let pacer = Pacer::new(Some(u64::MAX));
        pacer.take(1 << 40);
    }
}
