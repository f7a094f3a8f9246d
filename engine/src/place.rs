//! Decoding and placing: checks what a received `Pages` frame names, writes its pages into the
//! destination's memory, and keeps the digest of what lies there.

use std::sync::Arc;

use crate::digest::{HashTable, PageHash, PageHasher};
use crate::encode::{Tally, checksum};
use crate::memory::{GuestMemory, MemoryError, PageWriter};
use crate::units::{PAGE_SIZE, PageNumber, PageRun};
use crate::wire::pages::{self, Coding, Record};
use crate::wire::{FrameBuffer, WireError};

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Why a batch could not be placed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// The frame is not valid.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The destination's memory could not be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Places batches; each lane has one of its own, all share the hash table.
pub struct Placer {
    writer: PageWriter,
    hasher: PageHasher,
    table: Arc<HashTable>,
    records: Vec<Record>,
    hashes: Vec<PageHash>,
}

impl std::fmt::Debug for Placer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Placer").finish_non_exhaustive()
    }
}

impl Placer {
    /// A placer into a guest's memory, which must read as zeros where nothing was placed yet.
    pub fn new(memory: Arc<dyn GuestMemory>, hasher: PageHasher, table: Arc<HashTable>) -> Self {
        Self { writer: PageWriter::new(memory), hasher, table, records: Vec::new(), hashes: Vec::new() }
    }

    /// Whether a frame of kind `Pages` is whole, without placing anything: for a frame whose place in
    /// the order of rounds is odd, which damage could be the reason of.
    pub fn check(&mut self, frame: &FrameBuffer) -> Result<(), WireError> {
        let header = frame.header()?;
        let (head, literals) = pages::decode(frame.body(), self.writer.layout(), &mut self.records)?;
        self.hashes.clear();
        self.hashes.extend(literals.as_chunks::<PAGE_SIZE>().0.iter().map(|page| self.hasher.hash(page)));
        header.verify(checksum(&header, head, &self.hashes))
    }

    /// Checks a frame of kind `Pages` and places its pages.
    ///
    /// Which pages a frame names is checked first. Literal pages are written as they are hashed, while
    /// they are in the cache, and the checksum over records and hashes is compared afterwards: after an
    /// error any page of the guest may hold anything, none counts as placed, and the migration must end.
    pub fn place(&mut self, frame: &FrameBuffer) -> Result<Tally, PlaceError> {
        let header = frame.header()?;
        let (head, literals) = pages::decode(frame.body(), self.writer.layout(), &mut self.records)?;
        self.hashes.clear();
        let (mut literals, _) = literals.as_chunks::<PAGE_SIZE>();
        for record in self.records.iter().filter(|record| record.coding == Coding::Literal) {
            let run = self.writer.run(record.run)?;
            let pages;
            (pages, literals) = literals.split_at(record.run.count as usize);
            for (index, page) in (0..).zip(pages) {
                self.hashes.push(self.hasher.hash(page));
                run.write(index, page)?;
            }
        }
        self.writer.finish();
        header.verify(checksum(&header, head, &self.hashes))?;
        let mut tally = Tally { wire_bytes: frame.bytes().len() as u64, ..Tally::default() };
        self.count_in(&mut tally)?;
        Ok(tally)
    }

    /// Enters the pages of a sound frame in the table, and writes its zero pages.
    fn count_in(&self, tally: &mut Tally) -> Result<(), MemoryError> {
        let mut hashes = self.hashes.iter();
        for record in &self.records {
            match record.coding {
                Coding::Literal => {
                    for (page, hash) in record.run.pages().zip(&mut hashes) {
                        self.note(page, *hash, tally);
                    }
                }
                Coding::Zero => self.place_zeros(record.run, tally)?,
            }
        }
        self.writer.finish();
        Ok(())
    }

