//! The bytes themselves: copies between guest memory and private buffers, and the zero test.
//!
//! Guest memory may be written by the guest while it is read here. No Rust reference to it is ever
//! made, and every access is either volatile or an instruction the compiler cannot see into, so a
//! racing write can only make the copy torn, never undefined. Torn copies are resent (R2).
#![allow(unsafe_code)]

use crate::units::PAGE_SIZE;

/// Copies guest memory into a private buffer.
///
/// # Safety
///
/// `source` must be readable for `into.len()` bytes; the two must not overlap.
pub(crate) unsafe fn copy_from_guest(source: *const u8, into: &mut [u8]) {
    // SAFETY: the caller vouches for the source; `into` is a valid exclusive slice.
    unsafe { copy_opaque(source, into.as_mut_ptr(), into.len()) }
}

/// Copies a private buffer into guest memory.
///
/// # Safety
///
/// `target` must be writable for `from.len()` bytes; the two must not overlap.
pub(crate) unsafe fn copy_to_guest(from: &[u8], target: *mut u8) {
    // SAFETY: the caller vouches for the target; `from` is a valid slice.
    unsafe { copy_opaque(from.as_ptr(), target, from.len()) }
}

/// Reads one page of guest memory, each byte once. Returns `true` when every byte read was zero
/// (`into` is then unchanged); otherwise `into` holds the page.
///
/// # Safety
///
/// `source` must be readable for a page and aligned to 32 bytes.
pub(crate) unsafe fn copy_from_guest_unless_zero(source: *const u8, into: &mut [u8; PAGE_SIZE]) -> bool {
    // SAFETY: as the caller vouches.
    let zeros = unsafe { leading_zeros(source) };
    if zeros == PAGE_SIZE {
        return true;
    }
    // The bytes before `zeros` were read as zeros; reading them again could see something else.
    into[..zeros].fill(0);
    // SAFETY: `zeros < PAGE_SIZE`, so the rest lies in the page the caller vouches for.
    unsafe { copy_from_guest(source.add(zeros), &mut into[zeros..]) };
    false
}

#[cfg(target_arch = "x86_64")]
unsafe fn copy_opaque(source: *const u8, target: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges; `rep movsb` reads and writes exactly `len` bytes.
    unsafe {
        core::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") source => _,
            inout("rdi") target => _,
            options(nostack, preserves_flags)
        );
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn copy_opaque(source: *const u8, target: *mut u8, len: usize) {
    let words = if source.align_offset(8) == 0 && target.align_offset(8) == 0 { len / 8 } else { 0 };
    for index in 0..words {
        // SAFETY: in range as the caller vouches; both pointers are 8-byte aligned.
        unsafe {
            let word = source.cast::<u64>().add(index).read_volatile();
            target.cast::<u64>().add(index).write_volatile(word);
        }
    }
    for index in words * 8..len {
        // SAFETY: in range as the caller vouches.
        unsafe { target.add(index).write_volatile(source.add(index).read_volatile()) };
    }
}

/// Bytes of a page, in blocks of 128, before the first block that is not all zeros.
unsafe fn leading_zeros(source: *const u8) -> usize {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there; the caller vouches for the page.
        return unsafe { leading_zeros_avx2(source) };
    }
    // SAFETY: as the caller vouches.
    unsafe { leading_zeros_words(source) }
}

unsafe fn leading_zeros_words(source: *const u8) -> usize {
    #[allow(clippy::cast_ptr_alignment)] // pages are aligned to far more
    let words = source.cast::<u64>();
    for block in 0..PAGE_SIZE / 128 {
        let mut any = 0u64;
        for word in 0..16 {
            // SAFETY: inside the page, and aligned because the page is.
            any |= unsafe { words.add(block * 16 + word).read_volatile() };
        }
        if any != 0 {
            return block * 128;
        }
    }
    PAGE_SIZE
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn leading_zeros_avx2(source: *const u8) -> usize {
    use std::arch::x86_64::{__m256i, _mm256_or_si256, _mm256_testz_si256};
    #[allow(clippy::cast_ptr_alignment)] // pages are aligned to far more
    let vectors = source.cast::<__m256i>();
    for block in 0..PAGE_SIZE / 128 {
        // SAFETY: four 32-byte loads inside the page; pages are 32-byte aligned.
        let [a, b, c, d] = unsafe {
            let at = vectors.add(block * 4);
            [at.read_volatile(), at.add(1).read_volatile(), at.add(2).read_volatile(), at.add(3).read_volatile()]
        };
        let any = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
        if _mm256_testz_si256(any, any) == 0 {
            return block * 128;
        }
    }
    PAGE_SIZE
}

/// Whether a private buffer holds only zeros: the portable version, and the oracle of the fast one.
pub fn is_zero_portable(bytes: &[u8]) -> bool {
    bytes.iter().all(|&byte| byte == 0)
}

/// Whether a private buffer holds only zeros, at memory speed.
pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: `align_to` makes no assumption that plain bytes could break.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    let blocks = words.chunks_exact(16);
    let rest = blocks.remainder();
    is_zero_portable(head)
        && is_zero_portable(tail)
        && rest.iter().all(|&word| word == 0)
        && blocks.into_iter().all(|block| block.iter().fold(0, |any, word| any | word) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[repr(align(4096))]
    struct Page([u8; PAGE_SIZE]);

    /// A small generator, so that the oracle sees the same pages in every run.
    fn next(state: &mut u64) -> u64 {
        *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *state >> 33
    }

    #[test]
    fn every_zero_test_agrees_with_the_naive_one_on_sparse_random_pages() {
        let mut state = 7;
        for round in 0..4000 {
            let mut page = Page([0; PAGE_SIZE]);
            for _ in 0..round % 3 {
                page.0[next(&mut state) as usize % PAGE_SIZE] = next(&mut state) as u8;
            }
            let naive = is_zero_portable(&page.0);
            assert_eq!(is_zero(&page.0), naive);
            // SAFETY: a whole aligned page of our own.
            assert_eq!(unsafe { leading_zeros_words(page.0.as_ptr()) } == PAGE_SIZE, naive);
            let mut copy = [0xAA; PAGE_SIZE];
            // SAFETY: a whole aligned page of our own.
            let zero = unsafe { copy_from_guest_unless_zero(page.0.as_ptr(), &mut copy) };
            assert_eq!(zero, naive);
            assert!(zero || copy == page.0);
        }
    }

    #[test]
    fn a_single_bit_anywhere_in_a_page_is_seen() {
        let mut page = Page([0; PAGE_SIZE]);
        for byte in 0..PAGE_SIZE {
            page.0[byte] = 1 << (byte % 8);
            let mut copy = [0xAA; PAGE_SIZE];
            // SAFETY: a whole aligned page of our own.
            assert!(!unsafe { copy_from_guest_unless_zero(page.0.as_ptr(), &mut copy) }, "byte {byte}");
            assert!(copy == page.0, "byte {byte}");
            assert!(!is_zero(&page.0), "byte {byte}");
            page.0[byte] = 0;
        }
    }

    #[test]
    fn zero_test_of_odd_lengths() {
        let mut bytes = vec![0u8; 300];
        for len in 0..bytes.len() {
            assert!(is_zero(&bytes[1..][..len.min(299)]));
        }
        bytes[299] = 1;
        assert!(!is_zero(&bytes) && !is_zero(&bytes[3..]));
    }
}
