//! Encoding: reads a batch's pages once each into a private buffer (R3) and finds the cheapest way to
//! give each: zero, unchanged, one repeated value, delta, duplicate, literal. What is left goes through
//! zstd together.
//!
//! Every reference names content that the destination holds for certain when it applies it (R6). A delta's
//! base is the page as last sent, in an earlier step. A duplicate is put off to the round's second step:
//! by then every lane has delivered the first, and what the page is copied from is looked up again.
//!
//! A page that is *written* is read twice: here, for its hash, and by the transport, later. What the destination holds of it is
//! certain only if the guest did not write it in between, and then it is dirty: it is sent once more. Until then no reference
//! is made to it ([`Shared::unsure`]).

mod bases;
mod choice;
mod duplicates;
mod output;
mod pack;

pub use bases::Bases;
pub use choice::{Choice, LevelChooser, Trial};
pub use duplicates::DuplicateIndex;
pub(crate) use output::checksum;
pub use output::{EncodedBatch, Tally};
pub use pack::{Level, MAX_LEVEL, MIN_LEVEL};

use std::sync::Arc;
use std::time::Instant;

use crate::batch::{Batch, Phase};
use crate::delta;
use crate::digest::{Digest, HashTable, PageHash, PageHasher};
use crate::dirty::PageSet;
use crate::memory::{GuestMemory, MemoryError, PageReader, Transfer};
use crate::pattern::repeated_word;
use crate::units::{PAGE_SIZE, PageNumber, PageRun};
use crate::wire::HEADER_LEN;
use crate::wire::pages::{Coding, Packing, encode_head};
use bases::Near;
use output::PageBuffer;
use pack::Packer;

/// What all encoders of a migration share.
#[derive(Debug)]
pub struct Shared {
    /// Hash of every page as last sent.
    pub table: Arc<HashTable>,
    /// Pages by content; `None` when duplicates are not looked for.
    pub duplicates: Option<DuplicateIndex>,
    /// Pages as last sent; empty when no deltas are made.
    pub bases: Bases,
    /// Pages that were last written straight from guest memory: what the destination holds of them is not certain.
    pub unsure: PageSet,
    /// Pages that the guest has given back since the migration began: never written straight from guest memory, because a
    /// device that holds memory down still reads the page that was there before.
    pub given_back: Arc<PageSet>,
}

impl Shared {
    /// Nothing sent yet: for a guest with so many pages of content.
    pub fn new(table: Arc<HashTable>, pages: u64, config: &crate::config::EncodeConfig) -> Self {
        let duplicates = config.duplicates.then(|| DuplicateIndex::new(pages));
        let bases = Bases::new(config.delta_cache.min(table.page_space() * PAGE_SIZE as u64));
        Self { duplicates, bases, ..Self::plain(table) }
    }

    /// Nothing sent yet, and no references to what was: pages are zero, unchanged, patterns or literals.
    pub fn plain(table: Arc<HashTable>) -> Self {
        let (unsure, given_back) = (PageSet::new(table.page_space()), Arc::new(PageSet::new(table.page_space())));
        Self { table, duplicates: None, bases: Bases::new(0), unsure, given_back }
    }

    /// Learns from there which pages the guest gives back.
    #[must_use]
    pub fn with_given_back(mut self, pages: &Arc<PageSet>) -> Self {
        self.given_back = Arc::clone(pages);
        self
    }
}

/// Encodes batches; each worker has one of its own, all share what was sent.
pub struct Encoder {
    reader: PageReader,
    hasher: PageHasher,
    shared: Arc<Shared>,
    pages: PageBuffer,
    tail: Vec<u8>,
    packer: Packer,
    timed: bool,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder over a guest's memory.
    pub fn new(memory: Arc<dyn GuestMemory>, hasher: PageHasher, shared: Arc<Shared>) -> Self {
        let reader = PageReader::new(memory);
        Self {
            reader,
            hasher,
            shared,
            pages: PageBuffer::default(),
            tail: Vec::new(),
            packer: Packer::default(),
            timed: false,
        }
    }

    /// Measures what each stage costs. Off by default, so that an encoder needs no clock.
    #[must_use]
    pub fn timed(mut self) -> Self {
        self.timed = true;
        self
    }

