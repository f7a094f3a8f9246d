//! Whatever a guest writes, and in whatever order batches of a step arrive: both memories are the same
//! after every round, and every way to give a page is used.
#![allow(missing_docs)]

use std::sync::Arc;

use pageferry::EncodeConfig;
use pageferry::batch::{Batch, Phase, Planner};
use pageferry::digest::{Digest, DigestKey, HashTable, PageHasher};
use pageferry::dirty::{Accumulator, DirtySink};
use pageferry::encode::{Choice, EncodedBatch, Encoder, Level, Shared};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::place::{PlaceError, Placer};
use pageferry::stats::Stages;
use pageferry::transport::DirectRun;
use pageferry::wire::{FrameBuffer, WireError};

const PAGE: usize = 4096;
const PAGES: u64 = 600;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 20
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

struct Source {
    memory: Arc<MappedMemory>,
    dirty: Accumulator,
    encoders: Vec<Encoder>,
    digest: Digest,
    stages: Stages,
    written: u64,
}

struct Destination {
    memory: Arc<MappedMemory>,
    placers: Vec<Placer>,
    digest: Digest,
}

fn memory() -> Arc<MappedMemory> {
    let layout = Layout::new(vec![
        Region::ram("low", 0, 100 * PAGE as u64),
        Region::ram("high", 1 << 32, (PAGES - 100) * PAGE as u64),
    ]);
    Arc::new(MappedMemory::new(layout.unwrap(), Backing::Memfd).unwrap())
}

fn hasher() -> PageHasher {
    PageHasher::new(&DigestKey([9; 32]))
}

fn sides(config: &EncodeConfig) -> (Source, Destination) {
    let (ours, theirs) = (memory(), memory());
    let table = || Arc::new(HashTable::new(ours.layout().page_space()));
    let shared = Arc::new(Shared::new(table(), PAGES, config));
    let encoders = (0..3).map(|_| Encoder::new(ours.clone(), hasher(), shared.clone())).collect();
    let table = table();
    let placers = (0..2).map(|_| Placer::new(theirs.clone(), hasher(), table.clone()).exposed(true)).collect();
    let dirty = Accumulator::new(ours.layout().clone());
    let source =
        Source { memory: ours, dirty, encoders, digest: Digest::default(), stages: Stages::default(), written: 0 };
    (source, Destination { memory: theirs, placers, digest: Digest::default() })
}

fn location(page: u64) -> (RegionId, u64) {
    if page < 100 { (RegionId(0), page) } else { (RegionId(1), page - 100) }
}

impl Source {
    fn read(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        let (region, index) = location(page);
        self.memory.read(region, index * PAGE as u64, &mut bytes).unwrap();
        bytes
    }

    fn write(&mut self, page: u64, offset: usize, bytes: &[u8]) {
        let (region, index) = location(page);
        self.memory.write(region, index * PAGE as u64 + offset as u64, bytes).unwrap();
        self.dirty.mark_range(region, index..index + 1);
    }

    /// One of the things that guests do to a page.
    fn disturb(&mut self, random: &mut Random) {
        let page = random.below(PAGES);
        match random.below(8) {
            0 => self.write(page, 0, &[0; PAGE]),
            1 | 2 => self.write(page, random.below(4088) as usize, &random.next().to_le_bytes()),
            3 => {
                let other = self.read(random.below(PAGES));
                self.write(page, 0, &other);
            }
            4 => {
                let (other, mine, theirs) = (random.below(PAGES), self.read(page), page);
                let content = self.read(other);
                self.write(theirs, 0, &content);
                self.write(other, 0, &mine);
            }
            5 => {
                let same = self.read(page);
                self.write(page, 0, &same);
            }
            6 => self.write(page, 0, &random.next().to_le_bytes().repeat(512)),
            _ => {
                let text: Vec<u8> = (0..PAGE).map(|_| b"etaoin shrdlu"[random.below(13) as usize]).collect();
                self.write(page, 0, &text);
            }
        }
    }

    /// Sends a round as drivers do: all of a step before any of the next, in any order within it. The
    /// guest writes meanwhile.
    fn send(&mut self, round: u32, to: &mut Destination, random: &mut Random, busy: bool) {
        let mut planner = if busy { Planner::patient(round, 5) } else { Planner::new(round) };
        loop {
            let mut batches = Vec::new();
            while let Some(batch) = planner.next_batch(&mut self.dirty, &mut |_, _, _| Ok(())).unwrap() {
                if busy && matches!(batch.phase, Phase::Contents) && random.below(30) == 0 {
                    // The user wants the switch-over now.
                    planner.abandon();
                    batch.runs.iter().for_each(|run| self.dirty.give_back(*run));
                } else {
                    batches.push(batch);
                }
                if busy {
                    planner.watch_ahead(&mut self.dirty, &mut |_, _, _| Ok(())).unwrap();
                    for _ in 0..random.below(40) {
                        self.disturb(random);
                    }
                }
            }
            let mut frames = Vec::new();
            while !batches.is_empty() {
                let batch = batches.swap_remove(random.below(batches.len() as u64) as usize);
                frames.extend(self.encode(&batch, &mut planner, random, busy));
                if busy {
                    self.disturb(random);
                }
            }
            while !frames.is_empty() {
                let (frame, written) = frames.swap_remove(random.below(frames.len() as u64) as usize);
                for run in written {
                    self.write_directly(run, to);
                }
                if busy {
                    self.disturb(random);
                }
                let placer = random.below(2) as usize;
                let tally = to.placers[placer].place(&frame).unwrap();
                to.digest = to.digest.plus(tally.digest);
            }
            if !planner.begin_copies() {
                break;
            }
        }
        self.stages.spared_pages += planner.spared();
        self.dirty.acknowledge();
    }

