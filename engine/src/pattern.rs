//! Pages that say one thing over and over.

use crate::units::PAGE_SIZE;

/// Bytes tested before the first difference counts.
const BLOCK: usize = 128;

/// The 8-byte value (little endian) that the whole page repeats, if it does; 0 for a page of zeros.
pub fn repeated_word(page: &[u8; PAGE_SIZE]) -> Option<u64> {
    let words = page.as_chunks::<8>().0;
    let first = u64::from_le_bytes(words[0]);
    // Whole blocks without a branch inside become vector instructions on every processor.
    let repeats =
        |block: &[[u8; 8]; BLOCK / 8]| block.iter().fold(0, |any, word| any | u64::from_le_bytes(*word) ^ first) == 0;
    words.as_chunks().0.iter().all(repeats).then_some(first)
}
