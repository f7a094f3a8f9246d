//! What a memory image is made of, and what compression and deduplication can make of it: a forecast of bytes,
//! without a migration. `images/make.sh` makes images of working machines.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use pageferry::digest::{DigestKey, PageHasher};
use pageferry::memory::is_zero;
use zstd::bulk::{Compressor, Decompressor};

use crate::outcome::Outcome;
use crate::{BenchError, host};

const PAGE: usize = 4096;

/// Pages compressed together: what a large batch of a migration holds.
const BLOCK: usize = 512 << 10;

const LEVEL: i32 = 1;

#[derive(Args, Debug)]
pub(crate) struct ImageOptions {
    /// A flat image of a machine's physical memory
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// `pageferry-bench image`.
pub(crate) fn image(options: &ImageOptions) -> Result<Outcome, BenchError> {
    let path = &options.file;
    let mut outcome = Outcome::new("image", path.display().to_string());
    let found = survey(open(path)?)?;
    let whole = stream(open(path)?)?;
    let bytes = found.pages * PAGE as u64;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let percent = |part: u64, of: u64| 100.0 * part as f64 / of as f64;
    outcome.figure("memory", "MiB", mib(bytes), None);
    outcome.figure("zero pages", "%", percent(found.zero, found.pages), None);
    outcome.figure("duplicates of an earlier page", "% of all", percent(found.duplicates, found.pages), None);
    let filled = found.pages - found.zero;
    outcome.figure("duplicates of an earlier page", "% of rest", percent(found.duplicates, filled), None);
    outcome.figure("zstd 1, the file as one stream", "times", bytes as f64 / whole as f64, None);
    outcome.figure("zstd 1, blocks of non-zero pages", "times", found.all.ratio(), None);
    outcome.figure("non-zero pages after that", "MiB", mib(found.all.packed), None);
    outcome.figure("first copies only, after that", "MiB", mib(found.first.packed), None);
    outcome.figure(
        "first copies, of all non-zero pages",
        "",
        found.first.packed as f64 / found.all.packed as f64,
        None,
    );
    outcome.note(format!("blocks of {} KiB, each of them unpacked again and compared", BLOCK >> 10));
    Ok(outcome)
}

fn open(path: &Path) -> Result<BufReader<File>, BenchError> {
    let file = File::open(path).map_err(|source| BenchError::File { path: path.to_owned(), source })?;
    Ok(BufReader::with_capacity(1 << 20, file))
}

/// What was found in an image.
#[derive(Debug)]
struct Survey {
    pages: u64,
    zero: u64,
    duplicates: u64,
    /// All pages that are not zero.
    all: Blocks,
    /// Those of them that are like no earlier one.
    first: Blocks,
}

/// Looks at every page. What is left of a page at the end of the image counts as if zeros followed.
fn survey(mut image: impl Read) -> Result<Survey, BenchError> {
    let hasher = PageHasher::new(&DigestKey([0x5a; 32]));
    let mut seen: HashSet<u128> = HashSet::new();
    let mut found = Survey { pages: 0, zero: 0, duplicates: 0, all: Blocks::new()?, first: Blocks::new()? };
    let mut page = [0; PAGE];
    while read_page(&mut image, &mut page).map_err(host("cannot read the image"))? {
        found.pages += 1;
        if is_zero(&page) {
            found.zero += 1;
            continue;
        }
        found.all.add(&page)?;
        if seen.insert(hasher.hash(&page).0) {
            found.first.add(&page)?;
        } else {
            found.duplicates += 1;
        }
    }
    found.all.close()?;
    found.first.close()?;
    if found.pages == 0 {
        return Err(BenchError::Wrong("the image is empty".to_owned()));
    }
    Ok(found)
}

fn read_page(from: &mut impl Read, page: &mut [u8; PAGE]) -> io::Result<bool> {
    let mut filled = 0;
    while filled < PAGE {
        match from.read(&mut page[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    page[filled..].fill(0);
    Ok(filled > 0)
}

/// Bytes of everything as one stream, compressed.
fn stream(mut image: impl Read) -> Result<u64, BenchError> {
    let mut packed = Counted(0);
    zstd::stream::copy_encode(&mut image, &mut packed, LEVEL).map_err(host("cannot compress the image"))?;
    Ok(packed.0)
}

/// Counts what is written.
struct Counted(u64);

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Pages, compressed a block at a time.
struct Blocks {
    compressor: Compressor<'static>,
    decompressor: Decompressor<'static>,
    block: Vec<u8>,
    plain: u64,
    packed: u64,
}

impl std::fmt::Debug for Blocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Blocks").field("plain", &self.plain).field("packed", &self.packed).finish_non_exhaustive()
    }
}

impl Blocks {
    fn new() -> Result<Self, BenchError> {
        Ok(Self {
            compressor: Compressor::new(LEVEL).map_err(host("cannot set up zstd"))?,
            decompressor: Decompressor::new().map_err(host("cannot set up zstd"))?,
            block: Vec::with_capacity(BLOCK),
            plain: 0,
            packed: 0,
        })
    }

    fn add(&mut self, page: &[u8; PAGE]) -> Result<(), BenchError> {
        self.block.extend_from_slice(page);
        if self.block.len() == BLOCK { self.close() } else { Ok(()) }
    }

    /// Compresses what has come together.
    fn close(&mut self) -> Result<(), BenchError> {
        if self.block.is_empty() {
            return Ok(());
        }
        let packed = self.compressor.compress(&self.block).map_err(host("cannot compress a block"))?;
        let unpacked = self.decompressor.decompress(&packed, BLOCK).map_err(host("cannot unpack a block"))?;
        if unpacked != self.block {
            return Err(BenchError::Wrong("a block is not what it was before it was compressed".to_owned()));
        }
        self.plain += self.block.len() as u64;
        // A block that does not get smaller is sent as it is.
        self.packed += packed.len().min(self.block.len()) as u64;
        self.block.clear();
        Ok(())
    }

    /// How many times smaller the pages get; 1 when there are none.
    fn ratio(&self) -> f64 {
        self.plain.max(1) as f64 / self.packed.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Random;

    /// Pages of bytes that do not compress, one kind for each number; 0 is a page of zeros.
    fn pages(kinds: &[u64]) -> Vec<u8> {
        let page = |&kind: &u64| {
            let mut page = [0; PAGE];
            if kind > 0 {
                Random::new(kind.wrapping_mul(0x9e37_79b9_7f4a_7c15)).fill(&mut page);
            }
            page
        };
        kinds.iter().flat_map(page).collect()
    }

    #[test]
    fn zero_pages_and_later_copies_are_counted() {
        let found = survey(pages(&[1, 0, 2, 1, 0, 1, 3]).as_slice()).unwrap();
        assert_eq!((found.pages, found.zero, found.duplicates), (7, 2, 2));
        assert_eq!((found.all.plain, found.first.plain), (5 * 4096, 3 * 4096));
        assert!(found.first.packed <= 3 * 4096 && found.all.packed < 4 * 4096, "{found:?}");
    }

    #[test]
    fn duplicates_far_apart_cost_nothing_only_where_first_copies_are_counted() {
        let kinds: Vec<u64> = (1..=200).chain(1..=200).collect();
        let found = survey(pages(&kinds).as_slice()).unwrap();
        assert_eq!((found.duplicates, found.all.packed, found.first.packed), (200, 400 * 4096, 200 * 4096));
    }

    #[test]
    fn a_cut_page_counts_as_one_with_zeros_after_it() {
        let mut image = pages(&[7, 7]);
        image.truncate(4096 + 5);
        let found = survey(image.as_slice()).unwrap();
        assert_eq!((found.pages, found.duplicates), (2, 0));
        assert!(survey([].as_slice()).is_err());
    }

    #[test]
    fn one_stream_of_zeros_is_next_to_nothing() {
        assert!(stream(io::repeat(0).take(1 << 20)).unwrap() < 1000);
        assert!(stream(pages(&[1, 2, 3]).as_slice()).unwrap() >= 3 * 4096);
    }
}
