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

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(page: &[u8; PAGE_SIZE]) -> Option<u64> {
        let same = (8..PAGE_SIZE).all(|byte| page[byte] == page[byte % 8]);
        same.then(|| (0..8).map(|byte| u64::from(page[byte]) << (8 * byte)).sum())
    }

    fn repeating(word: u64) -> [u8; PAGE_SIZE] {
        std::array::from_fn(|byte| (word >> (byte % 8 * 8)) as u8)
    }

    #[test]
    fn repeated_words_are_found_and_read_as_little_endian() {
        for word in [0, 1, u64::MAX, 0x0123_4567_89AB_CDEF, 0xFF00_0000_0000_0000] {
            let page = repeating(word);
            assert_eq!(repeated_word(&page), Some(word));
            assert_eq!(naive(&page), Some(word));
        }
    }

    #[test]
    fn one_other_bit_anywhere_is_seen() {
        let mut page = repeating(0x5A5A_0000_1234_FFFF);
        for byte in 0..PAGE_SIZE {
            page[byte] ^= 1 << (byte % 8);
            assert_eq!(repeated_word(&page), None, "byte {byte}");
            assert_eq!(naive(&page), None, "byte {byte}");
            page[byte] ^= 1 << (byte % 8);
        }
        assert!(repeated_word(&page).is_some());
    }

    #[test]
    fn a_pattern_of_another_length_is_not_a_repeated_word() {
        for period in [3, 7, 16, 64, 128, 2048] {
            let page = std::array::from_fn(|byte| (byte % period) as u8);
            assert_eq!(repeated_word(&page), naive(&page), "period {period}");
            assert_eq!(repeated_word(&page), None, "period {period}");
        }
        let halves: [u8; PAGE_SIZE] = std::array::from_fn(|byte| (byte % 4) as u8);
        assert_eq!(repeated_word(&halves), Some(0x0302_0100_0302_0100));
    }
}
