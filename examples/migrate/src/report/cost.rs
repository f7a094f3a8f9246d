//! What a migration costs its host: CPU time and memory of this process.
#![allow(unsafe_code)]

use std::time::Duration;

fn usage() -> libc::rusage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure it is given; zeroed is a valid `rusage` in any case.
    unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    }
}

fn span(time: libc::timeval) -> Duration {
    Duration::new(time.tv_sec as u64, time.tv_usec as u32 * 1000)
}

/// User and system time of this process, all threads.
fn process_time() -> Duration {
    let usage = usage();
    span(usage.ru_utime) + span(usage.ru_stime)
}

/// The most memory this process ever held, in bytes.
pub(crate) fn peak_rss() -> u64 {
    usage().ru_maxrss as u64 * 1024
}

/// CPU time since a moment: the guest's share, and everything else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuClock {
    process: Duration,
    guest: Duration,
}

impl CpuClock {
    /// Starts now; `guest` is the CPU time that the guest's threads have used so far.
    pub(crate) fn start(guest: Duration) -> Self {
        Self { process: process_time(), guest }
    }

    /// Seconds since the start: of the process without the guest, and of the guest.
    pub(crate) fn split(&self, guest: Duration) -> (f64, f64) {
        let guest = guest.saturating_sub(self.guest);
        let process = process_time().saturating_sub(self.process);
        (process.saturating_sub(guest).as_secs_f64(), guest.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_this_process_is_counted_and_the_guests_share_taken_out() {
        let clock = CpuClock::start(Duration::ZERO);
        let mut sum = 0u64;
        while process_time() - clock.process < Duration::from_millis(20) {
            sum = std::hint::black_box(sum + 1);
        }
        assert!(clock.split(Duration::ZERO).0 >= 0.02);
        let (engine, guest) = clock.split(Duration::from_secs(1000));
        assert_eq!((engine, guest), (0.0, 1000.0));
        assert!(peak_rss() > 0);
    }
}
