//! Handing a guest's memory over to another process of this host instead of copying it.
//!
//! The description that travels ahead names the memfds; the descriptors themselves come beside the control lane's first frame
//! (`pageferry-unix`). To the engine all regions are [`Transfer::Shared`]; to the guests on both sides they are what they always
//! are. Until the hand-over the destination maps the memory and leaves it alone (R10): the source's guest may run on in it.
#![allow(unsafe_code)]

use std::fs::File;
use std::ops::Range;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{GuestMemory, Layout, LayoutError, MappedMemory, MemoryError, RegionId, Transfer, Window};
use pageferry::vm::VmResult;
use pageferry_unix::{DescriptorId, Descriptors, MAX_DESCRIPTORS};

/// The first byte of a description of a guest whose memory is handed over.
pub(super) const MARK: u8 = b'H';

/// Why a guest's memory cannot be handed over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HandOverError {
    /// The way there carries no descriptors.
    #[error("--hand-over-memory needs a receiver on this host: --to unix:PATH")]
    NotUnix,
    /// Other memory has no descriptor.
    #[error("--hand-over-memory needs memory that another process can map: --backing memfd")]
    NotMemfd,
    /// There is nothing to hash twice.
    #[error("--verify full hashes two memories, and with --hand-over-memory there is only one: leave one of them out")]
    OneMemory,
    /// More regions than descriptors.
    #[error("the guest has {0} regions of memory; {MAX_DESCRIPTORS} can be handed over")]
    TooMany(usize),
    /// A description that names no descriptors.
    #[error("the description of the memory that is handed over is not valid: {0}")]
    Description(&'static str),
    /// Descriptors that did not come.
    #[error("the descriptor of memory region {0:?} has not come with the guest; both ends must be on one host")]
    Missing(String),
    /// A listener that takes none.
    #[error("a guest's memory can be handed over only to a receiver that listens on unix:PATH")]
    NoDescriptors,
}

/// A guest's memory as the engine is to see it: the same on both sides.
pub(super) struct SharedView {
    memory: Arc<dyn GuestMemory>,
    layout: Layout,
}

// SAFETY: the windows are those of `memory`, which this keeps alive.
unsafe impl GuestMemory for SharedView {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn window(&self, region: RegionId) -> Option<Window> {
        self.memory.window(region)
    }

    fn file(&self, region: RegionId) -> Option<BorrowedFd<'_>> {
        self.memory.file(region)
    }

    fn populated(&self, _region: RegionId) -> Option<Vec<Range<u64>>> {
        Some(Vec::new())
    }

    fn discard(&self, _region: RegionId, _pages: Range<u64>) -> Result<(), MemoryError> {
        Err(MemoryError::Unsupported("giving back memory that is another process's too"))
    }
}

impl SharedView {
    pub(super) fn new(memory: Arc<dyn GuestMemory>) -> Result<Self, LayoutError> {
        let layout = with_transfer(memory.layout(), Transfer::Shared)?;
        Ok(Self { memory, layout })
    }
}

fn with_transfer(layout: &Layout, transfer: Transfer) -> Result<Layout, LayoutError> {
    let regions = layout.regions().iter().cloned().map(|mut region| {
        region.transfer = transfer;
        region
    });
    Layout::new(regions.collect())
}

/// Whether a layout is one of memory that is handed over, all of it.
pub(super) fn is_shared(layout: &Layout) -> bool {
    layout.regions().iter().all(|region| region.transfer == Transfer::Shared)
}

/// What the source hands over: names for the description, and the descriptors.
pub(super) fn offer(memory: &dyn GuestMemory) -> VmResult<(Vec<u8>, Vec<OwnedFd>)> {
    let regions: Vec<_> = memory.layout().iter().filter(|(_, region)| region.len > 0).collect();
    if regions.len() > MAX_DESCRIPTORS {
        return Err(HandOverError::TooMany(regions.len()).into());
    }
    let (mut names, mut descriptors) = (vec![MARK, regions.len() as u8], Vec::new());
    for (id, _) in regions {
        let file = memory.file(id).ok_or(HandOverError::NotMemfd)?;
        let DescriptorId { device, inode } = DescriptorId::of(file)?;
        names.extend_from_slice(&device.to_le_bytes());
        names.extend_from_slice(&inode.to_le_bytes());
        descriptors.push(file.try_clone_to_owned()?);
    }
    Ok((names, descriptors))
}