    fn place_zeros(&self, run: PageRun, tally: &mut Tally) -> Result<(), MemoryError> {
        tally.zero_pages += run.count;
        let writer = self.writer.run(run)?;
        for (index, page) in (0..).zip(run.pages()) {
            // A page with the zero hash was never written here: it reads as zeros already.
            if self.note(page, PageHash::ZERO, tally) != PageHash::ZERO {
                writer.write(index, &ZERO_PAGE)?;
            }
        }
        Ok(())
    }

    /// Counts a page in; returns its hash before.
    fn note(&self, page: PageNumber, new: PageHash, tally: &mut Tally) -> PageHash {
        let old = self.table.swap(page, new);
        tally.pages += 1;
        tally.digest.replace(page, old, new);
        old
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Planner};
    use crate::digest::{Digest, DigestKey};
    use crate::dirty::{Accumulator, DirtySink};
    use crate::encode::{EncodedBatch, Encoder, digest_runs, populated_runs};
    use crate::memory::{Backing, Layout, MappedMemory, PageReader, Region, RegionId};

    struct Side {
        memory: Arc<MappedMemory>,
        table: Arc<HashTable>,
    }

    fn side() -> Side {
        side_of(vec![Region::ram("low", 0, 100 * 4096), Region::ram("high", 1 << 32, 300 * 4096)])
    }

    fn side_of(regions: Vec<Region>) -> Side {
        let layout = Layout::new(regions).unwrap();
        let table = Arc::new(HashTable::new(layout.page_space()));
        // A memfd: the kernel may give an anonymous mapping a neighbour's huge page, which looks touched.
        Side { memory: Arc::new(MappedMemory::new(layout, Backing::Memfd).unwrap()), table }
    }

    fn hasher() -> PageHasher {
        PageHasher::new(&DigestKey([1; 32]))
    }

    fn batches(side: &Side, pages: &[(u32, std::ops::Range<u64>)]) -> Vec<Batch> {
        let mut dirty = Accumulator::new(side.memory.layout().clone());
        for (region, range) in pages {
            dirty.mark_range(RegionId(*region), range.clone());
        }
        let mut planner = Planner::new(0);
        std::iter::from_fn(|| planner.next_batch(&mut dirty, &mut |_, _, _| Ok(())).unwrap()).collect()
    }

    fn frame_of(encoded: &mut EncodedBatch) -> FrameBuffer {
        let bytes: Vec<u8> = encoded.seal(0).iter().flat_map(|part| part.to_vec()).collect();
        let mut frame = FrameBuffer::new();
        frame.fill(&bytes).unwrap();
        frame
    }

    fn send(source: &Side, destination: &Side, batches: &[Batch]) -> (Digest, Digest) {
        let mut encoder = Encoder::new(source.memory.clone(), hasher(), source.table.clone());
        let mut placer = Placer::new(destination.memory.clone(), hasher(), destination.table.clone());
        let mut encoded = EncodedBatch::default();
        let (mut sent, mut placed) = (Tally::default(), Tally::default());
        for batch in batches {
            encoder.encode(batch, &mut encoded).unwrap();
            sent.add(encoded.tally());
            placed.add(&placer.place(&frame_of(&mut encoded)).unwrap());
        }
        assert_eq!(sent, placed);
        (sent.digest, placed.digest)
    }

    fn full_digest(side: &Side) -> Digest {
        let runs = populated_runs(&*side.memory, 64);
        digest_runs(&PageReader::new(side.memory.clone()), &hasher(), &runs).unwrap()
    }

