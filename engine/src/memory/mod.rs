//! Guest memory: what regions exist ([`Layout`]), how the engine reaches them ([`GuestMemory`]),
//! and a ready-made implementation over mappings of this process ([`MappedMemory`]).

mod layout;
mod mapped;
mod raw;
mod reader;
mod writer;

pub use layout::{Layout, LayoutError, Region, RegionId, Transfer};
pub use mapped::{Backing, MappedMemory, NotShareable};
use raw::{copy_from_guest, copy_from_guest_unless_zero, copy_to_guest};
pub use raw::{is_zero, is_zero_portable};
pub(crate) use reader::PageReader;
pub(crate) use writer::PageWriter;

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use crate::units::PAGE_SIZE;

/// A region as mapped in this process.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// Address of the region's first byte.
    pub start: NonNull<u8>,
    /// Bytes mapped; at least the region's length.
    pub len: usize,
}

/// Why guest memory could not be reached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// An access past the end of a region, or to a region that does not exist.
    #[error("access to {len} bytes at offset {offset:#x} lies outside {region}")]
    OutOfBounds {
        /// The region that was named.
        region: RegionId,
        /// Byte offset in the region.
        offset: u64,
        /// Bytes asked for.
        len: u64,
    },
    /// The host refused the access.
    #[error("{region} at offset {offset:#x}: {source}")]
    Host {
        /// The region that was named.
        region: RegionId,
        /// Byte offset in the region.
        offset: u64,
        /// The host's own error.
        source: std::io::Error,
    },
    /// This memory cannot do what was asked.
    #[error("this memory does not support {0}")]
    Unsupported(&'static str),
    /// The host has no memory left for the packer's tables.
    #[error("the packer could not work: {0}")]
    Packing(std::io::Error),
}

/// Memory of a guest, as the engine sees it. The guest may write it at any time.
///
/// Implement [`window`](Self::window) where the memory is mapped in this process (the fast road;
/// `read` and `write` then come for free), or `read` and `write` where it is not.
///
/// # Safety
///
/// Every address in a returned [`Window`] must stay mapped, readable and writable for as long as
/// `self` lives, and nothing in this process may hold a Rust reference into it.
pub unsafe trait GuestMemory: Send + Sync {
    /// The regions. Constant for the life of a migration.
    fn layout(&self) -> &Layout;

    /// Where a region is mapped in this process, if it is.
    fn window(&self, region: RegionId) -> Option<Window>;

    /// Copies bytes out. The guest may be writing them: the copy can be torn.
    fn read(&self, region: RegionId, offset: u64, into: &mut [u8]) -> Result<(), MemoryError> {
        let source = checked_window(self, region, offset, into.len())?;
        // SAFETY: `checked_window` proved that `into.len()` bytes from `source` lie inside a window,
        // which the trait's contract keeps mapped; `into` is private, so the two do not overlap.
        unsafe { copy_from_guest(source, into) };
        Ok(())
    }

    /// Copies bytes in.
    fn write(&self, region: RegionId, offset: u64, from: &[u8]) -> Result<(), MemoryError> {
        let target = checked_window(self, region, offset, from.len())?;
        // SAFETY: as in `read`, with the direction turned round.
        unsafe { copy_to_guest(from, target) };
        Ok(())
    }

    /// The memfd behind a region, where there is one: another process of this host can be handed the same memory.
    fn file(&self, region: RegionId) -> Option<BorrowedFd<'_>> {
        let _ = region;
        None
    }

    /// The pages of a region that may hold something other than zeros, as ascending page ranges
    /// relative to the region; `None` when unknown, which means all of them. Asked once, after
    /// tracking has started, so that a page touched later is reported dirty instead.
    fn populated(&self, region: RegionId) -> Option<Vec<Range<u64>>> {
        let _ = region;
        None
    }

    /// Gives pages back to the host: they read as zeros afterwards. `pages` is relative to the region.
    fn discard(&self, region: RegionId, pages: Range<u64>) -> Result<(), MemoryError> {
        let _ = (region, pages);
        Err(MemoryError::Unsupported("discard"))
    }
}

/// The address of `offset` in a region's window, when `len` bytes from there lie inside the region.
fn checked_window<M: GuestMemory + ?Sized>(
    memory: &M,
    region: RegionId,
    offset: u64,
    len: usize,
) -> Result<*mut u8, MemoryError> {
    let out_of_bounds = MemoryError::OutOfBounds { region, offset, len: len as u64 };
    let Some(described) = memory.layout().region(region) else {
        return Err(out_of_bounds);
    };
    if len == 0 && offset <= described.len {
        // An empty region has no window, and no bytes need one.
        return Ok(NonNull::dangling().as_ptr());
    }
    let window = memory.window(region).ok_or(MemoryError::Unsupported("access without a window"))?;
    let limit = described.len.min(window.len as u64);
    match offset.checked_add(len as u64) {
        // SAFETY: `offset <= limit <= window.len`, so the result stays inside the mapped window.
        Some(end) if end <= limit => Ok(unsafe { window.start.as_ptr().add(offset as usize) }),
        _ => Err(out_of_bounds),
    }
}

/// Byte offset of a page in its region.
pub(crate) fn page_offset(page_in_region: u64) -> u64 {
    page_in_region * PAGE_SIZE as u64
}
