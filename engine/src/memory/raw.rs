//! The bytes themselves: copies between guest memory and private buffers, and the zero test.
//!
//! Guest memory may be written by the guest while it is read here. No Rust reference to it is ever
//! made, and every access is either volatile or an instruction the compiler cannot see into, so a
//! racing write can only make the copy torn, never undefined. Torn copies are resent (R2).
#![allow(unsafe_code)]

use crate::units::PAGE_SIZE;

/// How far ahead of a copy out of guest memory the next lines are fetched: the hardware stops at
/// every page's end (measured, `benches/NOTES.md`).
const PREFETCH_AHEAD: usize = 2048;

/// Lines of the next page that are fetched when a page is begun: the hardware goes on by itself once
/// it has seen a page's first lines.
const NEXT_PAGE_LINES: usize = 12;

/// Copies guest memory into a private buffer.
///
/// # Safety
///
/// `source` must be readable for `into.len()` bytes; the two must not overlap.
pub(crate) unsafe fn copy_from_guest(source: *const u8, into: &mut [u8]) {
    // SAFETY: the caller vouches for the source; `into` is a valid exclusive slice.
    unsafe { copy_opaque(source, into.as_mut_ptr(), into.len()) }
}

/// Copies a private buffer into guest memory. Whole pages go past the caches: nobody reads them
/// soon, and a plain store would first fetch the line it overwrites.
///
/// # Safety
///
/// `target` must be writable for `from.len()` bytes; the two must not overlap.
pub(crate) unsafe fn copy_to_guest(from: &[u8], target: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    if from.len().is_multiple_of(PAGE_SIZE)
        && (target as usize).is_multiple_of(PAGE_SIZE)
        && std::arch::is_x86_feature_detected!("avx2")
    {
        // SAFETY: AVX2 is there, whole pages, an aligned target; the caller vouches for the rest.
        unsafe { stream_pages_avx2(from, target) };
        return finish_streaming();
    }
    // SAFETY: the caller vouches for the target; `from` is a valid slice.
    unsafe { copy_opaque(from.as_ptr(), target, from.len()) }
}

/// Reads one page of guest memory. Returns `true` when every byte read was zero (`into` is then
/// unchanged); otherwise `into` holds the page. Each byte that is used was read once: of the block
/// that ended the search for zeros only the second reading counts.
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
    let rest = &mut into[zeros..];
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there; `zeros` is a multiple of 128 below the page size, so the rest lies
        // in the page the caller vouches for and is aligned as the page is.
        unsafe { copy_blocks_avx2(source.add(zeros), rest) };
        return false;
    }
    // SAFETY: `zeros < PAGE_SIZE`, so the rest lies in the page the caller vouches for.
    unsafe { copy_from_guest(source.add(zeros), rest) };
    false
}

/// Copies blocks of 128 bytes; `into.len()` must be a multiple of that.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn copy_blocks_avx2(source: *const u8, into: &mut [u8]) {
    use std::arch::x86_64::{__m256i, _MM_HINT_T0, _mm_prefetch, _mm256_storeu_si256};
    for (index, block) in into.chunks_exact_mut(128).enumerate() {
        // SAFETY: the caller vouches for `into.len()` readable bytes, 32-byte aligned; a prefetch may
        // name any address; the block has room for four vectors.
        #[allow(clippy::cast_ptr_alignment)]
        unsafe {
            let from = source.add(index * 128);
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(PREFETCH_AHEAD).cast());
            _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(PREFETCH_AHEAD + 64).cast());
            let (from, to) = (from.cast::<__m256i>(), block.as_mut_ptr().cast::<__m256i>());
            for vector in 0..4 {
                _mm256_storeu_si256(to.add(vector), from.add(vector).read_volatile());
            }
        }
    }
}

/// Copies one page into guest memory past the caches. Other threads see it after
/// [`finish_streaming`]: the fence waits for memory, so one serves many pages.
///
/// # Safety
///
/// `target` must be writable for a page and aligned to one.
pub(crate) unsafe fn stream_page(from: &[u8; PAGE_SIZE], target: *mut u8) {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: AVX2 is there; the caller vouches for the target.
        return unsafe { stream_pages_avx2(from, target) };
    }
    // SAFETY: the caller vouches for the target.
    unsafe { copy_opaque(from.as_ptr(), target, PAGE_SIZE) }
}

/// Makes streamed pages visible to other threads: streaming stores are ordered by nothing else.
pub(crate) fn finish_streaming() {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe)] // safe in later versions of Rust
    // SAFETY: SSE is part of x86-64.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

/// Copies whole pages to an aligned target with stores that bypass the caches.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn stream_pages_avx2(from: &[u8], target: *mut u8) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_stream_si256};
    #[allow(clippy::cast_ptr_alignment)] // the target is page-aligned
    let to = target.cast::<__m256i>();
    for (index, vector) in from.chunks_exact(32).enumerate() {
        // SAFETY: inside both ranges; the caller vouches for the target and its alignment.
        unsafe { _mm256_stream_si256(to.add(index), _mm256_loadu_si256(vector.as_ptr().cast())) };
    }
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
    use std::arch::x86_64::{__m256i, _MM_HINT_T0, _mm_prefetch, _mm256_or_si256, _mm256_testz_si256};
    #[allow(clippy::cast_ptr_alignment)] // pages are aligned to far more
    let vectors = source.cast::<__m256i>();
    for line in 0..NEXT_PAGE_LINES {
        #[allow(unused_unsafe)] // safe in later versions of Rust
        // SAFETY: a prefetch may name any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T0>(source.wrapping_add(PAGE_SIZE + line * 64).cast());
        }
    }
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
    fn streamed_pages_and_odd_lengths_arrive_as_they_are() {
        let mut state = 11;
        let from: Vec<u8> = (0..3 * PAGE_SIZE + 5).map(|_| next(&mut state) as u8).collect();
        for len in [0, 1, 31, 4096, 8192, 3 * 4096, 3 * 4096 + 5] {
            for offset in [0, 1, 32] {
                let mut target = vec![
                    Page([0xEE; PAGE_SIZE]),
                    Page([0xEE; PAGE_SIZE]),
                    Page([0xEE; PAGE_SIZE]),
                    Page([0xEE; PAGE_SIZE]),
                ];
                // SAFETY: four pages of our own, of which fewer than `len + offset` bytes are written.
                let target = unsafe {
                    let start = target.as_mut_ptr().cast::<u8>();
                    copy_to_guest(&from[..len], start.add(offset));
                    std::slice::from_raw_parts(start, 4 * PAGE_SIZE)
                };
                assert!(target[offset..offset + len] == from[..len], "{len} at {offset}");
                assert!(target[offset + len..].iter().all(|&byte| byte == 0xEE), "{len} at {offset}");
            }
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
