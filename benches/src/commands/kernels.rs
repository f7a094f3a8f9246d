//! The engine's inner loops on one thread: what a core can do at best, and whether a change to one of
//! them was worth it. By the thread's own CPU time, so that other work on the machine counts little.

use std::hint::black_box;
use std::io::IoSlice;
use std::sync::Arc;

use clap::Args;
use pageferry::batch::Batch;
use pageferry::delta;
use pageferry::digest::{DigestKey, HashTable, PageHasher};
use pageferry::encode::{Choice, EncodedBatch, Encoder, Shared};
use pageferry::limits::MAX_BATCH_PAGES;
use pageferry::memory::{GuestMemory, MappedMemory, is_zero, is_zero_portable};
use pageferry::pattern::repeated_word;
use pageferry::place::Placer;
use pageferry::units::{PageNumber, PageRun};
use pageferry::wire::FrameBuffer;

use super::{gib, gigabytes_per_second, size};
use crate::guest::{self, RAM, Random};
use crate::outcome::Outcome;
use crate::{BenchError, host, sys};

const PAGE: usize = 4096;

const BATCH: usize = MAX_BATCH_PAGES * PAGE;

#[derive(Args, Debug)]
pub(crate) struct KernelsOptions {
    /// Guest memory to walk through: more than the caches hold
    #[arg(long, value_parser = size, default_value = "512M")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "9", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
}

/// `pageferry-bench kernels`.
pub(crate) fn kernels(options: &KernelsOptions) -> Result<Outcome, BenchError> {
    let bytes = options.size.next_multiple_of(BATCH as u64);
    let mut outcome = Outcome::new("kernels", format!("one thread, guest memory of {} GiB", gib(bytes)));
    let bench = Bench { memory: guest::prefaulted(bytes)?, bytes, runs: options.runs };
    bench.private(&mut outcome)?;
    bench.deltas(&mut outcome)?;
    bench.batches(&mut outcome, "zero pages")?;
    guest::fill_random(&bench.memory, 11)?;
    bench.copies(&mut outcome)?;
    bench.batches(&mut outcome, "incompressible pages")?;
    Ok(outcome)
}

struct Bench {
    memory: Arc<MappedMemory>,
    bytes: u64,
    runs: u32,
}

impl Bench {
    /// Runs `work` over all batches of the memory, again and again; `work` gets a batch's offset.
    fn speed(
        &self,
        outcome: &mut Outcome,
        name: &str,
        mut work: impl FnMut(u64) -> Result<(), BenchError>,
    ) -> Result<(), BenchError> {
        let mut speeds = Vec::new();
        for _ in 0..self.runs {
            let started = sys::thread_seconds();
            (0..self.bytes).step_by(BATCH).try_for_each(&mut work)?;
            speeds.push(gigabytes_per_second(self.bytes, sys::thread_seconds() - started));
        }
        outcome.series(name, "GB/s", speeds);
        Ok(())
    }

    /// Kernels that work on a private batch, which stays in the cache.
    fn private(&self, outcome: &mut Outcome) -> Result<(), BenchError> {
        let zeros = vec![0u8; BATCH];
        let all = |test: fn(&[u8]) -> bool| black_box(&zeros).chunks_exact(PAGE).all(test);
        self.speed(outcome, "zero test, private buffer", |_| expect(all(is_zero), "zeros are zeros"))?;
        self.speed(outcome, "zero test, naive", |_| expect(all(is_zero_portable), "zeros are zeros"))?;
        let mut random = zeros.clone();
        Random::new(5).fill(&mut random);
        let hasher = hasher();
        let first = hasher.hash(&random.as_chunks().0[0]);
        self.speed(outcome, "page hash, private buffer", |_| {
            let hashes = black_box(&random).as_chunks().0.iter().map(|page| hasher.hash(page));
            expect(hashes.filter(|hash| *hash == first).count() == 1, "hashes repeat themselves")
        })?;
        let repeating = 0x0706_0504_0302_0100u64.to_le_bytes().repeat(BATCH / 8);
        self.speed(outcome, "page hash, portable", |_| {
            let hashes = black_box(&random).as_chunks().0.iter().map(|page| hasher.hash_portable(page));
            expect(hashes.filter(|hash| *hash == first).count() == 1, "both hash alike")
        })?;
        let base: &[[u8; PAGE]] = random.as_chunks().0;
        for (name, share) in [("few words", 0.01), ("20 % of words", 0.2)] {
            let (new, mut deltas) =
                (changed_words(base, share), Vec::with_capacity(MAX_BATCH_PAGES * delta::MAX_DELTA));
            self.speed(outcome, &format!("delta encode, {name}, private buffer"), |_| {
                deltas.clear();
                let pairs = black_box(base).iter().zip(black_box(&new));
                let encoded = pairs.filter(|(base, new)| delta::encode(base, new, &mut deltas).is_some()).count();
                expect(encoded == MAX_BATCH_PAGES, "pages that changed little have a delta")
            })?;
        }
        for (name, bytes, hits) in [("hit", &repeating, MAX_BATCH_PAGES), ("miss", &random, 0)] {
            self.speed(outcome, &format!("repeated word, {name}, private buffer"), |_| {
                let found = black_box(bytes).as_chunks().0.iter().filter_map(repeated_word).count();
                expect(found == hits, "only pages that repeat one word are found")
            })?;
        }
        Ok(())
    }

