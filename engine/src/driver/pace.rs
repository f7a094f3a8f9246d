//! The bandwidth cap: one budget over all lanes.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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
    /// When the budget spent so far will have been earned.
    paid_until: Mutex<Option<Instant>>,
}

impl Pacer {
    pub(super) fn new(rate: Option<u64>) -> Self {
        Self { rate: AtomicU64::new(rate.unwrap_or(0)), closed: AtomicBool::new(false), paid_until: Mutex::new(None) }
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
        let mut left = bytes as f64;
        while left > 0.0 && !self.closed.load(Ordering::Relaxed) {
            let rate = self.rate.load(Ordering::Relaxed) as f64;
            if rate <= 0.0 {
                return;
            }
            let slice = left.min(rate * LOOK.as_secs_f64());
            left -= slice;
            let due = self.book(Instant::now(), Duration::from_secs_f64(slice / rate));
            std::thread::sleep(due.saturating_duration_since(Instant::now()).min(Duration::from_secs(1)));
        }
    }

    /// Books a span of the link's time; returns when it is over.
    fn book(&self, now: Instant, span: Duration) -> Instant {
        let mut paid_until = self.paid_until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let due = paid_until.map_or(earliest, |at| at.max(earliest)) + span;
        *paid_until = Some(due);
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_shared_and_an_idle_time_earns_only_a_short_burst() {
        let pacer = Pacer::new(Some(1000));
        let start = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(pacer.book(start, second), start.checked_sub(BURST).unwrap() + second);
        assert_eq!(pacer.book(start, second), start.checked_sub(BURST).unwrap() + 2 * second);
        let later = start + 10 * second;
        assert_eq!(pacer.book(later, second), later.checked_sub(BURST).unwrap() + second);
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