    /// Encodes a batch into `out`, reusing its buffers.
    pub fn encode(&mut self, batch: &Batch, choice: Choice, out: &mut EncodedBatch) -> Result<(), MemoryError> {
        let began = self.timed.then(Instant::now);
        out.begin(batch.step());
        self.pages.clear();
        self.tail.clear();
        match &batch.phase {
            Phase::Contents => self.encode_contents(batch, choice, out)?,
            Phase::Copies(deferred) => {
                self.encode_copies(batch, |page| deferred.contains(page), out)?;
            }
        }
        if !self.pages.append(&self.tail) {
            return Err(MemoryError::Unsupported("a batch over the limit"));
        }
        self.locate_written(out)?;
        let scanned = self.timed.then(Instant::now);
        self.pack(choice, out)?;
        if let (Some(began), Some(scanned)) = (began, scanned) {
            out.tally.stages.scan_time = (scanned - began).saturating_sub(out.tally.stages.delta_time);
            out.tally.stages.pack_time = scanned.elapsed();
        }
        if !out.records.is_empty() {
            out.head.resize(HEADER_LEN, 0);
            encode_head(&out.records, out.packing, out.payload.len(), &mut out.head);
            let (_, packed) = out.payload_bytes();
            out.tally.wire_bytes = (out.head.len() + packed) as u64;
            out.tally.stages.head_bytes = out.head.len() as u64;
        }
        Ok(())
    }

    // ---- first step: what changed ----

