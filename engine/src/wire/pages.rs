//! The body of a `Pages` frame: records that say which pages, then the literal pages themselves.
//!
//! A record is two unsigned LEB128 numbers: the gap from the end of the run before (from page 0 for
//! the first), and `count * 4 + kind`. Runs ascend and never overlap.

use super::WireError;
use super::fields::{Reader, Writer};
use crate::limits::MAX_BATCH_PAGES;
use crate::memory::{Layout, Transfer};
use crate::units::{PAGE_SIZE, PageNumber, PageRun};

/// How the pages of a run are given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coding {
    /// All zeros; nothing follows.
    Zero,
    /// Literal: 4096 bytes each follow, in the order of the records.
    Literal,
}

/// Pages that are given the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Which pages.
    pub run: PageRun,
    /// How they are given.
    pub coding: Coding,
}

/// Writes the part of the body before the literal pages. Records must ascend.
pub(crate) fn encode_records(records: &[Record], out: &mut Vec<u8>) {
    let start = out.len();
    let mut writer = Writer(out);
    writer.u32(0);
    let mut at = 0;
    for record in records {
        writer.varint(record.run.first.0 - at);
        writer.varint(record.run.count << 2 | record.coding as u64);
        at = record.run.end();
    }
    let len = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
}

/// Splits a body into its records part (with its length field) and its literal part.
fn split(body: &[u8]) -> Result<(&[u8], &[u8]), WireError> {
    let len = Reader::new(body).u32("records")? as usize;
    let end = len.checked_add(4).ok_or(WireError::Truncated("records"))?;
    body.split_at_checked(end).ok_or(WireError::Truncated("records"))
}

/// Parses and checks a body: fills `records`, and returns the checksummed part and the literal part.
///
/// Every run lies within one region that travels, no more than [`MAX_BATCH_PAGES`] pages are named, and the
/// literal part holds exactly the pages that were announced.
pub(crate) fn decode<'a>(
    body: &'a [u8],
    layout: &Layout,
    records: &mut Vec<Record>,
) -> Result<(&'a [u8], &'a [u8]), WireError> {
    records.clear();
    let (head, literals) = split(body)?;
    let mut reader = Reader::new(&head[4..]);
    let (mut at, mut pages, mut literal_pages) = (0u64, 0u64, 0usize);
    while !reader.is_empty() {
        let gap = reader.varint("record")?;
        let packed = reader.varint("record")?;
        let (count, first) = (packed >> 2, at.checked_add(gap));
        let outside = WireError::Pages { first: first.unwrap_or(u64::MAX), count };
        let coding = match packed & 3 {
            0 => Coding::Zero,
            1 => Coding::Literal,
            value => return Err(WireError::Value { what: "page coding", value }),
        };
        pages = pages.saturating_add(count);
        if count == 0 || pages > MAX_BATCH_PAGES as u64 {
            return Err(WireError::Value { what: "pages in a batch", value: pages });
        }
        let Some(first) = first else { return Err(outside) };
        let run = PageRun { first: PageNumber(first), count };
        let region = layout.locate_run(run).and_then(|(region, _)| layout.region(region));
        if region.is_none_or(|region| region.transfer != Transfer::Copy) {
            return Err(outside);
        }
        at = run.end();
        if coding == Coding::Literal {
            literal_pages += count as usize;
        }
        records.push(Record { run, coding });
    }
    let expected = literal_pages * PAGE_SIZE;
    if literals.len() < expected {
        return Err(WireError::Truncated("literal pages"));
    }
    if literals.len() > expected {
        return Err(WireError::Trailing(literals.len() - expected));
    }
    Ok((head, literals))
}
