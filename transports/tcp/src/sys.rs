//! The two system calls that neither std nor socket2 offers in a form that fits.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::Duration;

/// Waits until a descriptor is readable; `false` when `timeout` passed or a signal came first.
pub(crate) fn wait_readable(fd: BorrowedFd<'_>, timeout: Duration) -> io::Result<bool> {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // Rounded up: rounding down would turn the last millisecond into a busy loop.
    let millis = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: one pollfd, alive through the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, millis) };
    match ready {
        0 => Ok(false),
        1.. => Ok(true),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            error => Err(error),
        },
    }
}

/// Receives bytes; with `whole`, sleeps in the kernel until the slice is full or the stream ends.
pub(crate) fn receive(fd: BorrowedFd<'_>, into: &mut [u8], whole: bool) -> io::Result<usize> {
    let flags = if whole { libc::MSG_WAITALL } else { 0 };
    // SAFETY: the kernel writes at most `into.len()` bytes into an exclusive slice.
    let received = unsafe { libc::recv(fd.as_raw_fd(), into.as_mut_ptr().cast(), into.len(), flags) };
    usize::try_from(received).map_err(|_| io::Error::last_os_error())
}
