//! What comes out of an encoder: the parts of a `Pages` frame, and what became of the batch's pages.

use std::io::IoSlice;

use crate::digest::{Digest, PageHash};
use crate::limits::{MAX_BATCH_PAGES, MAX_PAYLOAD};
use crate::stats::Stages;
use crate::transport::DirectRun;
use crate::units::{PAGE_SIZE, PageNumber, PageRun};
use crate::wire::pages::{Coding, Packing, Record, encode_head};
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
    /// What each stage saved and cost; empty at the destination.
    pub stages: Stages,
}

impl Tally {
    /// Adds another tally to this one.
    pub fn add(&mut self, other: &Self) {
        self.pages += other.pages;
        self.zero_pages += other.zero_pages;
        self.wire_bytes += other.wire_bytes;
        self.digest = self.digest.plus(other.digest);
        self.stages.add(&other.stages);
    }
}

/// Room for a batch of pages that starts at a page boundary: copies between addresses that are aligned
/// alike are a good deal faster (`benches/NOTES.md`).
#[derive(Debug, Default)]
pub(super) struct PageBuffer {
    bytes: Vec<u8>,
    len: usize,
}

impl PageBuffer {
    pub(super) fn clear(&mut self) {
        self.len = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Where the first page starts.
    fn start(&self) -> usize {
        self.bytes.as_ptr().align_offset(PAGE_SIZE)
    }

    /// Room for one more page, which [`keep`](Self::keep) makes part of the content; `None` past the
    /// largest batch.
    pub(super) fn next_page(&mut self) -> Option<&mut [u8; PAGE_SIZE]> {
        self.room(self.len)?.first_chunk_mut()
    }

    /// The page in the room that [`next_page`](Self::next_page) gave is part of the content.
    pub(super) fn keep(&mut self) {
        self.len += PAGE_SIZE;
    }

    /// Appends what follows the pages; `false` if it does not fit.
    pub(super) fn append(&mut self, tail: &[u8]) -> bool {
        let Some(room) = self.room(self.len).and_then(|room| room.get_mut(..tail.len())) else { return false };
        room.copy_from_slice(tail);
        self.len += tail.len();
        true
    }

    fn room(&mut self, from: usize) -> Option<&mut [u8]> {
        if self.bytes.is_empty() {
            self.bytes.resize(MAX_PAYLOAD + PAGE_SIZE, 0);
        }
        let start = self.start();
        self.bytes.get_mut(start..start + MAX_PAYLOAD)?.get_mut(from..)
    }

    /// The content.
    pub(super) fn filled(&self) -> &[u8] {
        if self.len == 0 { &[] } else { &self.bytes[self.start()..][..self.len] }
    }
}

/// A batch, ready for a lane. Reused: its buffers grow to the largest batch once.
#[derive(Debug, Default)]
pub struct EncodedBatch {
    pub(super) step: u32,
    pub(super) records: Vec<Record>,
    pub(super) head: Vec<u8>,
    pub(super) payload: PageBuffer,
    pub(super) packed: Vec<u8>,
    pub(super) packing: Packing,
    pub(super) hashes: Vec<PageHash>,
    pub(super) tally: Tally,
    pub(super) deferred: Vec<PageRun>,
    pub(super) written: Vec<DirectRun>,
    /// The next page may join the last record.
    pub(super) record_open: bool,
}

impl EncodedBatch {
    /// What became of the pages; `wire_bytes` counts this frame.
    pub fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Whether there is nothing to send: no page has changed, or all are duplicates.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Pages whose content another page had first: they belong into the round's second step.
    pub fn deferred(&self) -> &[PageRun] {
        &self.deferred
    }

    /// Pages that the lane has to write before it sends the frame.
    pub fn written(&self) -> &[DirectRun] {
        &self.written
    }

    /// Bytes of payload before and after packing, pages that are written included.
    pub fn payload_bytes(&self) -> (usize, usize) {
        let packed = if self.packing == Packing::Zstd { self.packed.len() } else { self.payload.len() };
        let written = self.written_bytes() as usize;
        (self.payload.len() + written, packed + written)
    }

    /// Bytes of page content that are no part of the frame.
    pub fn written_bytes(&self) -> u64 {
        self.written.iter().map(|run| run.len).sum()
    }

    /// Gives the frame its place on a lane: fills in number and checksum, and returns its parts.
    pub fn seal(&mut self, sequence: u64) -> [IoSlice<'_>; 2] {
        if self.head.len() < HEADER_LEN {
            // Nothing to send: a frame that names no page.
            self.head.resize(HEADER_LEN, 0);
            encode_head(&self.records, self.packing, self.payload.len(), &mut self.head);
        }
        let head = &self.head[HEADER_LEN..];
        let payload = match self.packing {
            Packing::Raw => self.payload.filled(),
            Packing::Zstd => &self.packed,
        };
        let mut header = Header {
            kind: Kind::Pages,
            body_len: (head.len() + payload.len()) as u32,
            step: self.step,
            sequence,
            checksum: 0,
        };
        header.checksum = checksum(&header, head, &self.hashes);
        self.head[..HEADER_LEN].copy_from_slice(&header.encode());
        [IoSlice::new(&self.head), IoSlice::new(payload)]
    }

    pub(super) fn begin(&mut self, step: u32) {
        self.step = step;
        self.records.clear();
        self.head.clear();
        self.payload.clear();
        self.packing = Packing::Raw;
        self.hashes.clear();
        self.deferred.clear();
        self.written.clear();
        self.tally = Tally::default();
        self.record_open = false;
        debug_assert!(self.records.capacity() <= 2 * MAX_BATCH_PAGES);
    }

    /// Notes a page that travels, and its hash before.
    pub(super) fn note(&mut self, page: PageNumber, coding: Coding, hash: PageHash, before: PageHash) {
        self.tally.digest.replace(page, before, hash);
        if !matches!(coding, Coding::Zero | Coding::Written) {
            self.hashes.push(hash);
        }
        match self.records.last_mut() {
            Some(last)
                if self.record_open && last.run.end() == page.0 && last.coding.goes_on(last.run.count, coding) =>
            {
                last.run.count += 1;
            }
            _ => self.records.push(Record { run: PageRun { first: page, count: 1 }, coding }),
        }
        self.record_open = true;
    }

    /// Puts a page off to the round's second step.
    pub(super) fn defer(&mut self, page: PageNumber) {
        match self.deferred.last_mut() {
            Some(last) if last.end() == page.0 => last.count += 1,
            _ => self.deferred.push(PageRun { first: page, count: 1 }),
        }
    }
}

/// The checksum of a `Pages` frame covers pages by the hashes of what they become, which both sides need
/// anyway: so it also proves that a delta met the right base, and a copy the right content. Pages that are written are left
/// out: what has landed may be newer than what the source has hashed.
pub(crate) fn checksum(header: &Header, head: &[u8], hashes: &[PageHash]) -> u64 {
    header.checksum_with(head, |hasher| {
        for hash in hashes {
            hasher.update(&hash.0.to_le_bytes());
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::BATCH_MEMORY;

    #[test]
    fn a_batch_takes_no_more_memory_than_is_said() {
        let payload = MAX_PAYLOAD + PAGE_SIZE;
        let packed = zstd::zstd_safe::compress_bound(MAX_PAYLOAD);
        let page = size_of::<Record>() + size_of::<PageHash>() + size_of::<PageRun>() + size_of::<DirectRun>();
        // Lists grow by doubling.
        let lists = 2 * MAX_BATCH_PAGES * page;
        assert!((payload + packed + lists) as u64 <= BATCH_MEMORY);
    }
}
