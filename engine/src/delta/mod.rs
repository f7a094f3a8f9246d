//! What changed in a page, against the page that the other side holds.
//!
//! A delta is the XOR of both pages, sparse on two levels. All numbers are little endian:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | bit *i* is set when 64-byte line *i* of the page differs |
//! | 1 for each such line | bit *j* is set when 8-byte word *j* of the line differs; never 0 |
//! | 8 for each such word | the XOR of both versions |
//!
//! The masks stand together, before the words: whatever compresses the delta further finds like beside
//! like. Where the processor has AVX2, it is used.

mod portable;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86_64;

use portable::Portable;
#[cfg(target_arch = "x86_64")]
use x86_64::Avx2;

pub use crate::limits::MAX_DELTA;
use crate::units::PAGE_SIZE;

/// Lines of a page, and bits in a delta's first field.
const LINES: usize = 64;

/// Bytes of a word: the unit of change.
const WORD: usize = 8;

/// Bytes of the first field.
const HEAD: usize = 8;

/// Bytes past the last word that [`Kernel::pack`] may overwrite.
const PACK_MARGIN: usize = 64;

type Page = [u8; PAGE_SIZE];

/// Why bytes are no delta.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeltaError {
    /// The bytes end inside the delta.
    #[error("a delta of at least {needed} bytes ends after {found}")]
    Truncated {
        /// Bytes of the delta, as far as what is there tells.
        needed: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// A line is said to differ, and none of its words is.
    #[error("a delta names line {line} of the page, and no word of it")]
    EmptyLine {
        /// Which line of the page.
        line: usize,
    },
    /// No sender makes a delta as long as this.
    #[error("a delta of {len} bytes; the longest allowed has {MAX_DELTA}")]
    TooLong {
        /// Bytes of the delta.
        len: usize,
    },
}

/// Appends the delta that makes `new` of `base`, and returns its length in bytes: 8 when the pages are
/// equal. `None`, and nothing appended, when it would be longer than [`MAX_DELTA`]; the rest of the
/// page is not looked at then.
pub fn encode(base: &[u8; PAGE_SIZE], new: &[u8; PAGE_SIZE], out: &mut Vec<u8>) -> Option<usize> {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = Avx2::detect() {
        return encode_with(avx2, base, new, out);
    }
    encode_with(Portable, base, new, out)
}

/// Begins to fetch a page that [`encode`] or [`apply`] needs soon: best called one page ahead. Changes
/// nothing but the time that they take.
pub fn prefetch(page: &[u8; PAGE_SIZE]) {
    #[cfg(target_arch = "x86_64")]
    x86_64::prefetch(page);
    #[cfg(not(target_arch = "x86_64"))]
    let _ = page;
}

/// Applies the delta at the front of `delta` to a page in place, and returns how many bytes the delta
/// has; others may follow. On an error the page is unchanged.
pub fn apply(page: &mut [u8; PAGE_SIZE], delta: &[u8]) -> Result<usize, DeltaError> {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = Avx2::detect() {
        return apply_with(avx2, page, delta);
    }
    apply_with(Portable, page, delta)
}

/// The parts of the work that a processor's vectors make faster.
trait Kernel: Copy {
    /// Compares two pages; `None` as soon as their delta is known to be over the limit.
    fn compare(self, base: &Page, new: &Page) -> Option<Changes>;

    /// Writes the masks of the changed lines, and the XOR of every changed word: `words` is
    /// [`PACK_MARGIN`] longer than they are.
    fn pack(self, changes: &Changes, base: &Page, new: &Page, masks: &mut [u8], words: &mut [u8]);

    /// Applies a delta's words to the page.
    fn unpack(self, delta: &Parsed<'_>, page: &mut Page);
}

/// Which words of a page differ.
struct Changes {
    lines: u64,
    /// The changed words of every line, of those that did not change as well.
    masks: [u8; LINES],
    words: usize,
}

/// Whether a delta of so many lines and words is within the limit.
fn fits(line_count: usize, word_count: usize) -> bool {
    HEAD + line_count + word_count * WORD <= MAX_DELTA
}

fn encode_with(kernel: impl Kernel, base: &Page, new: &Page, out: &mut Vec<u8>) -> Option<usize> {
    let changes = kernel.compare(base, new)?;
    let line_count = changes.lines.count_ones() as usize;
    if !fits(line_count, changes.words) {
        return None;
    }
    let start = out.len();
    let len = HEAD + line_count + changes.words * WORD;
    out.extend_from_slice(&changes.lines.to_le_bytes());
    out.resize(start + len + PACK_MARGIN, 0);
    let (masks, words) = out[start + HEAD..].split_at_mut(line_count);
    kernel.pack(&changes, base, new, masks, words);
    out.truncate(start + len);
    Some(len)
}

fn apply_with(kernel: impl Kernel, page: &mut Page, delta: &[u8]) -> Result<usize, DeltaError> {
    let parsed = Parsed::new(delta)?;
    kernel.unpack(&parsed, page);
    Ok(parsed.len())
}

/// A delta whose lengths and masks are right.
struct Parsed<'a> {
    lines: u64,
    /// As many as `lines` has bits; none is 0.
    masks: &'a [u8],
    /// As many as `masks` have bits together.
    words: &'a [[u8; WORD]],
}

impl<'a> Parsed<'a> {
    fn new(delta: &'a [u8]) -> Result<Self, DeltaError> {
        let cut_at = |needed| DeltaError::Truncated { needed, found: delta.len() };
        let (&head, rest) = delta.split_first_chunk().ok_or(cut_at(HEAD))?;
        let lines = u64::from_le_bytes(head);
        let line_count = lines.count_ones() as usize;
        let (masks, rest) = rest.split_at_checked(line_count).ok_or(cut_at(HEAD + line_count * (1 + WORD)))?;
        if let Some((line, _)) = set_bits(lines).zip(masks).find(|(_, mask)| **mask == 0) {
            return Err(DeltaError::EmptyLine { line });
        }
        let word_count = masks.iter().map(|mask| mask.count_ones() as usize).sum::<usize>();
        let len = HEAD + line_count + word_count * WORD;
        if len > MAX_DELTA {
            return Err(DeltaError::TooLong { len });
        }
        let words = rest.as_chunks().0.get(..word_count).ok_or(cut_at(len))?;
        Ok(Self { lines, masks, words })
    }

    fn len(&self) -> usize {
        HEAD + self.masks.len() + self.words.len() * WORD
    }

    /// The lines that change, with the words that do.
    fn changes(&self) -> impl Iterator<Item = (usize, u8)> {
        set_bits(self.lines).zip(self.masks.iter().copied())
    }
}

/// The places of the bits that are set, from the lowest up.
fn set_bits(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let place = bits.trailing_zeros() as usize;
        bits &= bits.checked_sub(1)?;
        Some(place)
    })
}
