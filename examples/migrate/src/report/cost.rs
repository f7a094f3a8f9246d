//! What a migration costs its host: CPU time and memory of this process.
#![allow(unsafe_code)]

use std::fs;
use std::path::Path;
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

/// CPU time of the guest's threads, which are the ones called `vcpu-` and a number.
fn guest_time() -> Duration {
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    threads.filter_map(|thread| vcpu_time(&thread.path())).sum()
}

fn vcpu_time(thread: &Path) -> Option<Duration> {
    let name = fs::read_to_string(thread.join("comm")).ok()?;
    name.trim_end().strip_prefix("vcpu-")?.parse::<u32>().ok()?;
    let times = fs::read_to_string(thread.join("schedstat")).ok()?;
    times.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

/// CPU time since a moment: the guest's share, and everything else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CpuClock {
    process: Duration,
    guest: Duration,
}

impl CpuClock {
    /// Starts now.
    pub(crate) fn start() -> Self {
        Self { process: process_time(), guest: guest_time() }
    }

    /// Seconds since the start: of the process without the guest, and of the guest. Read it while
    /// the guest's threads are alive: the kernel forgets what ended threads were called.
    pub(crate) fn split(&self) -> (f64, f64) {
        let guest = guest_time().saturating_sub(self.guest);
        let process = process_time().saturating_sub(self.process);
        (process.saturating_sub(guest).as_secs_f64(), guest.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work_for(time: Duration) {
        let before = process_time();
        let mut sum = 0u64;
        while process_time() < before + time {
            sum = std::hint::black_box(sum + 1);
        }
    }

    #[test]
    fn work_of_this_process_is_counted_and_the_guests_share_taken_out() {
        let clock = CpuClock::start();
        work_for(Duration::from_millis(20));
        assert!(clock.split().0 + clock.split().1 >= 0.02);
        let (_, before) = clock.split();
        let vcpu = std::thread::Builder::new().name("vcpu-7".to_owned());
        let guest = vcpu.spawn(move || {
            work_for(Duration::from_millis(50));
            clock.split().1
        });
        assert!(guest.unwrap().join().unwrap() > before);
        assert!(peak_rss() > 0);
    }
}
