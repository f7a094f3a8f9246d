//! Reading guest memory page by page, at memory speed where it is mapped.

use std::ops::Range;
use std::sync::Arc;

use super::{GuestMemory, Layout, MemoryError, RegionId, copy_from_guest_unless_zero, is_zero, page_offset};
use crate::transport::DirectRun;
use crate::units::{PAGE_SIZE, PageNumber, PageRun};

/// Fills a buffer with a page, each byte read once; says whether all were zeros (the buffer is then
/// undefined).
pub(crate) type ReadPage<'a> = &'a mut dyn FnMut(&mut [u8; PAGE_SIZE]) -> Result<bool, MemoryError>;

/// Reads pages of guest memory, where it is mapped without a call into the VMM.
pub(crate) struct PageReader {
    memory: Arc<dyn GuestMemory>,
    layout: Layout,
}

impl PageReader {
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Self {
        let layout = memory.layout().clone();
        Self { memory, layout }
    }

    /// The pages of the region that holds a page.
    pub(crate) fn region_around(&self, page: PageNumber) -> Range<u64> {
        let region = self.layout.locate(page).map(|(region, _)| self.layout.pages_of(region));
        region.map_or(0..0, |pages| pages.first.0..pages.end())
    }

    /// Where a run of pages lies in its region.
    pub(crate) fn locate(&self, run: PageRun) -> Result<DirectRun, MemoryError> {
        let outside = MemoryError::OutOfBounds { region: RegionId(u32::MAX), offset: run.first.0, len: run.count };
        let (region, first) = self.layout.locate_run(run).ok_or(outside)?;
        Ok(DirectRun { region, offset: page_offset(first), len: page_offset(run.count) })
    }

    /// Calls `visit` with a reader for every page of a run.
    pub(crate) fn read_run(
        &self,
        run: PageRun,
        mut visit: impl FnMut(PageNumber, ReadPage<'_>) -> Result<(), MemoryError>,
    ) -> Result<(), MemoryError> {
        let outside = MemoryError::OutOfBounds { region: RegionId(u32::MAX), offset: run.first.0, len: run.count };
        let (region, first) = self.layout.locate_run(run).ok_or(outside)?;
        let window = self.memory.window(region).filter(|window| {
            let needed = page_offset(first + run.count);
            (window.start.as_ptr() as usize).is_multiple_of(PAGE_SIZE) && window.len as u64 >= needed
        });
        for (index, page) in (first..).zip(run.pages()) {
            let mut read = |into: &mut [u8; PAGE_SIZE]| {
                if let Some(window) = window {
                    // SAFETY: the page lies inside the window (checked above), which `GuestMemory`
                    // keeps mapped; windows are page-aligned here; `into` is a private page.
                    let zero = unsafe {
                        let source = window.start.as_ptr().add(page_offset(index) as usize);
                        copy_from_guest_unless_zero(source, into)
                    };
                    // The guest may clear a page between the test and the copy: what counts is the copy.
                    Ok(zero || is_zero(into))
                } else {
                    self.memory.read(region, page_offset(index), into)?;
                    Ok(is_zero(into))
                }
            };
            visit(page, &mut read)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::memory::{Backing, MappedMemory, Region};

    #[test]
    fn a_page_that_is_cleared_while_it_is_read_counts_as_zero_if_it_was_read_so() {
        let layout = Layout::new(vec![Region::ram("a", 0, 4096)]).unwrap();
        let memory = Arc::new(MappedMemory::new(layout, Backing::Anonymous).unwrap());
        let reader = PageReader::new(memory.clone());
        let over = AtomicBool::new(false);
        let read_once = || {
            let (mut page, mut zero) = ([0; PAGE_SIZE], false);
            let run = PageRun { first: PageNumber(0), count: 1 };
            reader.read_run(run, |_, read| read(&mut page).map(|said| zero = said)).unwrap();
            zero || !is_zero(&page)
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    memory.write(RegionId(0), 0, &[7; PAGE_SIZE]).unwrap();
                    memory.write(RegionId(0), 0, &[0; PAGE_SIZE]).unwrap();
                }
            });
            let told_rightly = (0..500_000).all(|_| read_once());
            over.store(true, Ordering::Relaxed);
            assert!(told_rightly);
        });
    }
}
