//! Guests without a machine: memory, and the engine's two traits around it.

use std::io::{Read, Write};
use std::sync::Arc;

use pageferry::dirty::{DirtySink, DirtySource, Point};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId, Window};
use pageferry::vm::VmResult;
use pageferry::{DestinationVm, SourceVm};

use crate::{BenchError, host};

/// Bytes written or compared at a time.
const STRIDE: usize = 1 << 20;

/// The one region of the guests here.
pub(crate) const RAM: RegionId = RegionId(0);

/// Memory of one region, not touched yet.
pub(crate) fn memory(bytes: u64) -> Result<Arc<MappedMemory>, BenchError> {
    let layout = Layout::new(vec![Region::ram("ram", 0, bytes)])?;
    Ok(Arc::new(MappedMemory::new(layout, Backing::Anonymous).map_err(host("cannot map memory"))?))
}

/// Memory of one region, all of it present.
pub(crate) fn prefaulted(bytes: u64) -> Result<Arc<MappedMemory>, BenchError> {
    let memory = memory(bytes)?;
    memory.prefault().map_err(host("cannot touch memory"))?;
    Ok(memory)
}

pub(crate) fn len(memory: &MappedMemory) -> u64 {
    memory.layout().region(RAM).map_or(0, |region| region.len)
}

pub(crate) fn window(memory: &MappedMemory) -> Result<Window, BenchError> {
    memory.window(RAM).ok_or_else(|| BenchError::Skipped("the memory is empty".to_owned()))
}

/// Pages of the memory that are present.
pub(crate) fn present_pages(memory: &MappedMemory) -> u64 {
    memory.populated(RAM).unwrap_or_default().iter().map(|pages| pages.end - pages.start).sum()
}

/// Random bytes from a seed.
#[derive(Debug)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number from 0 to below 1.
    pub(crate) fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    pub(crate) fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Fills the memory with bytes that no codec can shorten.
pub(crate) fn fill_random(memory: &MappedMemory, seed: u64) -> Result<(), BenchError> {
    let mut random = Random::new(seed);
    let mut buffer = vec![0; STRIDE];
    strides(memory).try_for_each(|(offset, len)| {
        random.fill(&mut buffer[..len]);
        Ok(memory.write(RAM, offset, &buffer[..len])?)
    })
}

/// Fills the memory with zeros; its pages stay present.
pub(crate) fn clear(memory: &MappedMemory) -> Result<(), BenchError> {
    let zeros = vec![0; STRIDE];
    strides(memory).try_for_each(|(offset, len)| Ok(memory.write(RAM, offset, &zeros[..len])?))
}

/// A number that depends on every byte of the memory and on its place: equal memories have equal
/// fingerprints, and unequal ones do not by chance. Independent of the engine's own digest.
pub(crate) fn fingerprint(memory: &MappedMemory) -> Result<u64, BenchError> {
    let mut lanes = [1u64, 2, 3, 4];
    let mut buffer = vec![0; STRIDE];
    for (offset, len) in strides(memory) {
        memory.read(RAM, offset, &mut buffer[..len])?;
        for block in buffer[..len].chunks_exact(32) {
            for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
                let word = word.try_into().map_or(0, u64::from_le_bytes);
                *lane = (lane.rotate_left(29) ^ word).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            }
        }
    }
    Ok(lanes.iter().fold(0, |sum: u64, lane| (sum.rotate_left(31) ^ lane).wrapping_mul(0xD6E8_FEB8_6659_FD93)))
}

fn strides(memory: &MappedMemory) -> impl Iterator<Item = (u64, usize)> + use<> {
    let len = len(memory);
    (0..len).step_by(STRIDE).map(move |offset| (offset, STRIDE.min((len - offset) as usize)))
}

/// A guest that writes nothing, paused or running.
#[derive(Debug)]
pub(crate) struct StillGuest {
    memory: Arc<MappedMemory>,
    running: bool,
    tracker: NoWrites,
}

impl StillGuest {
    pub(crate) fn new(memory: Arc<MappedMemory>, running: bool) -> Self {
        Self { memory, running, tracker: NoWrites }
    }
}

impl SourceVm for StillGuest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.memory.clone()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.tracker
    }

    fn describe(&mut self, _out: &mut dyn Write) -> VmResult<()> {
        Ok(())
    }

    fn is_running(&self) -> bool {
        self.running
    }

    fn pause(&mut self) -> VmResult<()> {
        Ok(())
    }

    fn resume(&mut self) -> VmResult<()> {
        Ok(())
    }

    fn save(&mut self, _out: &mut dyn Write) -> VmResult<()> {
        Ok(())
    }
}

/// The tracker of a guest that writes nothing.
#[derive(Debug)]
struct NoWrites;

impl DirtySource for NoWrites {
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

/// Room for a guest: memory that stands ready, or memory made when the guest comes.
#[derive(Debug, Default)]
pub(crate) struct Room(pub(crate) Option<Arc<MappedMemory>>);

impl DestinationVm for Room {
    fn prepare(&mut self, _config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let memory = match self.0.take() {
            Some(memory) => memory,
            None => Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous)?),
        };
        Ok(self.0.insert(memory).clone())
    }

    fn load(&mut self, _state: &mut dyn Read) -> VmResult<()> {
        Ok(())
    }

    fn commit(&mut self, _run: bool) -> VmResult<()> {
        Ok(())
    }

    fn abort(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fingerprints_see_every_byte_and_its_place() {
        let memory = memory(3 << 20).unwrap();
        fill_random(&memory, 7).unwrap();
        let first = fingerprint(&memory).unwrap();
        assert_eq!(fingerprint(&memory).unwrap(), first);
        let mut byte = [0];
        memory.read(RAM, 2_000_001, &mut byte).unwrap();
        memory.write(RAM, 2_000_001, &[byte[0] ^ 1]).unwrap();
        assert_ne!(fingerprint(&memory).unwrap(), first);
        fill_random(&memory, 7).unwrap();
        assert_eq!(fingerprint(&memory).unwrap(), first);
        clear(&memory).unwrap();
        assert_ne!(fingerprint(&memory).unwrap(), first);
        assert_eq!(present_pages(&memory), 768);
    }
}