    fn encode_contents(&mut self, batch: &Batch, choice: Choice, out: &mut EncodedBatch) -> Result<(), MemoryError> {
        let Self { reader, hasher, shared, pages, tail, timed, .. } = self;
        let duplicates = shared.duplicates.as_ref().filter(|_| choice.seeks);
        let admits = choice.admits || batch.round > 0;
        let round = batch.round;
        let direct = choice.direct;
        let mut worker = Worker { shared, round, duplicates, tail, near: None, admits, direct, timed: *timed };
        for run in &batch.runs {
            // A run ends where its region does; the page numbers may go on all the same.
            out.record_open = false;
            out.tally.pages += run.count;
            reader.read_run(*run, |page, read| {
                let Some(buffer) = pages.next_page() else {
                    return Err(MemoryError::Unsupported("a batch over the limit"));
                };
                if read(buffer)? {
                    worker.encode_zero(page, out);
                } else if worker.encode_page(page, hasher.hash(buffer), buffer, out) == Kept::Literal {
                    pages.keep();
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    // ---- second step: duplicates ----

    /// Pages put off in the first step, which the table knows by the content they had then. Where nothing
    /// holds that content any more, the page is read again.
    fn encode_copies(
        &mut self,
        batch: &Batch,
        deferred: impl Fn(PageNumber) -> bool,
        out: &mut EncodedBatch,
    ) -> Result<(), MemoryError> {
        let Self { reader, hasher, shared, pages, .. } = self;
        let table = &shared.table;
        let (mut expected, mut sources) = (None, 0..0);
        for run in &batch.runs {
            out.record_open = false;
            reader.read_run(*run, |page, read| {
                let hash = table.load(page);
                // What is copied itself holds its content only once the step is over.
                let holds = |from: PageNumber| from != page && shared.holds(from, hash) && !deferred(from);
                let next = expected.take().filter(|&from| holds(from));
                let find = |index: &DuplicateIndex| index.find(hash, holds);
                if let Some(from) = next.or_else(|| shared.duplicates.as_ref().and_then(find)) {
                    out.tally.stages.copied_pages += 1;
                    if !sources.contains(&from.0) {
                        // Like a run of pages, a run copied from ends where its region does.
                        sources = reader.region_around(from);
                        out.record_open = false;
                    }
                    out.note(page, Coding::Copy { from }, hash, hash);
                    expected = Some(PageNumber(from.0 + 1));
                    return Ok(());
                }
                let Some(buffer) = pages.next_page() else {
                    return Err(MemoryError::Unsupported("a batch over the limit"));
                };
                if read(buffer)? {
                    out.tally.stages.zero_pages += 1;
                    out.tally.zero_pages += 1;
                    out.note(page, Coding::Zero, PageHash::ZERO, table.swap(page, PageHash::ZERO));
                } else {
                    let hash = hasher.hash(buffer);
                    out.tally.stages.literal_pages += 1;
                    out.note(page, Coding::Literal, hash, table.swap(page, hash));
                    pages.keep();
                }
                Ok(())
            })?;
        }
        Ok(())
    }

    // ---- together ----

    /// Says where the pages to be written are.
    fn locate_written(&self, out: &mut EncodedBatch) -> Result<(), MemoryError> {
        for record in out.records.iter().filter(|record| record.coding == Coding::Written) {
            out.written.push(self.reader.locate(record.run)?);
        }
        Ok(())
    }

    /// Moves the payload to `out`, packed if that makes it smaller.
    fn pack(&mut self, choice: Choice, out: &mut EncodedBatch) -> Result<(), MemoryError> {
        let raw = self.pages.len();
        let level = if raw < pack::SMALLEST { Level::Raw } else { choice.level };
        if self.packer.pack(level, self.pages.filled(), &mut out.packed).map_err(MemoryError::Packing)? {
            out.packing = Packing::Zstd;
        }
        // The payload goes with the batch even when packed: its length is told, and a trial may need it.
        std::mem::swap(&mut self.pages, &mut out.payload);
        let (raw, packed) = out.payload_bytes();
        out.tally.stages.payload_bytes = raw as u64;
        out.tally.stages.packed_bytes = packed as u64;
        Ok(())
    }

    /// Packs the payload of an encoded batch at another level too, only to learn what that brings: the
    /// bytes that come out. `None` if there is too little to tell.
    pub fn try_level(&mut self, level: Level, encoded: &EncodedBatch) -> Option<usize> {
        let payload = encoded.payload.filled();
        if payload.len() < pack::TELLING || level == Level::Raw {
            return None;
        }
        let shrunk = self.packer.pack(level, payload, &mut self.tail).ok()?;
        Some(if shrunk { self.tail.len() } else { payload.len() })
    }
}

impl Shared {
    /// Whether the destination is certain to hold this content in that page.
    fn holds(&self, page: PageNumber, hash: PageHash) -> bool {
        self.table.load(page) == hash && !self.unsure.contains(page)
    }
}

#[derive(PartialEq, Eq)]
enum Kept {
    /// The page stays in the payload.
    Literal,
    Elsewhere,
}

/// Encodes the pages of one batch.
struct Worker<'a> {
    shared: &'a Shared,
    round: u32,
    /// Where to look for duplicates, if at all.
    duplicates: Option<&'a DuplicateIndex>,
    tail: &'a mut Vec<u8>,
    near: Option<Near<'a>>,
    /// Whether pages may enter the cache of bases.
    admits: bool,
    /// Whether pages are written straight from guest memory.
    direct: bool,
    timed: bool,
}

impl Worker<'_> {
    fn encode_zero(&mut self, page: PageNumber, out: &mut EncodedBatch) {
        self.settle(page, false);
        let Shared { table, unsure, .. } = self.shared;
        // In the first round the record says that the page was looked at.
        if self.round > 0 && self.shared.holds(page, PageHash::ZERO) {
            out.tally.stages.unchanged_pages += 1;
            return;
        }
        out.tally.stages.zero_pages += 1;
        out.tally.zero_pages += 1;
        unsure.remove(page);
        out.note(page, Coding::Zero, PageHash::ZERO, table.swap(page, PageHash::ZERO));
    }

    /// Decides about a page that is not zero, cheapest first. `bytes` is the private copy.
    fn encode_page(
        &mut self,
        page: PageNumber,
        hash: PageHash,
        bytes: &[u8; PAGE_SIZE],
        out: &mut EncodedBatch,
    ) -> Kept {
        let Shared { table, unsure, given_back, .. } = self.shared;
        let before = table.load(page);
        // Whatever is done with the page but writing it, the destination's content is certain afterwards.
        let known = !unsure.remove(page);
        let stages = &mut out.tally.stages;
        if known && hash == before {
            self.settle(page, true);
            stages.unchanged_pages += 1;
            return Kept::Elsewhere;
        }
        if let Some(word) = repeated_word(bytes) {
            self.settle(page, false);
            stages.pattern_pages += 1;
            self.tail.extend_from_slice(&word.to_le_bytes());
            out.note(page, Coding::Pattern, hash, table.swap(page, hash));
            return Kept::Elsewhere;
        }
        if known && self.encode_delta(page, before, hash, bytes, out) {
            out.note(page, Coding::Delta, hash, table.swap(page, hash));
            self.index(hash, page);
            return Kept::Elsewhere;
        }
        let holds = |other: PageNumber| other != page && self.shared.holds(other, hash);
        if self.duplicates.is_some_and(|index| index.find(hash, holds).is_some()) {
            out.tally.digest.replace(page, table.swap(page, hash), hash);
            out.defer(page);
            self.remember(page, hash, bytes, false);
            return Kept::Elsewhere;
        }
        out.tally.stages.literal_pages += 1;
        if self.direct && !given_back.contains(page) {
            unsure.insert(page);
            out.note(page, Coding::Written, hash, table.swap(page, hash));
            return Kept::Elsewhere;
        }
        out.note(page, Coding::Literal, hash, table.swap(page, hash));
        self.index(hash, page);
        self.remember(page, hash, bytes, self.admits);
        Kept::Literal
    }

    /// Appends a delta if the page as last sent is known and little of it has changed.
    fn encode_delta(
        &mut self,
        page: PageNumber,
        before: PageHash,
        hash: PageHash,
        bytes: &[u8; PAGE_SIZE],
        out: &mut EncodedBatch,
    ) -> bool {
        let timed = self.timed;
        let (mut tail, mut made) = (std::mem::take(self.tail), false);
        if let Some(near) = self.near(page)
            && let Some(base) = near.base(page, before)
        {
            let began = timed.then(Instant::now);
            if let Some(len) = delta::encode(base, bytes, &mut tail) {
                out.tally.stages.delta_pages += 1;
                out.tally.stages.delta_bytes += len as u64;
                near.store(page, hash, bytes, false);
                made = true;
            }
            out.tally.stages.delta_time += began.map(|began| began.elapsed()).unwrap_or_default();
        }
        *self.tail = tail;
        made
    }

    fn index(&self, hash: PageHash, page: PageNumber) {
        if let Some(index) = self.duplicates {
            index.insert(hash, page);
        }
    }

    /// The cache of bases need not wait for this page to be sent; in the first round it waits for none.
    fn settle(&mut self, page: PageNumber, goes_on: bool) {
        if self.round > 0
            && let Some(near) = self.near(page)
        {
            near.settle(page, goes_on);
        }
    }

    fn remember(&mut self, page: PageNumber, hash: PageHash, bytes: &[u8; PAGE_SIZE], new: bool) {
        if let Some(near) = self.near(page) {
            near.store(page, hash, bytes, new);
        }
    }
}

impl<'a> Worker<'a> {
    fn near(&mut self, page: PageNumber) -> Option<&mut Near<'a>> {
        if self.near.as_ref().is_none_or(|near| !near.covers(page)) {
            // The old lock is let go first: two at a time could wait for each other.
            self.near = None;
            self.near = self.shared.bases.near(page, self.admits);
        }
        self.near.as_mut()
    }
}

/// A digest of memory as it is now, over the pages in `runs`: the full verification of R8. Reads
/// every page; zero pages count nothing, so never-touched pages may be left out.
pub(crate) fn digest_runs(reader: &PageReader, hasher: &PageHasher, runs: &[PageRun]) -> Result<Digest, MemoryError> {
    let mut digest = Digest::default();
    let mut buffer = [0; PAGE_SIZE];
    for run in runs {
        reader.read_run(*run, |page, read| {
            if !read(&mut buffer)? {
                digest.replace(page, PageHash::ZERO, hasher.hash(&buffer));
            }
            Ok(())
        })?;
    }
    Ok(digest)
}

/// All pages that may hold content, as runs of at most `longest` pages.
pub fn populated_runs(memory: &dyn GuestMemory, longest: u64) -> Vec<PageRun> {
    let layout = memory.layout();
    let mut runs = Vec::new();
    for (id, region) in layout.iter().filter(|(_, region)| region.transfer == Transfer::Copy) {
        let first = layout.pages_of(id).first.0;
        let whole = std::iter::once(0..region.page_count()).collect();
        for range in memory.populated(id).unwrap_or(whole) {
            let end = range.end.min(region.page_count());
            let mut at = range.start;
            while at < end {
                let count = (end - at).min(longest);
                runs.push(PageRun { first: PageNumber(first + at), count });
                at += count;
            }
        }
    }
    runs
}
