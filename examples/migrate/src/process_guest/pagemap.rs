//! Two Linux interfaces that together report writes to a mapping: userfaultfd write protection that
//! the kernel lifts by itself (`WP_ASYNC`), and the PAGEMAP_SCAN ioctl, which finds the pages whose
//! protection was lifted and protects them again in the same step. Both since Linux 6.7.
//!
//! No fault is ever delivered to this process: a write to a protected page costs one short trap.
//! Numbers and structures are those of the kernel's `linux/userfaultfd.h` and `linux/fs.h`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Why writes cannot be tracked here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TrackingError {
    /// No userfaultfd at all.
    #[error(
        "the host does not allow userfaultfd, which tracks the process guest's writes: {0}; run outside the seccomp filter or container that forbids it"
    )]
    Userfaultfd(io::Error),
    /// A userfaultfd without asynchronous write protection.
    #[error(
        "this kernel's userfaultfd cannot track writes by itself (WP_ASYNC, Linux 6.7 or newer): {0}; use a newer kernel, or a KVM guest"
    )]
    WriteProtect(io::Error),
    /// The process' own page map cannot be opened.
    #[error("cannot open /proc/self/pagemap, which tells the pages written: {0}; mount /proc")]
    Pagemap(io::Error),
    /// A range could not be registered, protected or released.
    #[error("cannot {what} the {len} bytes of guest memory at {start:#x}: {source}")]
    Range {
        /// What was tried.
        what: &'static str,
        /// Where.
        start: u64,
        /// How much.
        len: u64,
        /// What the kernel said.
        source: io::Error,
    },
}

const UFFD_API: u64 = 0xAA;
const UFFD_USER_MODE_ONLY: i32 = 1;
const UFFD_FEATURE_WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const UFFD_FEATURE_WP_UNPOPULATED: u64 = 1 << 13;
const UFFD_FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Ranges that one call of PAGEMAP_SCAN may return.
const SCAN_BATCH: usize = 512;

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

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

const fn iowr<T>(kind: u8, number: u8) -> libc::Ioctl {
    request::<T>(3, kind, number)
}

const fn request<T>(direction: u32, kind: u8, number: u8) -> libc::Ioctl {
    (direction << 30 | (size_of::<T>() as u32) << 16 | (kind as u32) << 8 | number as u32) as libc::Ioctl
}

/// Calls an ioctl whose argument is exactly a `T`.
fn ioctl<T>(fd: RawFd, request: libc::Ioctl, argument: &mut T) -> io::Result<i32> {
    // SAFETY: every request in this file is encoded with the size of its argument, so the kernel
    // reads and writes only `argument`; the ones that name addresses change how writes to those
    // pages are tracked, never their content or their access rights as seen by this process.
    let result = unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Tracks writes to address ranges of this process.
#[derive(Debug)]
pub(crate) struct WriteTracker {
    uffd: OwnedFd,
    pagemap: File,
}

impl WriteTracker {
    /// Asks the host for both interfaces.
    pub(crate) fn new() -> Result<Self, TrackingError> {
        let uffd = userfaultfd().map_err(TrackingError::Userfaultfd)?;
        let features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
        let mut api = Api { version: UFFD_API, features, ioctls: 0 };
        ioctl(uffd.as_raw_fd(), iowr::<Api>(0xAA, 0x3F), &mut api).map_err(TrackingError::WriteProtect)?;
        let pagemap = File::open("/proc/self/pagemap").map_err(TrackingError::Pagemap)?;
        Ok(Self { uffd, pagemap })
    }

    /// Starts tracking a range. Every write that happens after the return is found by [`harvest`](Self::harvest).
    pub(crate) fn track(&self, bytes: &Range<u64>) -> Result<(), TrackingError> {
        let (start, len) = (bytes.start, bytes.end - bytes.start);
        let mut register = Register { start, len, mode: REGISTER_MODE_WP, ioctls: 0 };
        ioctl(self.uffd.as_raw_fd(), iowr::<Register>(0xAA, 0x00), &mut register)
            .map_err(|source| TrackingError::Range { what: "register", start, len, source })?;
        let mut protect = WriteProtect { start, len, mode: WRITEPROTECT_MODE_WP };
        ioctl(self.uffd.as_raw_fd(), iowr::<WriteProtect>(0xAA, 0x06), &mut protect)
            .map_err(|source| TrackingError::Range { what: "write-protect", start, len, source })?;
        Ok(())
    }

    /// Reports the pages of a range written since they were last protected, as address ranges, and
    /// protects them again.
    ///
    /// Nothing is lost: the kernel tests and protects a page under its page-table lock. A write
    /// that the test did not see comes after the protection and is found next time, with one
    /// exception: until this ioctl flushes the TLBs another thread may still write through a stale
    /// entry. Such a page is in this very report (its entry was stale because it had been
    /// writable), and it is read only after this returns.
    pub(crate) fn harvest(&self, bytes: &Range<u64>, found: impl FnMut(Range<u64>)) -> Result<(), TrackingError> {
        self.scan(bytes, PAGE_IS_WRITTEN, PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, found)
    }

    /// Reports the pages of a range that are in memory now. A page that was never touched is not, however it is
    /// protected; neither is one that was swapped out.
    pub(crate) fn present(&self, bytes: &Range<u64>, found: impl FnMut(Range<u64>)) -> Result<(), TrackingError> {
        self.scan(bytes, PAGE_IS_PRESENT, 0, found)
    }

    fn scan(
        &self,
        bytes: &Range<u64>,
        category: u64,
        flags: u64,
        mut found: impl FnMut(Range<u64>),
    ) -> Result<(), TrackingError> {
        let mut regions = [PageRegion::default(); SCAN_BATCH];
        let mut at = bytes.start;
        while at < bytes.end {
            let mut scan = scan_argument(at..bytes.end, category, flags, &mut regions);
            let count = ioctl(self.pagemap.as_raw_fd(), iowr::<ScanArgument>(b'f', 16), &mut scan);
            let len = bytes.end - at;
            let count = count.map_err(|source| TrackingError::Range { what: "scan", start: at, len, source })?;
            for region in &regions[..count as usize] {
                found(region.start..region.end);
            }
            at = scan.walk_end;
        }
        Ok(())
    }

    /// Ends tracking of a range; writes cost nothing any more.
    pub(crate) fn release(&self, bytes: &Range<u64>) -> Result<(), TrackingError> {
        let (start, len) = (bytes.start, bytes.end - bytes.start);
        let mut argument = Unregister { start, len };
        ioctl(self.uffd.as_raw_fd(), request::<Unregister>(2, 0xAA, 0x01), &mut argument)
            .map_err(|source| TrackingError::Range { what: "release", start, len, source })?;
        Ok(())
    }
}

fn scan_argument(bytes: Range<u64>, category: u64, flags: u64, regions: &mut [PageRegion; SCAN_BATCH]) -> ScanArgument {
    ScanArgument {
        size: size_of::<ScanArgument>() as u64,
        flags,
        start: bytes.start,
        end: bytes.end,
        walk_end: bytes.start,
        vec: regions.as_mut_ptr() as u64,
        vec_len: regions.len() as u64,
        max_pages: 0,
        category_inverted: 0,
        category_mask: category,
        category_anyof_mask: 0,
        return_mask: category,
    }
}

/// A userfaultfd for faults of user code only: that needs no privilege, and asynchronous
/// protection handles writes by the kernel (a `read` into guest memory) all the same.
fn userfaultfd() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | UFFD_USER_MODE_ONLY;
    // SAFETY: a plain system call without pointers.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}
