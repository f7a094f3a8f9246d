//! What stands in the file, as bytes (`FORMAT.md`). Nothing that is read here is trusted.

use std::path::Path;

use pageferry::limits::MAX_LANES;
use pageferry::wire::{PROTOCOL_MAX, PROTOCOL_MIN};
use twox_hash::XxHash3_128;

use crate::error::{FileFailure, Part};

/// The version of the format that this build writes and reads.
pub const FORMAT_VERSION: u32 = 1;

/// Everything in the file starts and ends at a multiple of this: what direct I/O wants on every device in use.
pub(crate) const BLOCK: usize = 4096;

/// The longest extent: long enough for a disk to work at full speed on each.
pub(crate) const MAX_EXTENT: usize = 4 << 20;

/// The shortest length of an extent that is not a lane's last.
const MIN_EXTENT: usize = 512 << 10;

/// Extents in a file, so that a made-up table takes no more than 160 MiB: 2 TiB of guest with 128 lanes, 16 TiB with few.
pub(crate) const MAX_EXTENTS: u64 = 1 << 22;

/// The first bytes of the file.
const MAGIC: [u8; 8] = *b"PGFYSAVE";

/// Where the header's own checksum stands.
const HEADER_CHECK: usize = BLOCK - 16;

/// Bytes of an entry of the table.
const ENTRY: usize = 24;

/// The lane that messages travel on, and pages too if there is no other.
pub(crate) const CONTROL: u16 = 0;

/// The number that a data lane has in the file.
pub(crate) fn data_lane(index: u16) -> u16 {
    index.saturating_add(1)
}

/// How long extents are: with many lanes they are shorter, so that what waits to be written or was read ahead stays bounded.
pub(crate) fn extent_len(data_lanes: u16) -> usize {
    // Powers of two: 4 MiB up to 7 data lanes, 512 KiB from 64.
    let share = (32 << 20) / (usize::from(data_lanes) + 1);
    let power = if share.is_power_of_two() { share } else { share.next_power_of_two() / 2 };
    power.clamp(MIN_EXTENT, MAX_EXTENT)
}

/// A length rounded up to whole blocks.
pub(crate) fn padded(len: usize) -> usize {
    len.next_multiple_of(BLOCK)
}

/// The checksum of every part of the file.
pub(crate) fn checksum(bytes: &[u8]) -> u128 {
    XxHash3_128::oneshot(bytes)
}

/// The first block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    /// The protocol of the frames.
    pub(crate) protocol: u16,
    /// Data lanes that the guest was saved over.
    pub(crate) data_lanes: u16,
    /// Bytes of the whole file.
    pub(crate) file_len: u64,
    /// Where the table starts: where the last extent ends.
    pub(crate) table_offset: u64,
    /// Entries of the table.
    pub(crate) extents: u64,
    /// Checksum of the table with its padding.
    pub(crate) table_check: u128,
}

impl Header {
    /// The block as bytes.
    pub(crate) fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[0..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        block[12..14].copy_from_slice(&self.protocol.to_le_bytes());
        block[14..16].copy_from_slice(&self.data_lanes.to_le_bytes());
        block[16..24].copy_from_slice(&self.file_len.to_le_bytes());
        block[24..32].copy_from_slice(&self.table_offset.to_le_bytes());
        block[32..40].copy_from_slice(&self.extents.to_le_bytes());
        block[40..56].copy_from_slice(&self.table_check.to_le_bytes());
        let check = checksum(&block[..HEADER_CHECK]);
        block[HEADER_CHECK..].copy_from_slice(&check.to_le_bytes());
        block
    }

    /// Reads the start of a file of `len` bytes: one block of it, or all there is. Every number is within its limits, and the
    /// parts of the file fit each other, when this returns a header.
    pub(crate) fn decode(start: &[u8], len: u64, path: &Path) -> Result<Self, FileFailure> {
        let path = || path.to_owned();
        if !start.starts_with(&MAGIC) {
            return Err(FileFailure::NotASave { path: path() });
        }
        let Some(block) = start.first_chunk::<BLOCK>() else {
            return Err(FileFailure::Truncated { path: path(), len, expected: BLOCK as u64 });
        };
        if checksum(&block[..HEADER_CHECK]).to_le_bytes() != block[HEADER_CHECK..] {
            return Err(FileFailure::Damaged { path: path(), part: Part::Header, offset: 0, len: BLOCK as u64 });
        }
        let found = u32::from_le_bytes(field(block, 8));
        if found != FORMAT_VERSION {
            return Err(FileFailure::Format { path: path(), found, ours: FORMAT_VERSION });
        }
        let header = Self {
            protocol: u16::from_le_bytes(field(block, 12)),
            data_lanes: u16::from_le_bytes(field(block, 14)),
            file_len: u64::from_le_bytes(field(block, 16)),
            table_offset: u64::from_le_bytes(field(block, 24)),
            extents: u64::from_le_bytes(field(block, 32)),
            table_check: u128::from_le_bytes(field(block, 40)),
        };
        header.check(len, path())?;
        Ok(header)
    }

