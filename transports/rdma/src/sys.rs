//! Waiting for descriptors, and an event that one thread sets for others.
#![allow(unsafe_code)]

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use socket2::{SockAddr, SockAddrStorage};

/// Waits until one of the descriptors is readable, for so long at most; also returns when a signal comes.
pub(crate) fn wait_readable(fds: &[RawFd], timeout: Duration) -> io::Result<()> {
    let mut polled: Vec<_> = fds.iter().map(|&fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 }).collect();
    // Rounded up: rounding down would turn the last millisecond into a busy loop.
    let millis = timeout.as_micros().div_ceil(1000).min(i32::MAX as u128) as i32;
    // SAFETY: as many pollfds as announced, alive through the call.
    let ready = unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as libc::nfds_t, millis) };
    match ready {
        0.. => Ok(()),
        _ => match io::Error::last_os_error() {
            error if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            error => Err(error),
        },
    }
}

/// Makes reads of a descriptor return at once.
pub(crate) fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: takes no pointers.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: takes no pointers.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The addresses of this host's interfaces.
pub(crate) fn local_addresses() -> Vec<IpAddr> {
    let (mut first, mut found) = (std::ptr::null_mut(), Vec::new());
    // SAFETY: a place for the list.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return found;
    }
    let mut at: *const libc::ifaddrs = first;
    // SAFETY: the list is there until it is freed below, and its last entry has no next one.
    while let Some(entry) = unsafe { at.as_ref() } {
        // SAFETY: an address is null, or as long as its family says.
        if let Some(family) = unsafe { entry.ifa_addr.as_ref() }.map(|address| i32::from(address.sa_family)) {
            let len = match family {
                libc::AF_INET => size_of::<libc::sockaddr_in>(),
                libc::AF_INET6 => size_of::<libc::sockaddr_in6>(),
                _ => 0,
            };
            let mut storage = SockAddrStorage::zeroed();
            // SAFETY: `len` bytes are there, and fit a storage.
            let address = unsafe {
                std::ptr::copy_nonoverlapping(entry.ifa_addr.cast::<u8>(), (&raw mut storage).cast(), len);
                SockAddr::new(storage, len as _)
            };
            found.extend(address.as_socket().map(|address| address.ip()));
        }
        at = entry.ifa_next;
    }
    // SAFETY: the list that was given out above, once.
    unsafe { libc::freeifaddrs(first) };
    found
}

/// Readable once it was set, for ever.
#[derive(Debug)]
pub(crate) struct Flag(OwnedFd);

impl Flag {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(crate) fn set(&self) {
        let one = 1u64;
        // SAFETY: eight bytes, alive through the call. It fails only when the count is full: then the flag is set.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
