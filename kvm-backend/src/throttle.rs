//! Slowing a guest down: all vCPUs stand still together for a part of every period.
//!
//! They rest at the same time, so that none spins on a lock whose holder rests. The thread that
//! beats time exists only while there is something to slow down.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::crew::Crew;

/// A period of running and resting. Short enough that a guest's own timers hardly notice one rest;
/// at 99 % it runs for a tenth of a millisecond, still many times the cost of getting in and out.
const PERIOD: Duration = Duration::from_millis(10);

/// The longest rest: a guest whose clock interrupts stay away for longer may think that it hangs.
const MAX_REST: Duration = Duration::from_millis(50);

/// The strongest throttle: a guest must get on, if slowly.
pub(crate) const MAX_PERCENT: u8 = 99;

/// The throttle of a machine's vCPUs.
#[derive(Debug)]
pub(crate) struct Throttle {
    beat: Arc<Beat>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// How long to run, and how long to rest before that, when the guest has just run for `ran`. On a
/// busy host this thread is late and the guest runs longer than it should: it rests the longer then.
fn shares(percent: u8, ran: Duration) -> (Duration, Duration) {
    let run_percent = u32::from(100 - percent.min(MAX_PERCENT));
    let run = PERIOD * run_percent / 100;
    let rest = ran.max(run) * u32::from(percent) / run_percent;
    (run, rest.min(MAX_REST))
}

#[derive(Debug)]
struct Beat {
    crew: Arc<Crew>,
    percent: Mutex<u8>,
    changed: Condvar,
}

impl Throttle {
    pub(crate) fn new(crew: Arc<Crew>) -> Self {
        let beat = Beat { crew, percent: Mutex::new(0), changed: Condvar::new() };
        Self { beat: Arc::new(beat), thread: Mutex::new(None) }
    }

    /// Takes this share (at most [`MAX_PERCENT`]) of the vCPUs' time away from now on.
    pub(crate) fn set(&self, percent: u8) -> io::Result<()> {
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        *self.beat.percent() = percent;
        self.beat.changed.notify_all();
        match thread.take() {
            None if percent > 0 => {
                let beat = Arc::clone(&self.beat);
                let builder = std::thread::Builder::new().name("vcpu-throttle".to_owned());
                *thread = Some(builder.spawn(move || beat.run())?);
            }
            Some(running) if percent == 0 => {
                // It cannot panic; it only waits and tells vCPUs to rest.
                let _ = running.join();
                self.beat.crew.throttle(None);
            }
            unchanged => *thread = unchanged,
        }
        Ok(())
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // Ending it needs no new thread, so it cannot fail.
        let _ = self.set(0);
    }
}

impl Beat {
    fn run(&self) {
        let mut percent = self.percent();
        let mut ran = Duration::ZERO;
        while *percent > 0 {
            let (run, rest) = shares(*percent, ran);
            let rest_ends = Instant::now() + rest;
            self.crew.throttle(Some(rest_ends));
            percent = self.changed.wait_timeout(percent, rest + run).unwrap_or_else(PoisonError::into_inner).0;
            ran = rest_ends.elapsed();
        }
    }

    fn percent(&self) -> MutexGuard<'_, u8> {
        self.percent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn running_and_resting_make_up_a_period_in_the_share_asked_for() {
        for percent in [1, 20, 50, 99] {
            let (run, rest) = shares(percent, Duration::ZERO);
            assert_eq!(run + rest, PERIOD);
            assert_eq!(rest, PERIOD * u32::from(percent) / 100);
        }
    }

    #[test]
    fn a_guest_that_ran_too_long_rests_in_proportion_but_never_very_long() {
        let late = Duration::from_millis(9);
        assert_eq!(shares(75, late).1, late * 3);
        assert_eq!(shares(99, Duration::from_secs(1)).1, MAX_REST);
    }
}
