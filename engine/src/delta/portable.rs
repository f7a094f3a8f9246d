//! The kernels for every processor, and the shape that the others follow.

use super::{Changes, Kernel, LINES, Page, Parsed, WORD, fits};

type Word = [u8; WORD];

#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Kernel for Portable {
    fn compare(self, base: &Page, new: &Page) -> Option<Changes> {
        let mut masks = [0; LINES];
        let (mut lines, mut words) = (0, 0);
        for (mask, (base, new)) in masks.iter_mut().zip(lines_of(base).zip(lines_of(new))) {
            for word in 0..8 {
                *mask |= u8::from(base[word] != new[word]) << word;
            }
            lines += usize::from(*mask != 0);
            words += mask.count_ones() as usize;
            if !fits(lines, words) {
                return None;
            }
        }
        Some(Changes::new(masks, words))
    }

    /// Every word of a line is written, and the next one over it when it did not change: which words
    /// changed is not to be predicted, so no branch may depend on it.
    fn pack(self, changes: &Changes, base: &Page, new: &Page, into: &mut [u8]) {
        let into = into.as_chunks_mut::<WORD>().0;
        let mut at = 0;
        for ((base, new), mask) in lines_of(base).zip(lines_of(new)).zip(changes.masks) {
            for word in 0..8 {
                into[at] = xor(base[word], new[word]);
                at += usize::from(mask >> word & 1);
            }
        }
    }

    fn unpack(self, delta: &Parsed<'_>, page: &mut Page) {
        let mut words = delta.words.iter();
        let (page, _) = page.as_chunks_mut::<WORD>();
        for (line, mask) in delta.changes() {
            unpack_words(&mut page[line * 8..], mask, &mut words);
        }
    }
}

/// Applies the next words to those of `page` that `mask` names.
pub(super) fn unpack_words<'a>(page: &mut [Word], mask: u8, words: &mut impl Iterator<Item = &'a Word>) {
    for (word, change) in super::set_bits(u64::from(mask)).zip(words) {
        page[word] = xor(page[word], *change);
    }
}

fn lines_of(page: &Page) -> impl Iterator<Item = &[Word; 8]> {
    page.as_chunks::<WORD>().0.as_chunks().0.iter()
}

fn xor(a: Word, b: Word) -> Word {
    (u64::from_ne_bytes(a) ^ u64::from_ne_bytes(b)).to_ne_bytes()
}