    /// What a one-sided transport does: pages go over as they are now, not as they were encoded.
    fn write_directly(&self, run: DirectRun, to: &Destination) {
        let mut bytes = vec![0; run.len as usize];
        self.memory.read(run.region, run.offset, &mut bytes).unwrap();
        to.memory.write(run.region, run.offset, &bytes).unwrap();
    }

    fn encode(
        &mut self,
        batch: &Batch,
        planner: &mut Planner,
        random: &mut Random,
        busy: bool,
    ) -> Option<(FrameBuffer, Vec<DirectRun>)> {
        let level = [Level::Raw, Level::Zstd(1), Level::Zstd(-3), Level::Zstd(7)][random.below(4) as usize];
        let direct = busy && level == Level::Raw && random.below(2) == 0;
        let choice = Choice { level, admits: random.below(2) == 0, seeks: random.below(5) > 0, direct, trial: None };
        let mut out = EncodedBatch::default();
        self.encoders[random.below(3) as usize].encode(batch, choice, &mut out).unwrap();
        planner.defer(self.dirty.layout(), out.deferred());
        self.digest = self.digest.plus(out.tally().digest);
        self.stages.add(&out.tally().stages);
        if out.is_empty() {
            return None;
        }
        let len = out.tally().wire_bytes as usize;
        let bytes: Vec<u8> = out.seal(0).iter().flat_map(|part| part.to_vec()).collect();
        assert_eq!(bytes.len() + out.written_bytes() as usize, len);
        self.written += out.written_bytes();
        let mut frame = FrameBuffer::new();
        frame.fill(&bytes).unwrap();
        Some((frame, out.written().to_vec()))
    }
}

fn assert_same(source: &Source, destination: &Destination) {
    for region in [RegionId(0), RegionId(1)] {
        let len = source.memory.layout().region(region).unwrap().len as usize;
        let (mut ours, mut theirs) = (vec![0; len], vec![0; len]);
        source.memory.read(region, 0, &mut ours).unwrap();
        destination.memory.read(region, 0, &mut theirs).unwrap();
        let differs = ours.chunks(PAGE).zip(theirs.chunks(PAGE)).position(|(ours, theirs)| ours != theirs);
        assert_eq!(differs, None, "first page that differs in {region}");
    }
    assert_eq!(source.digest, destination.digest);
}

#[test]
fn both_memories_are_the_same_after_every_migration_and_all_codings_are_used() {
    let (mut all, mut written) = (Stages::default(), 0);
    for seed in 0..40 {
        let mut random = Random(seed);
        let mut config = EncodeConfig::default();
        // Room for a part of the pages, for all of them, and for none.
        config.delta_cache = [1 << 20, 64 << 20, 0][seed as usize % 3];
        let (mut source, mut destination) = sides(&config);
        for _ in 0..1500 {
            source.disturb(&mut random);
        }
        for round in 0..6 {
            source.send(round, &mut destination, &mut random, true);
            for _ in 0..100 {
                source.disturb(&mut random);
            }
        }
        // Stopped; and saving writes memory.
        source.send(6, &mut destination, &mut random, false);
        source.disturb(&mut random);
        source.send(7, &mut destination, &mut random, false);
        assert_same(&source, &destination);
        all.add(&source.stages);
        written += source.written;
    }
    let seen = [
        all.zero_pages,
        all.unchanged_pages,
        all.pattern_pages,
        all.delta_pages,
        all.copied_pages,
        all.literal_pages,
        all.spared_pages,
    ];
    assert!(seen.iter().all(|&pages| pages > 100), "{all:?}");
    assert!(all.packed_bytes < all.payload_bytes && written > 1 << 20);
}

#[test]
fn a_destination_without_the_bases_refuses_and_counts_nothing() {
    let (mut source, mut destination) = sides(&EncodeConfig::default());
    let mut random = Random(3);
    for _ in 0..3000 {
        source.disturb(&mut random);
    }
    source.send(0, &mut destination, &mut random, false);
    source.write(7, 100, b"a few bytes");
    let mut planner = Planner::new(1);
    let batch = planner.next_batch(&mut source.dirty, &mut |_, _, _| Ok(())).unwrap().unwrap();
    let before = source.stages.delta_pages;
    let mut out = EncodedBatch::default();
    let choice = Choice { admits: true, ..Choice::default() };
    source.encoders[0].encode(&batch, choice, &mut out).unwrap();
    if out.tally().stages.delta_pages == 0 {
        // Not admitted in the first round; the page is a base from now on.
        source.write(7, 100, b"some others");
        let batch = Planner::new(2).next_batch(&mut source.dirty, &mut |_, _, _| Ok(())).unwrap().unwrap();
        source.encoders[0].encode(&batch, choice, &mut out).unwrap();
    }
    assert_eq!((before, out.tally().stages.delta_pages), (before, 1));
    let bytes: Vec<u8> = out.seal(0).iter().flat_map(|part| part.to_vec()).collect();
    let mut frame = FrameBuffer::new();
    frame.fill(&bytes).unwrap();
    let (_, mut stranger) = sides(&EncodeConfig::default());
    let result = stranger.placers[0].place(&frame);
    assert!(matches!(result, Err(PlaceError::Wire(WireError::Checksum { .. }))), "{result:?}");
}

#[test]
fn a_batch_with_nothing_to_send_makes_a_frame_that_places_nothing() {
    let (source, mut destination) = sides(&EncodeConfig::default());
    let bytes: Vec<u8> = EncodedBatch::default().seal(3).iter().flat_map(|part| part.to_vec()).collect();
    let mut frame = FrameBuffer::new();
    frame.fill(&bytes).unwrap();
    assert_eq!(destination.placers[0].place(&frame).unwrap().pages, 0);
    assert_same(&source, &destination);
}
