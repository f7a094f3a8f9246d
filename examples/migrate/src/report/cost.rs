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
#[derive(Clone, Copy, Debug, Default)]
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

    /// Other tests' guests share this process, and their threads come and go: only what is bounded by
    /// this thread's own time is certain.
    fn in_thread<T: Send + 'static>(name: &str, work: fn() -> T) -> T {
        std::thread::Builder::new().name(name.to_owned()).spawn(work).unwrap().join().unwrap()
    }

    fn own_guest_time() -> Option<Duration> {
        vcpu_time(Path::new("/proc/thread-self"))
    }

    #[test]
    fn work_of_the_guests_threads_is_the_guests_and_not_this_processs() {
        let (own, split, all) = in_thread("vcpu-7", || {
            while own_guest_time().unwrap() < Duration::from_millis(20) {}
            let (own, split) = (own_guest_time().unwrap(), CpuClock::default().split());
            (own, split, process_time())
        });
        assert!(split.1 >= own.as_secs_f64(), "{split:?} {own:?}");
        assert!(split.0 <= all.saturating_sub(own).as_secs_f64(), "{split:?} {own:?} {all:?}");
    }

    #[test]
    fn work_of_every_other_thread_is_this_processs() {
        assert_eq!(in_thread("vcpu-throttle", own_guest_time), None);
        assert_eq!(in_thread("worker-7", own_guest_time), None);
        let (clock, before) = (CpuClock::start(), process_time());
        while process_time() < before + Duration::from_millis(20) {}
        let (process, guest) = clock.split();
        assert!(process + guest >= 0.02, "{process} {guest}");
        assert!(peak_rss() > 0);
    }
}