    /// Kernels over private pages that come from memory, not from a cache.
    fn deltas(&self, outcome: &mut Outcome) -> Result<(), BenchError> {
        let mut base = vec![[1; PAGE]; self.bytes as usize / 2 / PAGE];
        base.as_flattened_mut().fill(0);
        let count = base.len();
        let plain = self.page_speed(outcome, "read page, no test", count, || {
            let words = base.as_flattened().as_chunks().0.iter().map(|word| u64::from_ne_bytes(*word));
            expect(words.fold(0, u64::wrapping_add) == 0, "zeros add up to zero")
        })?;
        let test = self.page_speed(outcome, "zero test, private memory", count, || {
            expect(base.iter().all(|page| is_zero(page)), "zeros are zeros")
        })?;
        outcome.figure("zero test, private memory: of plain reading", "", test / plain, None);
        Random::new(6).fill(base.as_flattened_mut());
        let same = base.clone();
        let plain = self.page_speed(outcome, "read base and page, no delta", count, || {
            expect(base.iter().zip(&same).all(|(base, page)| base == page), "a copy is equal")
        })?;
        drop(same);
        for (name, share) in [("few words", 0.01), ("20 % of words", 0.2), ("whole pages", 1.0)] {
            let new = changed_words(&base, share);
            let mut deltas = Vec::with_capacity(count * delta::MAX_DELTA);
            let encode = self.page_speed(outcome, &format!("delta encode, {name}"), count, || {
                deltas.clear();
                let mut encoded = 0;
                for (index, new_page) in new.iter().enumerate() {
                    [&base, &new].into_iter().filter_map(|pages| pages.get(index + 1)).for_each(delta::prefetch);
                    encoded += usize::from(delta::encode(&base[index], new_page, &mut deltas).is_some());
                }
                expect(encoded == if share < 1.0 { count } else { 0 }, "pages that changed little have a delta")
            })?;
            outcome.figure(format!("delta encode, {name}: of plain reading"), "", encode / plain, None);
            if !deltas.is_empty() {
                self.apply(outcome, &format!("delta apply, {name}"), [&base, &new], &deltas)?;
            }
        }
        Ok(())
    }

    /// Applies the deltas between two versions of pages, again and again.
    fn apply(
        &self,
        outcome: &mut Outcome,
        name: &str,
        versions: [&[[u8; PAGE]]; 2],
        deltas: &[u8],
    ) -> Result<(), BenchError> {
        let mut pages = versions[0].to_vec();
        self.page_speed(outcome, name, pages.len(), || {
            pages.iter_mut().try_fold(deltas, |rest, page| {
                let len = delta::apply(page, rest).map_err(|error| BenchError::Wrong(error.to_string()))?;
                Ok::<_, BenchError>(&rest[len..])
            })?;
            Ok(())
        })?;
        // Applied twice, a delta leaves the page as it was.
        expect(pages == versions[self.runs as usize % 2], "deltas lead from one version to the other")
    }

    /// Runs `work`, which goes once over `pages` pages, again and again.
    fn page_speed(
        &self,
        outcome: &mut Outcome,
        name: &str,
        pages: usize,
        mut work: impl FnMut() -> Result<(), BenchError>,
    ) -> Result<f64, BenchError> {
        let mut speeds = Vec::new();
        for _ in 0..self.runs {
            let started = sys::thread_seconds();
            work()?;
            speeds.push(gigabytes_per_second((pages * PAGE) as u64, sys::thread_seconds() - started));
        }
        Ok(outcome.series(name, "GB/s", speeds))
    }

