//! Encoding: reads a batch's pages once each into a private buffer (R3), finds the zero pages,
//! hashes the others, and makes the parts of a `Pages` frame. Everything that makes pages smaller
//! belongs here, between the private copy and the frame.

use std::io::IoSlice;
use std::sync::Arc;

use crate::batch::Batch;
use crate::digest::{Digest, HashTable, PageHash, PageHasher};
use crate::limits::MAX_BATCH_PAGES;
use crate::memory::{GuestMemory, MemoryError, PageReader, Transfer};
use crate::units::{PAGE_SIZE, PageNumber, PageRun};
use crate::wire::pages::{Coding, Record, encode_records};
use crate::wire::{HEADER_LEN, Header, Kind};

/// What became of the pages of one or more batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Pages covered.
    pub pages: u64,
    /// Of them, zero pages.
    pub zero_pages: u64,
    /// Bytes of frames, headers included.
    pub wire_bytes: u64,
    /// What the pages changed in the digest.
    pub digest: Digest,
}

impl Tally {
    /// Adds another tally to this one.
    pub fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.wire_bytes += other.wire_bytes;
        self.digest = self.digest.plus(other.digest);
    }
}

/// Room for a batch of pages that starts at a page boundary: copies between addresses that are aligned
/// alike are a good deal faster (`benches/NOTES.md`).
#[derive(Debug, Default)]
struct PageBuffer(Vec<u8>);

impl PageBuffer {
    /// Where the first page starts.
    fn start(&self) -> usize {
        self.0.as_ptr().align_offset(PAGE_SIZE)
    }

    /// The page that starts `offset` bytes into the buffer; `None` past the largest batch.
    fn page_from(&mut self, offset: usize) -> Option<&mut [u8; PAGE_SIZE]> {
        if self.0.is_empty() {
            self.0.resize((MAX_BATCH_PAGES + 1) * PAGE_SIZE, 0);
        }
        let start = self.start();
        self.0.get_mut(start..start + MAX_BATCH_PAGES * PAGE_SIZE)?.get_mut(offset..)?.first_chunk_mut()
    }

    /// The first `len` bytes.
    fn filled(&self, len: usize) -> &[u8] {
        if len == 0 { &[] } else { &self.0[self.start()..][..len] }
    }
}

/// A batch, ready for a lane.
#[derive(Debug, Default)]
pub struct EncodedBatch {
    round: u32,
    records: Vec<Record>,
    head: Vec<u8>,
    literals: PageBuffer,
    literal_len: usize,
    hashes: Vec<PageHash>,
    tally: Tally,
    /// The next page may join the last record.
    record_open: bool,
}

impl EncodedBatch {
    /// What became of the pages; `wire_bytes` counts this frame.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Gives the frame its place on a lane: fills in number and checksum, and returns its parts.
    pub fn seal(&mut self, sequence: u64) -> [IoSlice<'_>; 2] {
        let records = &self.head[HEADER_LEN..];
        let mut header = Header {
            kind: Kind::Pages,
            body_len: (records.len() + self.literal_len) as u32,
            round: self.round,
            sequence,
            checksum: 0,
        };
        header.checksum = checksum(&header, records, &self.hashes);
        self.head[..HEADER_LEN].copy_from_slice(&header.encode());
        [IoSlice::new(&self.head), IoSlice::new(self.literals.filled(self.literal_len))]
    }
}

/// The checksum of a `Pages` frame covers literal pages by their hashes, which both sides need anyway.
pub(crate) fn checksum(header: &Header, records: &[u8], hashes: &[PageHash]) -> u64 {
    header.checksum_with(records, |hasher| {
        for hash in hashes {
            hasher.update(&hash.0.to_le_bytes());
        }
    })
}

/// Encodes batches; each worker has one of its own, all share the hash table.
pub struct Encoder {
    reader: PageReader,
    hasher: PageHasher,
    table: Arc<HashTable>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// An encoder over a guest's memory.
    pub fn new(memory: Arc<dyn GuestMemory>, hasher: PageHasher, table: Arc<HashTable>) -> Self {
        Self { reader: PageReader::new(memory), hasher, table }
    }

    /// Encodes a batch into `out`, reusing its buffers.
    pub fn encode(&mut self, batch: &Batch, out: &mut EncodedBatch) -> Result<(), MemoryError> {
        out.round = batch.round;
        out.records.clear();
        out.hashes.clear();
        out.literal_len = 0;
        out.tally = Tally::default();
        for run in &batch.runs {
            // A run ends where its region does; the page numbers may go on all the same.
            out.record_open = false;
            self.reader.read_run(*run, |page, read| {
                let start = out.literal_len;
                let Some(buffer) = out.literals.page_from(start) else {
                    return Err(MemoryError::Unsupported("a batch over the limit"));
                };
                let (coding, hash) = if read(buffer)? {
                    (Coding::Zero, PageHash::ZERO)
                } else {
                    out.literal_len += PAGE_SIZE;
                    (Coding::Literal, self.hasher.hash(buffer))
                };
                out.note(page, coding, hash, self.table.swap(page, hash));
                Ok(())
            })?;
        }
        out.head.clear();
        out.head.resize(HEADER_LEN, 0);
        encode_records(&out.records, &mut out.head);
        out.tally.wire_bytes = (out.head.len() + out.literal_len) as u64;
        Ok(())
    }
}

impl EncodedBatch {
    fn note(&mut self, page: PageNumber, coding: Coding, hash: PageHash, before: PageHash) {
        self.tally.pages += 1;
        self.tally.digest.replace(page, before, hash);
        match coding {
            Coding::Zero => self.tally.zero_pages += 1,
            Coding::Literal => self.hashes.push(hash),
        }
        match self.records.last_mut() {
            Some(last) if self.record_open && last.coding == coding && last.run.end() == page.0 => last.run.count += 1,
            _ => self.records.push(Record { run: PageRun { first: page, count: 1 }, coding }),
        }
        self.record_open = true;
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
