//! The kernel's userfaultfd as far as it concerns writes: pages of this process are write-protected, and what a write to one
//! of them does depends on the features that were asked for.
//!
//! Numbers and structures are those of the kernel's `linux/userfaultfd.h`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

/// Bytes of one `struct uffd_msg`, and where in a page fault's the address stands.
const MESSAGE: usize = 32;
const MESSAGE_ADDRESS: usize = 16;

/// Messages that are read at once.
const MESSAGES: usize = 64;

/// What a userfaultfd can do, from the kernel's list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Features(pub(super) u64);

impl Features {
    /// Shared memory and huge pages can be protected, untouched pages of them too (Linux 5.19).
    pub(super) const WP_HUGETLBFS_SHMEM: Self = Self(1 << 12);
    /// Untouched anonymous pages can be protected (Linux 6.4).
    pub(super) const WP_UNPOPULATED: Self = Self(1 << 13);
    /// The kernel lifts a protection by itself, and remembers that it did (Linux 6.7).
    pub(super) const WP_ASYNC: Self = Self(1 << 15);
}

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Unregister {
    start: u64,
    len: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// The number of an ioctl that reads and writes a `T`.
pub(super) const fn iowr<T>(kind: u8, number: u8) -> libc::Ioctl {
    request::<T>(3, kind, number)
}

const fn request<T>(direction: u32, kind: u8, number: u8) -> libc::Ioctl {
    (direction << 30 | (size_of::<T>() as u32) << 16 | (kind as u32) << 8 | number as u32) as libc::Ioctl
}

/// Calls an ioctl.
///
/// # Safety
///
/// The request must be encoded with the size of its argument, and what the argument points to must be the kernel's to write.
pub(super) unsafe fn ioctl<T>(fd: RawFd, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes the argument and what it points to, which the caller has promised.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// One userfaultfd. When it is dropped the kernel forgets all that was registered, and wakes whoever waits.
#[derive(Debug)]
pub(super) struct Userfault(File);

impl Userfault {
    /// Opens one for faults of user code only: that needs no privilege. Where a fault would have to be told, a system
    /// call that writes a protected page fails with EFAULT instead.
    pub(super) fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
        // SAFETY: a plain system call without pointers.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else owns.
        Ok(Self(File::from(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })))
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
        // SAFETY: every request below is encoded with the size of its argument, which holds no pointer that the kernel follows. Those
        // that name addresses change how writes to those pages are tracked, never their content.
        unsafe { ioctl(self.0.as_raw_fd(), request, argument) }.map(drop)
    }

    /// Asks for features, once; an error means that the kernel lacks one of them.
    pub(super) fn enable(&self, features: &[Features]) -> io::Result<()> {
        let features = features.iter().fold(0, |sum, feature| sum | feature.0);
        let mut api = Api { version: UFFD_API, features, ioctls: 0 };
        self.ioctl(iowr::<Api>(0xAA, 0x3F), &mut api)
    }

    /// Lets pages of a range be protected.
    pub(super) fn register(&self, bytes: &Range<u64>) -> io::Result<()> {
        let mut argument = Register { start: bytes.start, len: length(bytes), mode: REGISTER_MODE_WP, ioctls: 0 };
        self.ioctl(iowr::<Register>(0xAA, 0x00), &mut argument)
    }

    /// Takes all protection off a range for good, and wakes whoever waits for it.
    pub(super) fn unregister(&self, bytes: &Range<u64>) -> io::Result<()> {
        let mut argument = Unregister { start: bytes.start, len: length(bytes) };
        self.ioctl(request::<Unregister>(2, 0xAA, 0x01), &mut argument)
    }

    /// Protects a registered range. On return no thread can write it through a stale TLB entry either.
    pub(super) fn protect(&self, bytes: &Range<u64>) -> io::Result<()> {
        self.write_protect(bytes, WRITEPROTECT_MODE_WP)
    }

    /// Lets a registered range be written, and wakes whoever waits for that.
    pub(super) fn open_to_writes(&self, bytes: &Range<u64>) -> io::Result<()> {
        self.write_protect(bytes, 0)
    }

    fn write_protect(&self, bytes: &Range<u64>, mode: u64) -> io::Result<()> {
        let mut argument = WriteProtect { start: bytes.start, len: length(bytes), mode };
        loop {
            match self.ioctl(iowr::<WriteProtect>(0xAA, 0x06), &mut argument) {
                // The address space is being changed elsewhere.
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => std::thread::yield_now(),
                done => return done,
            }
        }
    }

    /// The addresses of writes that wait, as many as are told at once; none if there are none.
    pub(super) fn faults(&self, each: &mut dyn FnMut(u64)) -> io::Result<usize> {
        let mut messages = [0; MESSAGES * MESSAGE];
        let filled = match (&self.0).read(&mut messages) {
            Ok(filled) => filled,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => 0,
            Err(error) => return Err(error),
        };
        let messages = messages[..filled].chunks_exact(MESSAGE);
        let count = messages.len();
        for message in messages.filter(|message| message[0] == UFFD_EVENT_PAGEFAULT) {
            let mut address = [0; 8];
            address.copy_from_slice(&message[MESSAGE_ADDRESS..MESSAGE_ADDRESS + 8]);
            each(u64::from_ne_bytes(address));
        }
        Ok(count)
    }

    /// Waits for a fault, or until the other descriptor becomes readable or is closed at its other end: says whether it was that.
    pub(super) fn wait(&self, end: &impl AsRawFd) -> io::Result<bool> {
        let polled = |fd: RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [polled(self.0.as_raw_fd()), polled(end.as_raw_fd())];
        // SAFETY: two pollfds, as announced, alive through the call.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) };
        }
        Ok(fds[1].revents != 0)
    }
}

fn length(bytes: &Range<u64>) -> u64 {
    bytes.end - bytes.start
}
