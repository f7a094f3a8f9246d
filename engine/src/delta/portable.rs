//! The kernels for every processor, and the shape that the others follow.

use super::{Changes, Kernel, LINES, Page, Parsed, WORD, fits};

type Word = [u8; WORD];

#[derive(Clone, Copy)]
pub(super) struct Portable;

impl Kernel for Portable {
    fn compare(self, base: &Page, new: &Page) -> Option<Changes> {
        let mut changes = Changes { lines: 0, masks: [0; LINES], words: 0 };
        for (line, (base, new)) in lines_of(base).zip(lines_of(new)).enumerate() {
            let mask = (0..8).fold(0, |mask, word| mask | u8::from(base[word] != new[word]) << word);
            changes.masks[line] = mask;
            changes.lines |= u64::from(mask != 0) << line;
            changes.words += mask.count_ones() as usize;
            if !fits(changes.lines.count_ones() as usize, changes.words) {
                return None;
            }
        }
        Some(changes)
    }

    /// Every word of a line is written, and the next one over it when it did not change: which words
    /// changed is not to be predicted, so no branch may depend on it.
    fn pack(self, changes: &Changes, base: &Page, new: &Page, masks: &mut [u8], words: &mut [u8]) {
        let (base, new) = (base.as_chunks::<WORD>().0, new.as_chunks::<WORD>().0);
        let words = words.as_chunks_mut::<WORD>().0;
        let mut at = 0;
        for (line, into) in super::set_bits(changes.lines).zip(masks) {
            *into = changes.masks[line];
            for word in 0..8 {
                words[at] = xor(base[line * 8 + word], new[line * 8 + word]);
                at += usize::from(*into >> word & 1);
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