    fn check(&self, len: u64, path: std::path::PathBuf) -> Result<(), FileFailure> {
        if !(PROTOCOL_MIN..=PROTOCOL_MAX).contains(&self.protocol) {
            let (found, lowest, highest) = (self.protocol, PROTOCOL_MIN, PROTOCOL_MAX);
            return Err(FileFailure::Protocol { path, found, lowest, highest });
        }
        let sound = self.data_lanes <= MAX_LANES
            && self.extents <= MAX_EXTENTS
            && self.table_offset >= BLOCK as u64
            && self.table_offset.checked_add(self.table_len() as u64) == Some(self.file_len)
            && self.file_len.is_multiple_of(BLOCK as u64);
        if !sound {
            return Err(FileFailure::Invalid { path, what: format!("its header says {self:?}") });
        }
        let expected = self.file_len;
        match len.cmp(&expected) {
            std::cmp::Ordering::Less => Err(FileFailure::Truncated { path, len, expected }),
            std::cmp::Ordering::Greater => Err(FileFailure::TooLong { path, len, expected }),
            std::cmp::Ordering::Equal => Ok(()),
        }
    }

    /// Bytes of the table with its padding.
    pub(crate) fn table_len(&self) -> usize {
        padded(self.extents as usize * ENTRY)
    }
}

/// A piece of what one lane carried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Extent {
    /// Which lane: 0 for the control lane, data lane `i` has `i + 1`.
    pub(crate) lane: u16,
    /// Bytes of it that the lane carried; zeros follow to the end of the block.
    pub(crate) len: u32,
    /// Checksum of the extent with its padding.
    pub(crate) check: u128,
}

impl Extent {
    /// Bytes that it takes in the file.
    pub(crate) fn padded_len(&self) -> usize {
        padded(self.len as usize)
    }
}

/// The table as bytes, padding included.
pub(crate) fn encode_table(extents: &[Extent]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(padded(extents.len() * ENTRY));
    for extent in extents {
        bytes.extend_from_slice(&extent.len.to_le_bytes());
        bytes.extend_from_slice(&extent.lane.to_le_bytes());
        bytes.extend_from_slice(&[0; 2]);
        bytes.extend_from_slice(&extent.check.to_le_bytes());
    }
    bytes.resize(padded(bytes.len()), 0);
    bytes
}

/// Reads a table. The extents fill the file between header and table, each of a lane that there is, none longer than it may
/// be, when this returns them.
pub(crate) fn decode_table(header: &Header, bytes: &[u8], path: &Path) -> Result<Vec<Extent>, FileFailure> {
    let invalid = |what| FileFailure::Invalid { path: path.to_owned(), what };
    if checksum(bytes) != header.table_check {
        let (offset, len) = (header.table_offset, bytes.len() as u64);
        return Err(FileFailure::Damaged { path: path.to_owned(), part: Part::Table, offset, len });
    }
    let longest = extent_len(header.data_lanes);
    let mut extents = Vec::with_capacity(header.extents as usize);
    let mut end = BLOCK as u64;
    for (index, entry) in bytes.chunks_exact(ENTRY).take(header.extents as usize).enumerate() {
        let extent = Extent {
            len: u32::from_le_bytes(field(entry, 0)),
            lane: u16::from_le_bytes(field(entry, 4)),
            check: u128::from_le_bytes(field(entry, 8)),
        };
        if extent.len == 0 || extent.len as usize > longest || extent.lane > header.data_lanes {
            return Err(invalid(format!("extent {index} has {} bytes of lane {}", extent.len, extent.lane)));
        }
        end += extent.padded_len() as u64;
        extents.push(extent);
    }
    if end != header.table_offset || extents.len() as u64 != header.extents {
        return Err(invalid(format!("its extents end at byte {end}, and the table begins at {}", header.table_offset)));
    }
    Ok(extents)
}

