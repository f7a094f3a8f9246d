//! KVM's dirty log as the engine's tracker of writes.

use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{Layout, RegionId};
use pageferry::vm::VmResult;

/// How writes are logged.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DirtyLogMode {
    /// The best that the host has.
    #[default]
    Best,
    /// Manual protection, all bits set at first: nothing is write-protected until it is re-armed.
    ManualInitiallySet,
    /// Manual protection, all pages write-protected at the start.
    Manual,
    /// A harvest write-protects what it reports.
    Plain,
}

/// The dirty log of a machine's memory slots, and the VMM's own writes.
#[derive(Debug)]
pub struct DirtyLog {}

impl DirtySource for DirtyLog {
    fn start(&mut self, _layout: &Layout) -> VmResult<()> {
        todo!()
    }

    fn harvest(&mut self, _point: Point, _sink: &mut dyn DirtySink) -> VmResult<()> {
        todo!()
    }

    fn rearm(&mut self, _region: RegionId, _first_page: u64, _words: &[u64]) -> VmResult<()> {
        todo!()
    }

    fn stop(&mut self) -> VmResult<()> {
        todo!()
    }
}
