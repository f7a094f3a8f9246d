//! One page, from one memory to another, step by step: read this first.
#![allow(missing_docs)]

use std::sync::Arc;

use pageferry::batch::Planner;
use pageferry::digest::{Digest, DigestKey, HashTable, PageHasher};
use pageferry::dirty::{Accumulator, DirtySink, DirtySource, Point, WriteLog};
use pageferry::encode::{Choice, EncodedBatch, Encoder, Shared};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::place::Placer;
use pageferry::wire::{FrameBuffer, Kind};

#[test]
fn one_page_travels_from_one_memory_to_another() {
    let layout = Layout::new(vec![Region::ram("ram", 0, 1 << 20)]).unwrap();
    let memory = || Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous).unwrap());
    let (source, destination) = (memory(), memory());
    let hasher = PageHasher::new(&DigestKey([42; 32]));
    let table = || Arc::new(HashTable::new(layout.page_space()));

    // The guest writes page 7; the tracker knows.
    let mut tracker = WriteLog::new(layout.clone());
    tracker.start(&layout).unwrap();
    source.write(RegionId(0), 7 * 4096 + 100, b"a page of the guest").unwrap();
    tracker.mark(RegionId(0), 7..8);

    // Harvest: the tracker forgets, the accumulator remembers.
    let mut dirty = Accumulator::new(layout.clone());
    tracker.harvest(Point::Running, &mut dirty).unwrap();
    assert_eq!(dirty.dirty_pages(), 1);

    // Plan: the page is armed again, and in flight.
    let mut armed = Vec::new();
    let mut rearm = |region, first, words: &[u64]| {
        armed.push((region, first, words.to_vec()));
        Ok(())
    };
    let batch = Planner::new(0).next_batch(&mut dirty, &mut rearm).unwrap().unwrap();
    assert_eq!(armed, [(RegionId(0), 0, vec![1 << 7])]);
    assert_eq!((dirty.dirty_pages(), dirty.in_flight_pages()), (0, 1));

    // Encode: copied out once, hashed, framed.
    let mut encoded = EncodedBatch::default();
    let shared = Arc::new(Shared::plain(table()));
    Encoder::new(source.clone(), hasher.clone(), shared).encode(&batch, Choice::default(), &mut encoded).unwrap();
    let sent = encoded.tally().digest;
    let bytes: Vec<u8> = encoded.seal(0).iter().flat_map(|part| part.iter().copied()).collect();

    // Over the wire; receive, check, place.
    let mut frame = FrameBuffer::new();
    frame.fill(&bytes).unwrap();
    assert_eq!(frame.header().unwrap().kind, Kind::Pages);
    let tally = Placer::new(destination.clone(), hasher, table()).place(&frame).unwrap();

    // The memories are the same, both sides can prove it, and the accumulator may forget.
    let mut page = [0; 19];
    destination.read(RegionId(0), 7 * 4096 + 100, &mut page).unwrap();
    assert_eq!(&page, b"a page of the guest");
    assert_eq!(tally.digest, sent);
    assert_ne!(sent, Digest::default());
    dirty.acknowledge();
    assert_eq!(dirty.in_flight_pages(), 0);
}

#[test]
fn a_page_that_becomes_zero_again_is_zero_at_the_destination() {
    let layout = Layout::new(vec![Region::ram("ram", 0, 1 << 20)]).unwrap();
    let memory = || Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous).unwrap());
    let (source, destination) = (memory(), memory());
    let hasher = PageHasher::new(&DigestKey([1; 32]));
    let table = || Arc::new(HashTable::new(layout.page_space()));
    let mut encoder = Encoder::new(source.clone(), hasher.clone(), Arc::new(Shared::plain(table())));
    let mut placer = Placer::new(destination.clone(), hasher, table());
    let mut dirty = Accumulator::new(layout.clone());
    let mut digest = Digest::default();
    for content in [b"full", &[0; 4]] {
        source.write(RegionId(0), 0, content).unwrap();
        dirty.mark_zeroed(RegionId(0), 0..1);
        let batch = Planner::new(0).next_batch(&mut dirty, &mut |_, _, _| Ok(())).unwrap().unwrap();
        let mut encoded = EncodedBatch::default();
        encoder.encode(&batch, Choice::default(), &mut encoded).unwrap();
        let bytes: Vec<u8> = encoded.seal(0).iter().flat_map(|part| part.iter().copied()).collect();
        let mut frame = FrameBuffer::new();
        frame.fill(&bytes).unwrap();
        digest = digest.plus(placer.place(&frame).unwrap().digest);
        let mut arrived = [9; 4];
        destination.read(RegionId(0), 0, &mut arrived).unwrap();
        assert_eq!(&arrived, content);
    }
    assert_eq!(digest, Digest::default());
}
