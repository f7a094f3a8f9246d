//! Where vCPU threads stop: between two steps of their work, when they are asked to.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A throttled vCPU works for a part of this long and stands still for the rest of it.
const DUTY_PERIOD: Duration = Duration::from_millis(20);

/// Holds and releases a number of threads.
#[derive(Debug)]
pub(super) struct Gate {
    threads: usize,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether a thread has to look at `state`: the only thing that a running step reads.
    attention: AtomicBool,
    throttle: AtomicU8,
    started: Instant,
}

#[derive(Debug, Default)]
struct State {
    held: bool,
    ended: bool,
    parked: usize,
    /// Threads that have left for good.
    gone: usize,
}

impl Gate {
    /// A gate that holds everybody from the start.
    pub(super) fn held(threads: usize) -> Self {
        Self {
            threads,
            state: Mutex::new(State { held: true, ..State::default() }),
            changed: Condvar::new(),
            attention: AtomicBool::new(true),
            throttle: AtomicU8::new(0),
            started: Instant::now(),
        }
    }

    /// Called by each thread between two steps: waits while the gate is held. `false` means the end.
    pub(super) fn pass(&self) -> bool {
        if self.attention.load(Ordering::Acquire) {
            return self.park();
        }
        if let Some(rest) = self.throttled_for() {
            self.rest(rest);
        }
        true
    }

    fn park(&self) -> bool {
        let mut state = self.lock();
        state.parked += 1;
        self.changed.notify_all();
        let waiting = self.changed.wait_while(state, |state| state.held && !state.ended);
        state = waiting.unwrap_or_else(PoisonError::into_inner);
        state.parked -= 1;
        !state.ended
    }

    /// Sleeps, but not through a hold.
    pub(super) fn rest(&self, time: Duration) {
        let state = self.lock();
        let woken = self.changed.wait_timeout_while(state, time, |state| !state.held && !state.ended);
        drop(woken);
    }

    /// Holds all threads; on return none of them is inside a step.
    pub(super) fn hold(&self) {
        let mut state = self.lock();
        state.held = true;
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
        let busy = |state: &mut State| state.parked + state.gone < self.threads && !state.ended;
        let parked = self.changed.wait_while(state, busy);
        drop(parked);
    }

    /// Lets the threads go on.
    pub(super) fn release(&self) {
        let mut state = self.lock();
        state.held = false;
        self.attention.store(state.ended, Ordering::Release);
        self.changed.notify_all();
    }

    /// Called by a thread that will not come again.
    pub(super) fn leave(&self) {
        self.lock().gone += 1;
        self.changed.notify_all();
    }

    /// Whether a thread has left although nobody let the threads end.
    pub(super) fn lost_a_thread(&self) -> bool {
        let state = self.lock();
        state.gone > 0 && !state.ended
    }

    /// Lets the threads end.
    pub(super) fn end(&self) {
        let mut state = self.lock();
        state.ended = true;
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Takes about this much of every thread's time away.
    pub(super) fn throttle(&self, percent: u8) {
        self.throttle.store(percent.min(99), Ordering::Relaxed);
    }

    /// How long a throttled thread has to stand still now.
    fn throttled_for(&self) -> Option<Duration> {
        let percent = u32::from(self.throttle.load(Ordering::Relaxed));
        if percent == 0 {
            return None;
        }
        let into_period = self.started.elapsed().as_nanos() % DUTY_PERIOD.as_nanos();
        let work = DUTY_PERIOD.as_nanos() * u128::from(100 - percent) / 100;
        (into_period >= work).then(|| Duration::from_nanos((DUTY_PERIOD.as_nanos() - into_period) as u64))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;

    /// Runs `check` beside three threads that count their steps.
    fn beside_counters(check: impl FnOnce(&Gate, &AtomicU64)) {
        let gate = Gate::held(3);
        let steps = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while gate.pass() {
                        steps.fetch_add(1, Ordering::SeqCst);
                        gate.rest(Duration::from_micros(50));
                    }
                });
            }
            check(&gate, &steps);
            gate.end();
        });
    }

    fn wait_for_more(steps: &AtomicU64) {
        let before = steps.load(Ordering::SeqCst);
        while steps.load(Ordering::SeqCst) == before {
            std::thread::yield_now();
        }
    }

    #[test]
    fn no_step_happens_while_the_gate_is_held() {
        beside_counters(|gate, steps| {
            assert_eq!(steps.load(Ordering::SeqCst), 0);
            for _ in 0..20 {
                gate.release();
                wait_for_more(steps);
                gate.hold();
                let held = steps.load(Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(1));
                assert_eq!(steps.load(Ordering::SeqCst), held);
            }
        });
    }

    #[test]
    fn holding_twice_and_ending_while_held_do_not_hang() {
        beside_counters(|gate, steps| {
            gate.release();
            wait_for_more(steps);
            gate.hold();
            gate.hold();
        });
    }

    #[test]
    fn a_thread_that_is_gone_does_not_hang_a_hold_and_is_noticed() {
        beside_counters(|gate, _| assert!(!gate.lost_a_thread()));
        let gate = Gate::held(2);
        gate.leave();
        gate.leave();
        gate.hold();
        assert!(gate.lost_a_thread());
    }

    #[test]
    fn a_throttled_thread_still_works_and_can_be_held() {
        beside_counters(|gate, steps| {
            gate.throttle(99);
            gate.release();
            wait_for_more(steps);
            gate.hold();
            gate.throttle(0);
            assert_eq!(gate.throttled_for(), None);
        });
    }
}
