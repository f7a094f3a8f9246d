//! The fuzzers' corpus, run as ordinary tests: nothing in it panics, on any toolchain.
#![allow(missing_docs)]

use std::path::Path;
use std::sync::Arc;

use pageferry::Verify;
use pageferry::batch::Planner;
use pageferry::digest::{DigestKey, HashTable, PageHasher};
use pageferry::dirty::{Accumulator, DirtySink};
use pageferry::encode::{Choice, EncodedBatch, Encoder, Level, Shared};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::wire::{Greeting, GreetingRole, HEADER_LEN, Message, Offer, Owner, Refusal, SessionId};

#[path = "../fuzz/src/parse.rs"]
mod parse;

fn run(name: &str, parse: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 10, "{} files in {}", files.len(), folder.display());
    for file in files {
        parse(&std::fs::read(file).unwrap());
    }
}

#[test]
fn frames_of_the_corpus_are_parsed_or_refused() {
    run("frame", parse::frame);
}

#[test]
fn first_messages_of_the_corpus_are_parsed_or_refused() {
    run("hello", parse::hello);
}

#[test]
fn batches_of_the_corpus_are_placed_or_refused() {
    run("batch", parse::batch);
}

/// Writes sound inputs for the fuzzers to start from: `cargo test -p pageferry --test corpus -- --ignored`.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    let messages = [
        Message::Greeting(Greeting {
            version_min: 1,
            version_max: 9,
            session: SessionId([7; 16]),
            role: GreetingRole::Data(3),
        }),
        Message::Welcome { version: 2 },
        Message::Refuse(Refusal::Guest("no room".to_owned())),
        Message::Offer(Box::new(Offer {
            digest_key: DigestKey([3; 32]),
            data_lanes: 4,
            verify: Verify::Full,
            run: true,
            layout: memory().layout().clone(),
            config: b"a guest".to_vec(),
        })),
        Message::Settled(Owner::Source),
        Message::Abort { reason: "for a reason".to_owned() },
    ];
    for (index, message) in messages.iter().enumerate() {
        let frame = message.encode(0);
        write_seed("frame", index, &frame);
        let kind = [0u8, 1, 2, 3, 5, 9][index];
        write_seed("hello", index, &[&[kind], &frame[HEADER_LEN..]].concat());
    }
    for (index, level) in [Level::Raw, Level::Zstd(1), Level::Zstd(9)].into_iter().enumerate() {
        write_seed("batch", index, &batch(level));
    }
}

fn write_seed(name: &str, index: usize, input: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("seed-{index}")), input).unwrap();
}

fn memory() -> Arc<MappedMemory> {
    let regions = vec![Region::ram("low", 0, 70 * 4096), Region::ram("high", 1 << 32, 200 * 4096)];
    Arc::new(MappedMemory::new(Layout::new(regions).unwrap(), Backing::Memfd).unwrap())
}

/// The body of a batch with zero pages, patterns and a page of text.
fn batch(level: Level) -> Vec<u8> {
    let memory = memory();
    memory.write(RegionId(0), 4096, &[9; 4096]).unwrap();
    memory.write(RegionId(0), 3 * 4096, &b"a page of text that packs well, ".repeat(100)).unwrap();
    let mut dirty = Accumulator::new(memory.layout().clone());
    dirty.mark_range(RegionId(0), 0..8);
    let batch = Planner::new(0).next_batch(&mut dirty, &mut |_, _, _| Ok(())).unwrap().unwrap();
    let table = Arc::new(HashTable::new(memory.layout().page_space()));
    let mut encoder = Encoder::new(memory, PageHasher::new(&DigestKey([5; 32])), Arc::new(Shared::plain(table)));
    let mut out = EncodedBatch::default();
    encoder.encode(&batch, Choice { level, ..Choice::default() }, &mut out).unwrap();
    let frame: Vec<u8> = out.seal(0).iter().flat_map(|part| part.to_vec()).collect();
    frame[HEADER_LEN..].to_vec()
}
