//! What a migration costs its host: CPU time and memory of this process.
#![allow(unsafe_code)]

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use pageferry::memory::GuestMemory;

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

/// The most memory this process ever held, in bytes. (`getrusage` would count what the program that started this one
/// held before.)
fn peak_rss() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| kilobytes(line, "VmHWM:"))
}

/// Bytes of this guest memory that this process holds.
fn guest_rss(memory: &dyn GuestMemory) -> Option<u64> {
    let windows = memory.layout().iter().filter_map(|(region, _)| {
        let window = memory.window(region)?;
        let start = window.start.as_ptr() as u64;
        Some(start..start + window.len as u64)
    });
    let windows: Vec<_> = windows.collect();
    Some(resident(&fs::read_to_string("/proc/self/smaps").ok()?, &windows))
}

/// Resident bytes within address ranges, and wherever else the files behind them are mapped: a page that is mapped twice counts twice
/// in what the process holds. A mapping that the kernel has merged with its neighbour counts up to the part that lies within.
fn resident(smaps: &str, windows: &[Range<u64>]) -> u64 {
    let overlap = |range: &Range<u64>| -> u64 {
        let within = |window: &Range<u64>| window.end.min(range.end).saturating_sub(window.start.max(range.start));
        windows.iter().map(within).sum()
    };
    let guests = smaps.lines().filter(|line| address_range(line).is_some_and(|range| overlap(&range) > 0));
    let files: Vec<_> = guests.filter_map(file_behind).collect();
    let (mut sum, mut inside) = (0, 0);
    for line in smaps.lines() {
        if let Some(range) = address_range(line) {
            let again = file_behind(line).is_some_and(|file| files.contains(&file));
            inside = if again { range.end - range.start } else { overlap(&range) };
        } else if let Some(bytes) = kilobytes(line, "Rss:") {
            sum += bytes.min(inside);
        }
    }
    sum
}

/// Device and number of the file in the first line about a mapping.
fn file_behind(line: &str) -> Option<(&str, &str)> {
    let mut fields = line.split_whitespace().skip(3);
    fields.next().zip(fields.next()).filter(|(_, number)| *number != "0")
}

/// The addresses in the first line about a mapping: `7f00-8f00 rw-p ...`.
fn address_range(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split_whitespace().next()?.split_once('-')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

/// The bytes in a line such as `Rss:     128 kB`.
fn kilobytes(line: &str, name: &str) -> Option<u64> {
    let number = line.strip_prefix(name)?.split_whitespace().next()?;
    number.parse::<u64>().ok().map(|number| number * 1024)
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

/// What a migration took from this host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cost {
    /// CPU time without the guest's.
    pub(crate) cpu_seconds: f64,
    /// CPU time of the guest.
    pub(crate) guest_cpu_seconds: f64,
    /// The most memory this process ever held, in bytes.
    pub(crate) peak_rss: Option<u64>,
    /// The part of it that is not the guest's; `None` where no guest is here.
    pub(crate) overhead_rss: Option<u64>,
}

/// CPU time since a moment: the guest's share, and everything else.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CostClock {
    process: Duration,
    guest: Duration,
}

impl CostClock {
    /// Starts now.
    pub(crate) fn start() -> Self {
        Self { process: process_time(), guest: guest_time() }
    }

    /// The cost since the start, with the guest's memory as far as it is here. Read it while the guest's
    /// threads are alive: the kernel forgets what ended threads were called.
    pub(crate) fn stop(&self, memory: Option<&dyn GuestMemory>) -> Cost {
        let (cpu_seconds, guest_cpu_seconds) = self.split();
        let (peak_rss, guest_rss) = (peak_rss(), memory.and_then(guest_rss));
        let overhead_rss = peak_rss.zip(guest_rss).map(|(peak, guest)| peak.saturating_sub(guest));
        Cost { cpu_seconds, guest_cpu_seconds, peak_rss, overhead_rss }
    }

    /// Seconds since the start: of the process without the guest, and of the guest.
    fn split(&self) -> (f64, f64) {
        let guest = guest_time().saturating_sub(self.guest);
        let process = process_time().saturating_sub(self.process);
        (process.saturating_sub(guest).as_secs_f64(), guest.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use pageferry::memory::{Backing, Layout, MappedMemory, Region, RegionId};

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
            let (own, split) = (own_guest_time().unwrap(), CostClock::default().split());
            (own, split, process_time())
        });
        assert!(split.1 >= own.as_secs_f64(), "{split:?} {own:?}");
        assert!(split.0 <= all.saturating_sub(own).as_secs_f64(), "{split:?} {own:?} {all:?}");
    }

    #[test]
    fn work_of_every_other_thread_is_this_processs() {
        assert_eq!(in_thread("vcpu-throttle", own_guest_time), None);
        assert_eq!(in_thread("worker-7", own_guest_time), None);
        let (clock, before) = (CostClock::start(), process_time());
        while process_time() < before + Duration::from_millis(20) {}
        let (process, guest) = clock.split();
        assert!(process + guest >= 0.02, "{process} {guest}");
    }

    #[test]
    fn the_guests_memory_is_told_apart_from_the_rest() {
        let layout = Layout::new(vec![Region::ram("ram", 0, 64 << 20)]).unwrap();
        // Never merged with what another test has mapped.
        let memory = MappedMemory::new(layout, Backing::Memfd).unwrap();
        for page in 0..4096 {
            memory.write(RegionId(0), page * 4096, &[1]).unwrap();
        }
        assert_eq!(guest_rss(&memory), Some(16 << 20));
        let cost = CostClock::start().stop(Some(&memory));
        assert!(cost.peak_rss.unwrap() - cost.overhead_rss.unwrap() == 16 << 20);
        assert_eq!(CostClock::start().stop(None).overhead_rss, None);
    }

    #[test]
    fn only_mappings_within_the_guests_addresses_count() {
        let smaps = "1000-3000 rw-p 00000000 00:00 0\nSize: 8 kB\nRss: 8 kB\n\
                     5000-9000 rw-p 00000000 00:00 0   [heap]\nRss: 16 kB\nPss: 16 kB\n";
        assert_eq!(resident(smaps, &[0x1000..0x3000, 0..0x800]), 8192);
        assert_eq!(resident(smaps, &[0x6000..0x7000, 0x9000..0xa000]), 4096);
        assert_eq!(resident(smaps, &[]), 0);
    }

    #[test]
    fn the_guests_memory_counts_wherever_it_is_mapped() {
        let smaps = "1000-3000 rw-s 00000000 00:01 77 /memfd:ram\nRss: 8 kB\n5000-7000 rw-s 00000000 00:01 77 /memfd:ram\nRss: 4 kB\n\
                     8000-9000 rw-s 00000000 00:02 77 /other\nRss: 4 kB\n9000-a000 rw-p 00000000 00:00 0\nRss: 4 kB\n";
        assert_eq!(resident(smaps, std::slice::from_ref(&(0x1000..0x3000))), 12288);
        assert_eq!(resident(smaps, std::slice::from_ref(&(0x9000..0xa000))), 4096);
    }
}
