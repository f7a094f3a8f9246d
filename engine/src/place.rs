//! Decoding and placing: checks what a received `Pages` frame names, writes its pages into the
//! destination's memory, and keeps the digest of what lies there.

use std::sync::Arc;

use zstd::bulk::Decompressor;

use crate::delta;
use crate::digest::{HashTable, PageHash, PageHasher};
use crate::encode::{Tally, checksum};
use crate::memory::{GuestMemory, MemoryError, PageReader, PageWriter};
use crate::units::{PAGE_SIZE, PageNumber, PageRun};
use crate::wire::pages::{self, Body, Coding, Packing, Record};
use crate::wire::{FrameBuffer, WireError};

const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Why a batch could not be placed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlaceError {
    /// The frame is not valid.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The destination's memory could not be read or written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// Places batches; each lane has one of its own, all share the hash table.
pub struct Placer {
    ground: Ground,
    exposed: bool,
    records: Vec<Record>,
    hashes: Hashes,
    unpacker: Unpacker,
}

/// The destination's memory, and what is known of it.
struct Ground {
    reader: PageReader,
    writer: PageWriter,
    hasher: PageHasher,
    table: Arc<HashTable>,
}

impl std::fmt::Debug for Placer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Placer").finish_non_exhaustive()
    }
}

impl Placer {
    /// A placer into a guest's memory, which must read as zeros where nothing was placed yet.
    pub fn new(memory: Arc<dyn GuestMemory>, hasher: PageHasher, table: Arc<HashTable>) -> Self {
        let reader = PageReader::new(Arc::clone(&memory));
        let ground = Ground { reader, writer: PageWriter::new(memory), hasher, table };
        let hashes = Hashes::default();
        Self { ground, exposed: false, records: Vec::new(), hashes, unpacker: Unpacker::default() }
    }

    /// Whether the source may write pages into the memory by itself, and only name them in frames.
    #[must_use]
    pub fn exposed(mut self, exposed: bool) -> Self {
        self.exposed = exposed;
        self
    }

    /// Checks a frame of kind `Pages` and places its pages.
    ///
    /// Which pages a frame names is checked first. Pages are written as they are hashed, while they are in
    /// the cache, and the checksum over records and hashes is compared afterwards: after an error any page
    /// of the guest may hold anything, none counts as placed, and the migration must end.
    pub fn place(&mut self, frame: &FrameBuffer) -> Result<Tally, PlaceError> {
        let header = frame.header()?;
        let Self { ground, exposed, records, hashes, unpacker } = self;
        let body = pages::decode(frame.body(), ground.writer.layout(), records)?;
        if !*exposed && records.iter().any(|record| record.coding == Coding::Written) {
            return Err(WireError::NotExposed.into());
        }
        let payload = unpacker.unpack(&body)?;
        let mut contents = Contents::of(records, payload)?;
        hashes.clear();
        for record in records.iter() {
            ground.place_run(*record, &mut contents, hashes)?;
        }
        contents.end()?;
        ground.writer.finish();
        header.verify(checksum(&header, body.head, &hashes.checked))?;
        let written = (hashes.landed.len() * PAGE_SIZE) as u64;
        let mut tally = Tally { wire_bytes: frame.bytes().len() as u64 + written, ..Tally::default() };
        ground.count_in(records, hashes, &mut tally)?;
        Ok(tally)
    }
}

impl Ground {
    /// Writes the pages of a record, except zero pages, and adds their hashes.
    fn place_run(&self, record: Record, contents: &mut Contents<'_>, hashes: &mut Hashes) -> Result<(), PlaceError> {
        let run = self.writer.run(record.run)?;
        for (index, page) in (0..).zip(record.run.pages()) {
            match record.coding {
                Coding::Zero => return Ok(()),
                Coding::Literal => {
                    let bytes = contents.literal()?;
                    hashes.checked.push(self.hasher.hash(bytes));
                    run.write(index, bytes)?;
                    continue;
                }
                Coding::Written => {
                    hashes.landed.push(self.hash(&self.read(page)?));
                    continue;
                }
                _ => {}
            }
            let bytes = match record.coding {
                Coding::Copy { from } => self.read(PageNumber(from.0 + index))?,
                Coding::Pattern => contents.pattern()?,
                _ => contents.apply_delta(page, self.read(page)?)?,
            };
            hashes.checked.push(self.hash(&bytes));
            run.write(index, &bytes)?;
        }
        Ok(())
    }

    /// A page as it lies here.
    fn read(&self, page: PageNumber) -> Result<[u8; PAGE_SIZE], MemoryError> {
        let mut bytes = [0; PAGE_SIZE];
        self.reader.read_run(PageRun { first: page, count: 1 }, |_, read| {
            if read(&mut bytes)? {
                bytes = ZERO_PAGE;
            }
            Ok(())
        })?;
        Ok(bytes)
    }

