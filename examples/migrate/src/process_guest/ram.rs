//! The process guest's memory, page by page.
#![allow(unsafe_code)]

use std::sync::Arc;

use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::units::PAGE_SIZE;

use super::ProcessGuestError;
use crate::workload::page::LivePage;

const MIN_BYTES: u64 = 1 << 20;

/// One region of memory from address 0.
#[derive(Clone, Debug)]
pub(super) struct Ram(Arc<MappedMemory>);

impl Ram {
    /// The layout of a guest with this much memory.
    pub(super) fn layout(bytes: u64) -> Result<Layout, ProcessGuestError> {
        if bytes < MIN_BYTES || !bytes.is_multiple_of(PAGE_SIZE as u64) {
            return Err(ProcessGuestError::MemorySize(bytes));
        }
        Ok(Layout::new(vec![Region::ram("ram", 0, bytes)])?)
    }

    /// Maps memory of a layout made by [`layout`](Self::layout), here or at the source.
    pub(super) fn map(layout: Layout, backing: Backing) -> Result<Self, ProcessGuestError> {
        let bytes = bytes_of(&layout)?;
        let hint = match backing {
            Backing::HugePages2M => "; reserve huge pages in /proc/sys/vm/nr_hugepages, and use whole 2 MiB pages",
            _ => "",
        };
        let mapped = MappedMemory::new(layout, backing);
        Ok(Self(Arc::new(mapped.map_err(|source| ProcessGuestError::Map { bytes, source, hint })?)))
    }

    /// Takes memory that is there already.
    pub(super) fn of(memory: Arc<MappedMemory>) -> Result<Self, ProcessGuestError> {
        bytes_of(memory.layout())?;
        Ok(Self(memory))
    }

    /// Touches all of it.
    pub(super) fn prefault(&self) -> Result<(), ProcessGuestError> {
        let bytes = self.page_count() * PAGE_SIZE as u64;
        self.0.prefault().map_err(|source| ProcessGuestError::Map { bytes, source, hint: "" })
    }

    pub(super) fn memory(&self) -> Arc<dyn GuestMemory> {
        Arc::clone(&self.0) as Arc<dyn GuestMemory>
    }

    pub(super) fn page_count(&self) -> u64 {
        self.0.layout().page_count()
    }

    /// Copies bytes out, from a page's first byte on.
    pub(super) fn read(&self, page: u64, into: &mut [u8]) {
        self.0.read(RegionId(0), page * PAGE_SIZE as u64, into).expect("the bytes lie inside the guest's memory");
    }

    /// Copies bytes in, from a page's first byte on.
    pub(super) fn write(&self, page: u64, from: &[u8]) {
        self.0.write(RegionId(0), page * PAGE_SIZE as u64, from).expect("the bytes lie inside the guest's memory");
    }

    /// A page, for volatile access.
    ///
    /// The page stays mapped for as long as any `Ram` of this memory lives; use it within that.
    pub(super) fn page(&self, page: u64) -> LivePage {
        assert!(page < self.page_count(), "page {page} is past the end of the guest's memory");
        let window = self.0.window(RegionId(0)).expect("the region is not empty, so it is mapped");
        // SAFETY: inside the window (asserted above), which is mapped, readable and writable while
        // `self` lives; a page's address is a multiple of 4096.
        unsafe { LivePage::new(window.start.as_ptr().add(page as usize * PAGE_SIZE)) }
    }
}

/// Bytes of a guest's only region.
fn bytes_of(layout: &Layout) -> Result<u64, ProcessGuestError> {
    match layout.regions() {
        [only] if only.guest_address == 0 => Ok(only.len),
        _ => {
            let why = "its memory is not one region from address 0".to_owned();
            Err(ProcessGuestError::Invalid { what: "layout", why })
        }
    }
}
