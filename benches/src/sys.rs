//! What needs the C library: this process's costs, reading and writing mapped memory on a socket, and
//! holding on to other processes.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use pageferry::memory::Window;

/// CPU time of this process so far, user and system, in seconds.
pub(crate) fn cpu_seconds() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills in the struct, which is plain numbers and was zeroed before.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// CPU time of this thread so far, in seconds: unlike the clock, it stands still while others run.
pub(crate) fn thread_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills in the struct.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// One `write` from memory at `offset`, of at most `len` bytes.
pub(crate) fn write_from(stream: &TcpStream, memory: Window, offset: usize, len: usize) -> io::Result<usize> {
    let len = len.min(memory.len.saturating_sub(offset));
    // SAFETY: `offset + len` lies inside the window, which its memory keeps mapped.
    let written = unsafe {
        let start = memory.start.as_ptr().add(offset.min(memory.len));
        libc::send(stream.as_raw_fd(), start.cast(), len, libc::MSG_NOSIGNAL)
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// One `read` into memory at `offset`, of at most `len` bytes.
pub(crate) fn read_into(stream: &TcpStream, memory: Window, offset: usize, len: usize) -> io::Result<usize> {
    let len = len.min(memory.len.saturating_sub(offset));
    // SAFETY: as in `write_from`; no Rust reference into the window exists.
    let read = unsafe {
        let start = memory.start.as_ptr().add(offset.min(memory.len));
        libc::recv(stream.as_raw_fd(), start.cast(), len, 0)
    };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Whether this process may do anything.
pub(crate) fn is_root() -> bool {
    // SAFETY: it only returns a number.
    unsafe { libc::geteuid() == 0 }
}

/// The unit of times in `/proc`.
pub(crate) fn ticks_per_second() -> f64 {
    // SAFETY: it only returns a number.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    if ticks > 0 { ticks as f64 } else { 100.0 }
}

/// Sends a signal to a process.
pub(crate) fn signal(process: u32, signal: libc::c_int) -> io::Result<()> {
    let process = libc::pid_t::try_from(process).map_err(io::Error::other)?;
    // SAFETY: plain numbers.
    let answer = unsafe { libc::kill(process, signal) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lowers the priority of a thread.
pub(crate) fn be_nice(thread: u32, niceness: i32) -> io::Result<()> {
    // SAFETY: plain numbers.
    let answer = unsafe { libc::setpriority(libc::PRIO_PROCESS, thread, niceness) };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Frequency of the time stamp counter, measured: good to one in ten thousand.
#[cfg(target_arch = "x86_64")]
pub(crate) fn tsc_khz() -> u64 {
    const SPAN: std::time::Duration = std::time::Duration::from_millis(100);
    // SAFETY: every x86-64 CPU has the instruction.
    let read = || unsafe { core::arch::x86_64::_rdtsc() };
    let (started, first) = (std::time::Instant::now(), read());
    std::thread::sleep(SPAN);
    let (ticks, nanos) = (read() - first, started.elapsed().as_nanos());
    (u128::from(ticks) * 1_000_000 / nanos) as u64
}

/// Other processors have none.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn tsc_khz() -> u64 {
    0
}

/// The program will be killed when the thread that starts it ends, however that ends; the terminal's
/// Ctrl-C does not reach it.
pub(crate) fn end_with_parent(command: &mut Command) {
    command.process_group(0);
    // SAFETY: between fork and exec only one call is made, which is safe there.
    unsafe {
        command.pre_exec(|| match libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        });
    }
}