/// Reads the names behind [`MARK`]; returns the rest of the description, too.
fn names(description: &[u8]) -> Result<(Vec<DescriptorId>, &[u8]), HandOverError> {
    let Some((&count, rest)) = description.split_first() else {
        return Err(HandOverError::Description("it is empty"));
    };
    let len = usize::from(count) * 16;
    if usize::from(count) > MAX_DESCRIPTORS || rest.len() < len {
        return Err(HandOverError::Description("it has another length than it says"));
    }
    let (names, rest) = rest.split_at(len);
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).unwrap_or_default();
    let name = |bytes: &[u8]| DescriptorId { device: number(&bytes[..8]), inode: number(&bytes[8..]) };
    Ok((names.chunks_exact(16).map(name).collect(), rest))
}

/// What the destination takes: the memory, mapped and untouched, and the guest's own description.
pub(super) fn take<'a>(
    description: &'a [u8],
    layout: &Layout,
    descriptors: Option<&Descriptors>,
) -> VmResult<(Arc<MappedMemory>, &'a [u8])> {
    let descriptors = descriptors.ok_or(HandOverError::NoDescriptors)?;
    let (names, rest) = names(description)?;
    let regions: Vec<_> = layout.regions().iter().filter(|region| region.len > 0).collect();
    if !is_shared(layout) || names.len() != regions.len() {
        return Err(HandOverError::Description("it does not fit the memory layout").into());
    }
    let files = regions.into_iter().zip(names).map(|(region, name)| {
        let descriptor = descriptors.take(name);
        descriptor.map(File::from).ok_or_else(|| HandOverError::Missing(region.name.clone()))
    });
    let files = files.collect::<Result<_, _>>()?;
    let memory = MappedMemory::from_files(with_transfer(layout, Transfer::Copy)?, files)?;
    Ok((Arc::new(memory), rest))
}

/// Tracks nothing: what is not copied cannot be missed.
pub(super) struct NothingToTrack;

impl DirtySource for NothingToTrack {
    fn start(&mut self, _layout: &Layout) -> VmResult<()> {
        Ok(())
    }

    fn harvest(&mut self, _point: Point, _sink: &mut dyn DirtySink) -> VmResult<()> {
        Ok(())
    }

    fn stop(&mut self) -> VmResult<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use pageferry::memory::{Backing, Region};

    use super::*;

    fn memory(backing: Backing) -> MappedMemory {
        let regions =
            vec![Region::ram("low", 0, 1 << 20), Region::ram("none", 1 << 30, 0), Region::ram("high", 1 << 32, 4096)];
        MappedMemory::new(Layout::new(regions).unwrap(), backing).unwrap()
    }

    fn refusal(description: &[u8], layout: &Layout, descriptors: Option<&Descriptors>) -> String {
        match take(description, layout, descriptors) {
            Ok(_) => panic!("it was taken"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn only_memfds_are_offered_each_with_its_name() {
        let (description, descriptors) = offer(&memory(Backing::Memfd)).unwrap();
        assert_eq!((description[0], description[1], description.len(), descriptors.len()), (MARK, 2, 34, 2));
        let (names, rest) = names(&description[1..]).unwrap();
        assert!(rest.is_empty());
        for (name, descriptor) in names.into_iter().zip(&descriptors) {
            assert_eq!(name, DescriptorId::of(descriptor).unwrap());
        }
        assert!(offer(&memory(Backing::Anonymous)).unwrap_err().to_string().contains("--backing memfd"));
    }

    #[test]
    fn what_was_not_handed_over_is_not_taken() {
        let ours = Arc::new(memory(Backing::Memfd));
        let shared = SharedView::new(ours.clone()).unwrap().layout;
        let (description, _) = offer(&*ours).unwrap();
        let nothing = Descriptors::default();
        assert!(refusal(&description[1..], &shared, None).contains("unix:PATH"));
        assert!(refusal(&description[1..], &shared, Some(&nothing)).contains("\"low\""));
        assert!(refusal(&description[1..], ours.layout(), Some(&nothing)).contains("does not fit"));
        assert!(refusal(&[1; 17], &shared, Some(&nothing)).contains("does not fit"));
        for len in 0..description.len() - 1 {
            assert!(refusal(&description[1..=len], &shared, Some(&nothing)).contains("not valid"), "{len}");
        }
        assert!(refusal(&[255; 5000], &shared, Some(&nothing)).contains("not valid"));
    }
}
