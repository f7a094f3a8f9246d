//! Two Linux interfaces that together report writes to a mapping: userfaultfd write protection that
//! the kernel lifts by itself (`WP_ASYNC`), and the PAGEMAP_SCAN ioctl, which finds the pages whose
//! protection was lifted and protects them again in the same step. Both since Linux 6.7.
//!
//! No fault is ever delivered to this process: a write to a protected page costs one short trap.
//! Numbers and structures are those of the kernel's `linux/fs.h`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use pageferry::memory::NotShareable;

use super::userfault::{Features, Userfault, ioctl, iowr};

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
        "this kernel's userfaultfd cannot track writes by itself (WP_ASYNC, Linux 6.7 or newer): {0}; leave out --tracker kernel"
    )]
    WriteProtect(io::Error),
    /// A userfaultfd that cannot protect shared memory.
    #[error(
        "this kernel's userfaultfd cannot tell of writes to shared memory (WP_HUGETLBFS_SHMEM, Linux 5.19 or newer): {0}; use a newer kernel, or a KVM guest"
    )]
    WriteFaults(io::Error),
    /// Memory without a descriptor.
    #[error(
        "writes to {0:?} are tracked by faults, which needs memory that can be mapped twice: use --backing anon or memfd, or Linux 6.7"
    )]
    NotShared(String),
    /// The second mapping of memory that has one.
    #[error("cannot map the guest's memory once more: {0}")]
    View(#[from] NotShareable),
    /// The host did not give a thread.
    #[error("cannot start a thread that tracks the guest's writes: {0}")]
    Thread(io::Error),
    /// The faults cannot be read.
    #[error("cannot read which pages the guest is about to write: {0}")]
    Faults(io::Error),
    /// Tracking has ended by itself.
    #[error("the guest's writes are not tracked any more: {0}")]
    Over(Arc<TrackingError>),
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

impl TrackingError {
    pub(super) fn at(what: &'static str, bytes: &Range<u64>, source: io::Error) -> Self {
        Self::Range { what, start: bytes.start, len: bytes.end - bytes.start, source }
    }
}

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Ranges that one call of PAGEMAP_SCAN may return.
const SCAN_BATCH: usize = 512;

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

/// Tracks writes to address ranges of this process.
#[derive(Debug)]
pub(crate) struct WriteTracker {
    uffd: Userfault,
    pagemap: File,
}

impl WriteTracker {
    /// Asks the host for both interfaces.
    pub(crate) fn new() -> Result<Self, TrackingError> {
        let uffd = Userfault::open().map_err(TrackingError::Userfaultfd)?;
        let features = [Features::WP_ASYNC, Features::WP_UNPOPULATED, Features::WP_HUGETLBFS_SHMEM];
        uffd.enable(&features).map_err(TrackingError::WriteProtect)?;
        let pagemap = File::open("/proc/self/pagemap").map_err(TrackingError::Pagemap)?;
        Ok(Self { uffd, pagemap })
    }

    /// Starts tracking a range. Every write that happens after the return is found by [`harvest`](Self::harvest).
    pub(crate) fn track(&self, bytes: &Range<u64>) -> Result<(), TrackingError> {
        self.uffd.register(bytes).map_err(|source| TrackingError::at("register", bytes, source))?;
        self.uffd.protect(bytes).map_err(|source| TrackingError::at("write-protect", bytes, source))
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
            // SAFETY: the request has the size of its argument, which names the vector above and its length.
            let count = unsafe { ioctl(self.pagemap.as_raw_fd(), iowr::<ScanArgument>(b'f', 16), &mut scan) };
            let count = count.map_err(|source| TrackingError::at("scan", &(at..bytes.end), source))?;
            for region in &regions[..count as usize] {
                found(region.start..region.end);
            }
            at = scan.walk_end;
        }
        Ok(())
    }

    /// Ends tracking of a range; writes cost nothing any more.
    pub(crate) fn release(&self, bytes: &Range<u64>) -> Result<(), TrackingError> {
        self.uffd.unregister(bytes).map_err(|source| TrackingError::at("release", bytes, source))
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
