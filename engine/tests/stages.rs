//! What a report says of the stages: nothing is counted twice, nothing is left out.
#![allow(missing_docs)]

use std::sync::Arc;

use pageferry::EncodeConfig;
use pageferry::batch::{Planner, round_of};
use pageferry::digest::{DigestKey, HashTable, PageHasher};
use pageferry::dirty::{Accumulator, DirtySink};
use pageferry::encode::{Choice, EncodedBatch, Encoder, Level, Shared, Tally};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};

const RAM: RegionId = RegionId(0);
const PAGES: u64 = 400;

/// Bytes without a pattern that a packer could find.
fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) ^ (state >> 7)) as u8
    };
    (0..4096).map(|_| next()).collect()
}

/// One content of each kind in turn: zero, pattern, text, noise, and noise that all such pages share.
fn content(page: u64) -> Vec<u8> {
    match page % 5 {
        0 => vec![0; 4096],
        1 => vec![(page % 255) as u8 + 1; 4096],
        2 => format!("line {page} of the log of a guest; ").into_bytes().into_iter().cycle().take(4096).collect(),
        3 => noise(page * 77),
        _ => noise(9),
    }
}

struct Source {
    memory: Arc<MappedMemory>,
    dirty: Accumulator,
    encoder: Encoder,
    round: u32,
}

impl Source {
    fn new(config: &EncodeConfig) -> Self {
        let layout = Layout::new(vec![Region::ram("ram", 0, PAGES * 4096)]).unwrap();
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous).unwrap());
        for page in 0..PAGES {
            memory.write(RAM, page * 4096, &content(page)).unwrap();
        }
        let table = Arc::new(HashTable::new(layout.page_space()));
        let shared = Arc::new(Shared::new(table, PAGES, config));
        let encoder = Encoder::new(memory.clone(), PageHasher::new(&DigestKey([3; 32])), shared);
        Self { memory, dirty: Accumulator::new(layout), encoder, round: 0 }
    }

    /// Encodes a round over all pages, both steps.
    fn round(&mut self, level: Level) -> Tally {
        self.dirty.mark_range(RAM, 0..PAGES);
        let (mut planner, mut tally) = (Planner::new(self.round), Tally::default());
        let choice = Choice { level, ..Choice::default() };
        loop {
            while let Some(batch) = planner.next_batch(&mut self.dirty, &mut |_, _, _| Ok(())).unwrap() {
                let mut encoded = EncodedBatch::default();
                self.encoder.encode(&batch, choice, &mut encoded).unwrap();
                planner.defer(self.dirty.layout(), encoded.deferred());
                tally.add(encoded.tally());
            }
            if !planner.begin_copies() {
                assert!(round_of(planner.step()).1);
                break;
            }
        }
        self.dirty.acknowledge();
        self.round += 1;
        tally
    }
}

#[track_caller]
fn assert_adds_up(tally: &Tally) {
    let stages = tally.stages;
    assert_eq!(stages.pages(), PAGES, "{stages:?}");
    assert_eq!(stages.covered_bytes(), PAGES * 4096);
    assert_eq!(stages.covered_bytes(), stages.saved().total() + stages.packed_bytes, "{stages:?}");
    assert_eq!(tally.wire_bytes, stages.packed_bytes + stages.head_bytes, "{stages:?}");
}

#[test]
fn what_all_stages_saved_and_what_was_sent_are_all_that_was_covered() {
    let mut source = Source::new(&EncodeConfig::default());
    let first = source.round(Level::Zstd(1));
    assert_adds_up(&first);
    let (pages, saved) = (first.stages, first.stages.saved());
    let kind = PAGES / 5;
    assert_eq!((pages.zero_pages, pages.pattern_pages, pages.copied_pages), (kind, kind, kind - 1), "{pages:?}");
    assert_eq!((saved.zero, saved.pattern, saved.copied), (kind * 4096, kind * 4088, (kind - 1) * 4096));
    assert!(saved.packing > kind * 3000, "text shrinks: {saved:?}");
    assert_eq!((pages.delta_pages, pages.unchanged_pages, saved.delta, saved.unchanged), (0, 0, 0, 0));

    // A few bytes of some pages change, a whole page does, and a page becomes zero.
    for page in (3..PAGES).step_by(25) {
        source.memory.write(RAM, page * 4096 + 1000, &page.to_le_bytes()).unwrap();
    }
    source.memory.write(RAM, 2 * 4096, &noise(5)).unwrap();
    source.memory.write(RAM, 4096, &[0; 4096]).unwrap();
    let second = source.round(Level::Zstd(1));
    assert_adds_up(&second);
    let (pages, saved) = (second.stages, second.stages.saved());
    assert_eq!((pages.delta_pages, pages.literal_pages, pages.zero_pages), (16, 1, 1), "{pages:?}");
    assert_eq!(pages.unchanged_pages, PAGES - 18);
    assert!(saved.delta > 16 * 4000 && saved.delta < 16 * 4096, "{saved:?}");
}

#[test]
fn with_everything_off_only_pages_of_one_value_and_unchanged_ones_are_saved() {
    let mut config = EncodeConfig::default();
    (config.duplicates, config.delta_cache) = (false, 0);
    let mut source = Source::new(&config);
    let first = source.round(Level::Raw);
    assert_adds_up(&first);
    let saved = first.stages.saved();
    assert_eq!((saved.copied, saved.delta, saved.packing), (0, 0, 0));
    assert_eq!(first.stages.literal_pages, PAGES / 5 * 3);
    let again = source.round(Level::Raw);
    assert_adds_up(&again);
    assert_eq!((again.stages.unchanged_pages, again.wire_bytes), (PAGES, 0));
}
