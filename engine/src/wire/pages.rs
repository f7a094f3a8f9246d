//! The body of a `Pages` frame: records that say which pages and how they are given, then the payload.
//!
//! | bytes | field |
//! |---|---|
//! | 0..4 | bytes of the head after this field |
//! | 4 | how the payload is packed: 0 not at all, 1 zstd |
//! | 5..9 | bytes of the payload, unpacked |
//! | 9.. | records, to the end of the head |
//! | then | the payload |
//!
//! A record is two unsigned LEB128 numbers: the gap from the end of the run before (from page 0 for the
//! first), and `count * 8 + coding`. A copy has a third: the first page copied from. Runs ascend and never
//! overlap. The payload holds, in the order of the records, first all literal pages, then what deltas and
//! patterns need.

use super::WireError;
use super::fields::{Reader, Writer};
use crate::limits::{MAX_BATCH_PAGES, MAX_DELTA, MAX_PAYLOAD};
use crate::memory::{Layout, Transfer};
use crate::units::{PAGE_SIZE, PageNumber, PageRun};

/// How the pages of a run are given.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Coding {
    /// All zeros; nothing follows.
    Zero,
    /// Literal: 4096 bytes each in the payload.
    Literal,
    /// What changed since the page was last sent: one [delta](crate::delta) each in the payload.
    Delta,
    /// One 8-byte value all over the page: 8 bytes each in the payload.
    Pattern,
    /// The same as other pages, which the destination holds since an earlier step; nothing follows.
    Copy {
        /// The page that the run's first page equals; the second equals the one after it, and so on.
        from: PageNumber,
    },
    /// Written straight into the destination's memory, ahead of this frame on the same lane; nothing follows.
    Written,
}

impl Coding {
    fn code(self) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Literal => 1,
            Self::Delta => 2,
            Self::Pattern => 3,
            Self::Copy { .. } => 4,
            Self::Written => 5,
        }
    }

    /// Whether a run of this coding, `count` pages long, goes on with `next`.
    pub(crate) fn goes_on(self, count: u64, next: Self) -> bool {
        match (self, next) {
            (Self::Copy { from }, Self::Copy { from: next }) => from.0 + count == next.0,
            _ => self == next,
        }
    }

    /// Fewest and most bytes of payload per page.
    fn payload(self) -> (usize, usize) {
        match self {
            Self::Zero | Self::Copy { .. } | Self::Written => (0, 0),
            Self::Literal => (PAGE_SIZE, PAGE_SIZE),
            Self::Delta => (8, MAX_DELTA),
            Self::Pattern => (8, 8),
        }
    }
}

/// How the payload is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Packing {
    /// Not at all.
    #[default]
    Raw,
    /// One zstd frame.
    Zstd,
}

/// Pages that are given the same way.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Which pages.
    pub run: PageRun,
    /// How they are given.
    pub coding: Coding,
}

/// Writes the head of the body. Records must ascend.
pub(crate) fn encode_head(records: &[Record], packing: Packing, payload_len: usize, out: &mut Vec<u8>) {
    let start = out.len();
    let mut writer = Writer(out);
    writer.u32(0);
    writer.u8(match packing {
        Packing::Raw => 0,
        Packing::Zstd => 1,
    });
    writer.u32(payload_len as u32);
    let mut at = 0;
    for record in records {
        writer.varint(record.run.first.0 - at);
        writer.varint(record.run.count << 3 | record.coding.code());
        if let Coding::Copy { from } = record.coding {
            writer.varint(from.0);
        }
        at = record.run.end();
    }
    let len = (out.len() - start - 4) as u32;
    out[start..start + 4].copy_from_slice(&len.to_le_bytes());
}

/// A body whose records have been checked.
#[derive(Clone, Copy, Debug)]
pub struct Body<'a> {
    /// The part that the frame's checksum covers as it is.
    pub head: &'a [u8],
    /// How the payload is packed.
    pub packing: Packing,
    /// The payload as it came.
    pub packed: &'a [u8],
    /// Its length once unpacked, at most [`MAX_PAYLOAD`].
    pub payload_len: usize,
}

/// Parses and checks a body, and fills `records`.
///
/// Every run, and every run copied from, lies within one region that travels; no more than
/// [`MAX_BATCH_PAGES`] pages are named; and the payload is announced with a length that the records can
/// have.
pub fn decode<'a>(body: &'a [u8], layout: &Layout, records: &mut Vec<Record>) -> Result<Body<'a>, WireError> {
    records.clear();
    let len = Reader::new(body).u32("records")? as usize;
    let end = len.checked_add(4).ok_or(WireError::Truncated("records"))?;
    let (head, packed) = body.split_at_checked(end).ok_or(WireError::Truncated("records"))?;
    let mut reader = Reader::new(&head[4..]);
    let packing = match reader.u8("packing")? {
        0 => Packing::Raw,
        1 => Packing::Zstd,
        value => return Err(WireError::Value { what: "packing", value: value.into() }),
    };
    let payload_len = reader.u32("payload length")? as usize;
    let (mut at, mut pages, mut least, mut most) = (0u64, 0u64, 0usize, 0usize);
    while !reader.is_empty() {
        let record = decode_record(&mut reader, at)?;
        pages = pages.saturating_add(record.run.count);
        if record.run.count == 0 || pages > MAX_BATCH_PAGES as u64 {
            return Err(WireError::Value { what: "pages in a batch", value: pages });
        }
        check_run(layout, record.run)?;
        if let Coding::Copy { from } = record.coding {
            check_run(layout, PageRun { first: from, count: record.run.count })?;
        }
        at = record.run.end();
        let count = record.run.count as usize;
        let (min, max) = record.coding.payload();
        (least, most) = (least + count * min, most + count * max);
        records.push(record);
    }
    if !(least..=most.min(MAX_PAYLOAD)).contains(&payload_len) {
        return Err(WireError::Value { what: "payload length", value: payload_len as u64 });
    }
    match packing {
        Packing::Raw if packed.len() < payload_len => Err(WireError::Truncated("payload")),
        Packing::Raw if packed.len() > payload_len => Err(WireError::Trailing(packed.len() - payload_len)),
        _ => Ok(Body { head, packing, packed, payload_len }),
    }
}

fn decode_record(reader: &mut Reader<'_>, at: u64) -> Result<Record, WireError> {
    let gap = reader.varint("record")?;
    let counted = reader.varint("record")?;
    let count = counted >> 3;
    let Some(first) = at.checked_add(gap) else { return Err(WireError::Pages { first: u64::MAX, count }) };
    let coding = match counted & 7 {
        0 => Coding::Zero,
        1 => Coding::Literal,
        2 => Coding::Delta,
        3 => Coding::Pattern,
        4 => Coding::Copy { from: PageNumber(reader.varint("record")?) },
        5 => Coding::Written,
        value => return Err(WireError::Value { what: "page coding", value }),
    };
    Ok(Record { run: PageRun { first: PageNumber(first), count }, coding })
}

fn check_run(layout: &Layout, run: PageRun) -> Result<(), WireError> {
    let region = layout.locate_run(run).and_then(|(region, _)| layout.region(region));
    if region.is_none_or(|region| region.transfer != Transfer::Copy) {
        return Err(WireError::Pages { first: run.first.0, count: run.count });
    }
    Ok(())
}
