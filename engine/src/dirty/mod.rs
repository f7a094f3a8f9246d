//! Which pages must (still) be sent: the tracker's seam ([`DirtySource`], [`DirtySink`]) and the
//! engine's own accumulator of what trackers reported ([`Accumulator`]).

mod accumulator;
mod bitmap;
mod page_set;
mod write_log;

pub use accumulator::Accumulator;
pub use bitmap::PageBitmap;
pub use page_set::PageSet;
pub use write_log::WriteLog;

use std::ops::Range;

use crate::memory::{Layout, RegionId};
use crate::vm::VmResult;

/// When dirty bits are taken. A tracker may do more at the later ones (flush a dirty ring, ask
/// devices that report only when stopped).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Point {
    /// The guest runs; what is written from now on must be reported next time.
    Running,
    /// The guest is paused.
    Stopped,
    /// The machine state was saved, which may have written guest memory.
    AfterSave,
}

/// A tracker of writes to guest memory: KVM's dirty log, write-protected mappings, a device's log.
pub trait DirtySource {
    /// Starts reporting. On return, every write that happens later will be reported.
    fn start(&mut self, layout: &Layout) -> VmResult<()>;

    /// Reports all pages written since they were last armed. Reporting may forget: the engine keeps
    /// every bit until the page is safe at the destination (R1).
    fn harvest(&mut self, point: Point, sink: &mut dyn DirtySink) -> VmResult<()>;

    /// Arms pages again, just before they are read (R2). Bit `i` of `words[w]` stands for the page
    /// `first_page + 64 * w + i` of the region; `first_page` is a multiple of 64, and bits past the
    /// region's end are clear. Trackers that arm in `harvest` do nothing here.
    fn rearm(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> VmResult<()> {
        let _ = (region, first_page, words);
        Ok(())
    }

    /// Stops tracking; the guest runs at full speed again.
    fn stop(&mut self) -> VmResult<()>;
}

/// Where a tracker reports to. Bits are only ever added.
pub trait DirtySink {
    /// A run of bitmap words: bit `i` of `words[w]` is page `first_page + 64 * w + i` of the region.
    /// `first_page` is a multiple of 64. Bits past the region's end are ignored.
    fn mark_words(&mut self, region: RegionId, first_page: u64, words: &[u64]);

    /// A run of pages of a region. What lies past its end is ignored.
    fn mark_range(&mut self, region: RegionId, pages: Range<u64>);

    /// Guest-physical bytes, as vhost-user and VFIO report them. What lies in no region is ignored.
    fn mark_gpa(&mut self, guest_address: u64, len: u64);

    /// Pages that were given back and read as zeros now (balloon, discard): no tracker sees that (R9). Report it after it
    /// was done. From then on the page's content travels through the engine, never straight from guest memory.
    fn mark_zeroed(&mut self, region: RegionId, pages: Range<u64>);
}

/// Several trackers as one: the VMM's own log, and one per device process.
#[derive(Default)]
pub struct Merged(pub Vec<Box<dyn DirtySource>>);

impl std::fmt::Debug for Merged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Merged({} trackers)", self.0.len())
    }
}

impl DirtySource for Merged {
    fn start(&mut self, layout: &Layout) -> VmResult<()> {
        for started in 0..self.0.len() {
            if let Err(error) = self.0[started].start(layout) {
                for tracker in &mut self.0[..started] {
                    // The first error is the one to report; this is best effort.
                    let _ = tracker.stop();
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn harvest(&mut self, point: Point, sink: &mut dyn DirtySink) -> VmResult<()> {
        self.0.iter_mut().try_for_each(|tracker| tracker.harvest(point, sink))
    }

    fn rearm(&mut self, region: RegionId, first_page: u64, words: &[u64]) -> VmResult<()> {
        self.0.iter_mut().try_for_each(|tracker| tracker.rearm(region, first_page, words))
    }

    fn stop(&mut self) -> VmResult<()> {
        let results: Vec<_> = self.0.iter_mut().map(|tracker| tracker.stop()).collect();
        results.into_iter().collect()
    }
}