/// Bytes at a fixed place in a block that is long enough.
fn field<const LEN: usize>(bytes: &[u8], at: usize) -> [u8; LEN] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; LEN])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> (Header, Vec<Extent>) {
        let extents = vec![
            Extent { lane: 0, len: 100, check: 1 },
            Extent { lane: 2, len: 4 << 20, check: 2 },
            Extent { lane: 1, len: 5000, check: u128::MAX },
        ];
        let table = encode_table(&extents);
        let table_offset = (4096 + 4096 + (4 << 20) + 8192) as u64;
        let header = Header {
            protocol: PROTOCOL_MAX,
            data_lanes: 2,
            file_len: table_offset + table.len() as u64,
            table_offset,
            extents: 3,
            table_check: checksum(&table),
        };
        (header, extents)
    }

    #[test]
    fn header_and_table_are_read_as_they_were_written() {
        let (header, extents) = example();
        let path = Path::new("x");
        assert_eq!(Header::decode(&header.encode(), header.file_len, path).unwrap(), header);
        assert_eq!(decode_table(&header, &encode_table(&extents), path).unwrap(), extents);
    }

    #[test]
    fn any_flipped_bit_is_found_padding_included() {
        let (header, extents) = example();
        let path = Path::new("x");
        for (bytes, is_header) in [(header.encode().to_vec(), true), (encode_table(&extents), false)] {
            for bit in 0..bytes.len() * 8 {
                let mut damaged = bytes.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let refused = if is_header {
                    Header::decode(&damaged, header.file_len, path).is_err()
                } else {
                    decode_table(&header, &damaged, path).is_err()
                };
                assert!(refused, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_length_that_is_not_the_one_in_the_header_is_told() {
        let (header, _) = example();
        let block = header.encode();
        let told = |start: &[u8], len| Header::decode(start, len, Path::new("x")).unwrap_err().to_string();
        assert!(told(&block, header.file_len - 1).contains(&format!(
            "byte {} of {}",
            header.file_len - 1,
            header.file_len
        )));
        assert!(told(&block, header.file_len + 1).contains("damaged"));
        assert!(told(&block[..100], 100).contains("byte 100 of 4096"));
        assert!(told(b"\x7fELF", 4).contains("no saved guest"));
        assert!(told(b"", 0).contains("no saved guest"));
    }

    #[test]
    fn numbers_that_contradict_each_other_are_refused_under_a_right_checksum() {
        let (good, extents) = example();
        let changes: [fn(&mut Header); 7] = [
            |header| header.data_lanes = MAX_LANES + 1,
            |header| header.extents = u64::MAX,
            |header| header.extents = 1 << 22,
            |header| header.table_offset = 0,
            |header| header.table_offset = u64::MAX - 4095,
            |header| header.table_offset += 1,
            |header| header.protocol = PROTOCOL_MAX + 1,
        ];
        for (case, change) in changes.iter().enumerate() {
            let mut header = good;
            change(&mut header);
            assert!(Header::decode(&header.encode(), good.file_len, Path::new("x")).is_err(), "case {case}");
        }
        let changes: [fn(&mut Vec<Extent>); 5] = [
            |extents| extents[0].len = 0,
            |extents| extents[1].len += 1,
            |extents| extents[2].lane = 3,
            |extents| extents[0].len = u32::MAX,
            |extents| extents[2].len = 9000,
        ];
        for (case, change) in changes.iter().enumerate() {
            let mut extents = extents.clone();
            change(&mut extents);
            let table = encode_table(&extents);
            let header = Header { table_check: checksum(&table), ..good };
            assert!(decode_table(&header, &table, Path::new("x")).is_err(), "case {case}");
        }
    }

    #[test]
    fn a_newer_format_is_told_from_damage() {
        let (header, _) = example();
        let mut block = header.encode();
        block[8] = 2;
        let check = checksum(&block[..HEADER_CHECK]);
        block[HEADER_CHECK..].copy_from_slice(&check.to_le_bytes());
        let told = Header::decode(&block, header.file_len, Path::new("x")).unwrap_err();
        assert!(matches!(told, FileFailure::Format { found: 2, ours: 1, .. }), "{told}");
    }

    #[test]
    fn extents_of_all_lanes_together_stay_within_bounds() {
        for lanes in 0..=MAX_LANES {
            let len = extent_len(lanes);
            assert!(len.is_power_of_two() && len * (usize::from(lanes) + 1) <= 65 << 20, "{lanes}");
        }
        assert_eq!(
            (extent_len(0), extent_len(7), extent_len(8), extent_len(128)),
            (4 << 20, 4 << 20, 2 << 20, 512 << 10)
        );
    }
}