    /// Copies between guest memory and a private batch, page by page.
    fn copies(&self, outcome: &mut Outcome) -> Result<(), BenchError> {
        let mut buffer = vec![0u8; BATCH];
        let before = guest::fingerprint(&self.memory)?;
        self.speed(outcome, "copy out of guest memory", |offset| {
            for (page, into) in buffer.chunks_exact_mut(PAGE).enumerate() {
                self.memory.read(RAM, offset + (page * PAGE) as u64, into)?;
            }
            Ok(())
        })?;
        let target = guest::prefaulted(self.bytes)?;
        self.speed(outcome, "copy into guest memory", |offset| {
            for (page, from) in buffer.chunks_exact(PAGE).enumerate() {
                target.write(RAM, offset + (page * PAGE) as u64, from)?;
            }
            Ok(())
        })?;
        let mut last = vec![0; BATCH];
        target.read(RAM, self.bytes - BATCH as u64, &mut last)?;
        expect(last == buffer && guest::fingerprint(&self.memory)? == before, "copies are equal")
    }

    /// The whole way of a batch on either side, without a lane between them.
    fn batches(&self, outcome: &mut Outcome, what: &str) -> Result<(), BenchError> {
        let table = || Arc::new(HashTable::new(self.bytes / PAGE as u64));
        // One that has seen a page before sends nothing for it, so every run begins with a fresh one.
        let fresh = || Encoder::new(self.memory.clone(), hasher(), Arc::new(Shared::plain(table())));
        let mut encoder = fresh();
        let mut encoded = EncodedBatch::default();
        self.speed(outcome, &format!("encode {what}"), |offset| {
            if offset == 0 {
                encoder = fresh();
            }
            Ok(encoder.encode(&batch(offset), Choice::default(), &mut encoded)?)
        })?;

        let target = guest::prefaulted(self.bytes)?;
        let mut placer = Placer::new(target.clone(), hasher(), table());
        let mut frame = FrameBuffer::new();
        let mut speeds = Vec::new();
        for _ in 0..self.runs {
            let mut spent = 0.0;
            encoder = fresh();
            for offset in (0..self.bytes).step_by(BATCH) {
                encoder.encode(&batch(offset), Choice::default(), &mut encoded)?;
                fill(&mut frame, &encoded.seal(0))?;
                let started = sys::thread_seconds();
                placer.place(&frame).map_err(|error| BenchError::Wrong(error.to_string()))?;
                spent += sys::thread_seconds() - started;
            }
            speeds.push(gigabytes_per_second(self.bytes, spent));
        }
        outcome.series(format!("place {what}"), "GB/s", speeds);
        expect(guest::fingerprint(&target)? == guest::fingerprint(&self.memory)?, "placed memory is equal")
    }
}

/// The same pages with about this share of their words changed.
fn changed_words(pages: &[[u8; PAGE]], share: f64) -> Vec<[u8; PAGE]> {
    let mut random = Random::new(8);
    let mut changed = pages.to_vec();
    for word in changed.as_flattened_mut().as_chunks_mut::<8>().0 {
        if random.share() < share {
            word[3] ^= 0x10;
        }
    }
    changed
}

/// Puts a frame where a lane would.
fn fill(frame: &mut FrameBuffer, parts: &[IoSlice<'_>]) -> Result<(), BenchError> {
    let len = parts.iter().map(|part| part.len()).sum();
    let mut into = frame.prepare(len).map_err(host("a frame is too long"))?;
    for part in parts {
        let (now, rest) = into.split_at_mut(part.len());
        now.copy_from_slice(part);
        into = rest;
    }
    Ok(())
}

fn batch(offset: u64) -> Batch {
    let run = PageRun { first: PageNumber(offset / PAGE as u64), count: MAX_BATCH_PAGES as u64 };
    Batch { runs: vec![run], pages: run.count, ..Batch::default() }
}

fn hasher() -> PageHasher {
    PageHasher::new(&DigestKey([9; 32]))
}

fn expect(holds: bool, what: &str) -> Result<(), BenchError> {
    if holds { Ok(()) } else { Err(BenchError::Wrong(format!("it does not hold that {what}"))) }
}
