//! Writing guest memory page by page, at memory speed where it is mapped.

use std::sync::Arc;

use super::raw::{finish_streaming, stream_page};
use super::{GuestMemory, Layout, MemoryError, RegionId, Window, page_offset};
use crate::units::{PAGE_SIZE, PageRun};

/// Writes pages of guest memory, where it is mapped without a call into the VMM.
pub(crate) struct PageWriter {
    memory: Arc<dyn GuestMemory>,
    layout: Layout,
}

/// The pages of one run, to be written in any order.
pub(crate) struct RunWriter<'a> {
    memory: &'a dyn GuestMemory,
    region: RegionId,
    first: u64,
    count: u64,
    window: Option<Window>,
}

impl PageWriter {
    pub(crate) fn new(memory: Arc<dyn GuestMemory>) -> Self {
        let layout = memory.layout().clone();
        Self { memory, layout }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The pages of a run that lies in one region.
    pub(crate) fn run(&self, run: PageRun) -> Result<RunWriter<'_>, MemoryError> {
        let outside = MemoryError::OutOfBounds { region: RegionId(u32::MAX), offset: run.first.0, len: run.count };
        let (region, first) = self.layout.locate_run(run).ok_or(outside)?;
        let window = self.memory.window(region).filter(|window| {
            let needed = page_offset(first + run.count);
            (window.start.as_ptr() as usize).is_multiple_of(PAGE_SIZE) && window.len as u64 >= needed
        });
        Ok(RunWriter { memory: &*self.memory, region, first, count: run.count, window })
    }

    /// Makes all pages written so far visible to other threads.
    #[allow(clippy::unused_self)] // a writer of another kind would flush here
    pub(crate) fn finish(&self) {
        finish_streaming();
    }
}

impl RunWriter<'_> {
    /// Writes page number `index` of the run; visible to other threads after [`PageWriter::finish`].
    pub(crate) fn write(&self, index: u64, page: &[u8; PAGE_SIZE]) -> Result<(), MemoryError> {
        let offset = page_offset(self.first + index);
        match self.window {
            Some(window) if index < self.count => {
                // SAFETY: the run lies inside the window (checked in `run`), the page inside the run;
                // `GuestMemory` keeps the window mapped, and it is page-aligned.
                unsafe { stream_page(page, window.start.as_ptr().add(offset as usize)) };
                Ok(())
            }
            _ => self.memory.write(self.region, offset, page),
        }
    }
}