    fn hash(&self, bytes: &[u8; PAGE_SIZE]) -> PageHash {
        if *bytes == ZERO_PAGE { PageHash::ZERO } else { self.hasher.hash(bytes) }
    }

    /// Enters the pages of a sound frame in the table, and writes its zero pages.
    fn count_in(&self, records: &[Record], hashes: &Hashes, tally: &mut Tally) -> Result<(), MemoryError> {
        let (mut checked, mut landed) = (hashes.checked.iter(), hashes.landed.iter());
        for record in records {
            if record.coding == Coding::Zero {
                self.place_zeros(record.run, tally)?;
                continue;
            }
            let hashes = if record.coding == Coding::Written { &mut landed } else { &mut checked };
            for (page, hash) in record.run.pages().zip(hashes) {
                self.note(page, *hash, tally);
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

/// What the pages of a frame became.
#[derive(Default)]
struct Hashes {
    /// Of pages that the frame's checksum covers.
    checked: Vec<PageHash>,
    /// Of pages that the source has written: the guest may have changed them meanwhile.
    landed: Vec<PageHash>,
}

impl Hashes {
    fn clear(&mut self) {
        self.checked.clear();
        self.landed.clear();
    }
}

/// Unpacks payloads into a buffer that never grows past the largest.
#[derive(Default)]
struct Unpacker {
    decompressor: Option<Decompressor<'static>>,
    payload: Vec<u8>,
}

impl Unpacker {
    fn unpack<'a>(&'a mut self, body: &Body<'a>) -> Result<&'a [u8], PlaceError> {
        if body.packing == Packing::Raw {
            return Ok(body.packed);
        }
        let decompressor = match &mut self.decompressor {
            Some(decompressor) => decompressor,
            empty => empty.insert(Decompressor::new().map_err(MemoryError::Packing)?),
        };
        // A slice, so that nothing beyond the announced length can be written (R17).
        self.payload.resize(body.payload_len.max(self.payload.len()), 0);
        let room = &mut self.payload[..body.payload_len];
        if zstd::zstd_safe::find_frame_compressed_size(body.packed) != Ok(body.packed.len()) {
            return Err(WireError::Payload("it is not one zstd frame".to_owned()).into());
        }
        match decompressor.decompress_to_buffer(body.packed, room) {
            Ok(len) if len == body.payload_len => Ok(&self.payload[..len]),
            Ok(len) => {
                Err(WireError::Payload(format!("it has {len} bytes where {} were announced", body.payload_len)).into())
            }
            Err(error) => Err(WireError::Payload(error.to_string()).into()),
        }
    }
}

/// The parts of a payload, taken off in the order of the records.
struct Contents<'a> {
    literals: &'a [[u8; PAGE_SIZE]],
    /// What deltas and patterns need.
    rest: &'a [u8],
}

impl<'a> Contents<'a> {
    fn of(records: &[Record], payload: &'a [u8]) -> Result<Self, WireError> {
        let literal = |record: &&Record| record.coding == Coding::Literal;
        let count: u64 = records.iter().filter(literal).map(|record| record.run.count).sum();
        let literals = payload.split_at_checked(count as usize * PAGE_SIZE);
        let (literals, rest) = literals.ok_or(WireError::Truncated("literal pages"))?;
        Ok(Self { literals: literals.as_chunks().0, rest })
    }

    fn literal(&mut self) -> Result<&'a [u8; PAGE_SIZE], WireError> {
        let (page, left) = self.literals.split_first().ok_or(WireError::Truncated("literal pages"))?;
        self.literals = left;
        Ok(page)
    }

    fn apply_delta(&mut self, page: PageNumber, mut bytes: [u8; PAGE_SIZE]) -> Result<[u8; PAGE_SIZE], WireError> {
        let used = delta::apply(&mut bytes, self.rest).map_err(|source| WireError::Delta { page, source })?;
        self.rest = self.rest.get(used..).ok_or(WireError::Truncated("deltas"))?;
        Ok(bytes)
    }

    fn pattern(&mut self) -> Result<[u8; PAGE_SIZE], WireError> {
        let (word, left) = self.rest.split_first_chunk::<8>().ok_or(WireError::Truncated("patterns"))?;
        self.rest = left;
        let mut bytes = [0; PAGE_SIZE];
        bytes.as_chunks_mut().0.fill(*word);
        Ok(bytes)
    }

    /// Everything was used.
    fn end(&self) -> Result<(), WireError> {
        if self.rest.is_empty() { Ok(()) } else { Err(WireError::Trailing(self.rest.len())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Batch, Planner};
    use crate::digest::{Digest, DigestKey};
    use crate::dirty::{Accumulator, DirtySink};
    use crate::encode::{Choice, EncodedBatch, Encoder, Shared, digest_runs, populated_runs};
    use crate::memory::{Backing, Layout, MappedMemory, PageReader, Region, RegionId};
    use crate::stats::Stages;
    use crate::wire::{Header, Kind};

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
        let mut encoder = Encoder::new(source.memory.clone(), hasher(), Arc::new(Shared::plain(source.table.clone())));
        let mut placer = Placer::new(destination.memory.clone(), hasher(), destination.table.clone());
        let mut encoded = EncodedBatch::default();
        let (mut sent, mut placed) = (Tally::default(), Tally::default());
        for batch in batches {
            encoder.encode(batch, Choice::default(), &mut encoded).unwrap();
            sent.add(&Tally { stages: Stages::default(), ..*encoded.tally() });
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
    fn a_payload_of_more_than_one_zstd_frame_is_refused() {
        let mut placer = Placer::new(side().memory, hasher(), side().table);
        let empty = zstd::bulk::compress(&[], 1).unwrap();
        let skippable = [&0x184D_2A50_u32.to_le_bytes()[..], &[1, 0, 0, 0, 7]].concat();
        let mut place = |payload: &[u8]| {
            let head = [5, 0, 0, 0, 1, 0, 0, 0, 0];
            let body = [&head, payload].concat();
            let mut header =
                Header { kind: Kind::Pages, body_len: body.len() as u32, step: 0, sequence: 0, checksum: 0 };
            header.checksum = checksum(&header, &head, &[]);
            let mut frame = FrameBuffer::new();
            frame.fill(&[&header.encode(), &body[..]].concat()).unwrap();
            placer.place(&frame)
        };
        assert_eq!(place(&empty).unwrap().pages, 0);
        for payload in [[&empty[..], &empty].concat(), [&empty[..], &skippable].concat(), Vec::new()] {
            assert!(matches!(place(&payload), Err(PlaceError::Wire(WireError::Payload(_)))));
        }
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
    fn copies_of_pages_on_both_sides_of_a_region_border_arrive() {
        let regions = vec![Region::ram("low", 0, 64 * 4096), Region::ram("high", 1 << 32, 64 * 4096)];
        let (source, destination) = (side_of(regions.clone()), side_of(regions));
        let mut dirty = Accumulator::new(source.memory.layout().clone());
        for (region, page, text) in [(0, 63, b"last"), (1, 0, b"next"), (1, 10, b"last"), (1, 11, b"next")] {
            source.memory.write(RegionId(region), page * 4096, text).unwrap();
            dirty.mark_range(RegionId(region), page..page + 1);
        }
        let shared = Shared::new(source.table.clone(), 128, &crate::EncodeConfig::default());
        let mut encoder = Encoder::new(source.memory.clone(), hasher(), Arc::new(shared));
        let mut placer = Placer::new(destination.memory.clone(), hasher(), destination.table.clone());
        let (mut planner, mut encoded, mut copied) = (Planner::new(0), EncodedBatch::default(), 0);
        loop {
            while let Some(batch) = planner.next_batch(&mut dirty, &mut |_, _, _| Ok(())).unwrap() {
                encoder.encode(&batch, Choice::default(), &mut encoded).unwrap();
                planner.defer(source.memory.layout(), encoded.deferred());
                copied += encoded.tally().stages.copied_pages;
                placer.place(&frame_of(&mut encoded)).unwrap();
            }
            if !planner.begin_copies() {
                break;
            }
        }
        assert_eq!(copied, 2);
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
        let content: Vec<u8> = (0..3 * 4096).map(|at| (at % 251) as u8).collect();
        source.memory.write(RegionId(0), 0, &content).unwrap();
        let mut encoder = Encoder::new(source.memory.clone(), hasher(), Arc::new(Shared::plain(source.table.clone())));
        let mut encoded = EncodedBatch::default();
        encoder.encode(&batches(&source, &[(0, 0..5)])[0], Choice::default(), &mut encoded).unwrap();
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
        // Each with its head's length, not packed, and the payload's length in front.
        let bodies: [&[u8]; 8] = [
            &[7, 0, 0, 0, 0, 0, 0, 0, 0, 99, 2 << 3], // 2 pages from page 99: leaves region "low"
            &[7, 0, 0, 0, 0, 0, 0, 0, 0, 110, 1 << 3], // between the regions
            &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x88, 8], // 129 pages
            &[7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 3 | 7], // unknown coding
            &[0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0, 0, 0, 1 << 3], // head longer than the body
            &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1 << 3 | 4, 100], // a copy from between the regions
            &[7, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1 << 3 | 1], // 16 MiB announced for one page
            &[7, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1 << 3],  // unknown packing
        ];
        for body in bodies {
            let mut records = Vec::new();
            assert!(pages::decode(body, destination.memory.layout(), &mut records).is_err(), "{body:?}");
        }
    }
}