    #[test]
    fn pages_arrive_identical_and_the_incremental_digest_equals_the_full_one() {
        let (source, destination) = (side(), side());
        for page in (0..300).step_by(3) {
            source.memory.write(RegionId(1), page * 4096 + page, &[page as u8 | 1; 77]).unwrap();
        }
        let all = [(0, 0..100), (1, 0..300)];
        let (first, _) = send(&source, &destination, &batches(&source, &all));
        assert_eq!(first, full_digest(&source));
        assert_eq!(first, full_digest(&destination));
        // One page becomes zero again, one changes, one appears.
        source.memory.write(RegionId(1), 3 * 4096, &ZERO_PAGE).unwrap();
        source.memory.write(RegionId(1), 6 * 4096, b"changed").unwrap();
        source.memory.write(RegionId(0), 5, b"new").unwrap();
        let (second, _) = send(&source, &destination, &batches(&source, &[(1, 3..7), (0, 0..1)]));
        assert_eq!(first.plus(second), full_digest(&source));
        assert_eq!(full_digest(&source), full_digest(&destination));
    }

    #[test]
    fn regions_that_touch_in_the_page_space_arrive_in_one_batch() {
        let regions = vec![Region::ram("low", 0, 64 * 4096), Region::ram("high", 1 << 32, 64 * 4096)];
        let (source, destination) = (side_of(regions.clone()), side_of(regions));
        for (region, page) in [(0, 63), (1, 0)] {
            source.memory.write(RegionId(region), page * 4096, b"edge").unwrap();
        }
        // Once with content on both sides of the border, once with zeros.
        send(&source, &destination, &batches(&source, &[(0, 0..64), (1, 0..64)]));
        for (region, page) in [(0, 63), (1, 0)] {
            source.memory.write(RegionId(region), page * 4096, &ZERO_PAGE).unwrap();
        }
        send(&source, &destination, &batches(&source, &[(0, 62..64), (1, 0..2)]));
        assert_eq!(full_digest(&source), full_digest(&destination));
    }

    #[test]
    fn zero_pages_touch_nothing_at_a_fresh_destination() {
        let (source, destination) = (side(), side());
        source.memory.write(RegionId(0), 0, &vec![0; 100 * 4096]).unwrap();
        send(&source, &destination, &batches(&source, &[(0, 0..100)]));
        assert_eq!(destination.memory.populated(RegionId(0)), Some(vec![]));
    }

    #[test]
    fn a_damaged_frame_is_refused_and_counts_for_nothing() {
        let (source, destination) = (side(), side());
        source.memory.write(RegionId(0), 0, &[7; 3 * 4096]).unwrap();
        let mut encoder = Encoder::new(source.memory.clone(), hasher(), source.table.clone());
        let mut encoded = EncodedBatch::default();
        encoder.encode(&batches(&source, &[(0, 0..5)])[0], &mut encoded).unwrap();
        let whole = frame_of(&mut encoded).bytes().to_vec();
        let mut placer = Placer::new(destination.memory.clone(), hasher(), destination.table.clone());
        for at in (0..whole.len()).step_by(if whole.len() > 5000 { 97 } else { 1 }).chain(0..80) {
            let mut damaged = whole.clone();
            damaged[at] ^= 0x10;
            let mut frame = FrameBuffer::new();
            if frame.fill(&damaged).is_ok() {
                assert!(placer.place(&frame).is_err(), "byte {at}");
            }
        }
        let counted = (0..500).map(PageNumber).filter(|page| destination.table.load(*page) != PageHash::ZERO);
        assert_eq!(counted.count(), 0);
    }

    #[test]
    fn records_outside_memory_over_the_limit_or_descending_are_refused() {
        let destination = side();
        let bodies: [&[u8]; 5] = [
            &[2, 0, 0, 0, 99, 2 << 2],            // 2 pages from page 99: leaves region "low"
            &[2, 0, 0, 0, 110, 1 << 2],           // between the regions
            &[3, 0, 0, 0, 0, 0x84, 4],            // 129 pages
            &[2, 0, 0, 0, 0, 1 << 2 | 3],         // unknown coding
            &[0xFF, 0xFF, 0xFF, 0xFF, 0, 1 << 2], // records longer than the body
        ];
        for body in bodies {
            let mut records = Vec::new();
            assert!(pages::decode(body, destination.memory.layout(), &mut records).is_err(), "{body:?}");
        }
    }
}
