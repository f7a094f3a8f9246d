//! The kernels with 32-byte vectors: half a line, four words, at a time.
//!
//! Words are gathered and spread by permutations that depend on the half line's mask: there is no branch on
//! which words changed.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m256i, _MM_HINT_T1, _mm_cmpeq_epi8, _mm_cvtsi64_si128, _mm_movemask_epi8, _mm_prefetch, _mm_set1_epi8,
    _mm256_and_si256, _mm256_castsi256_pd, _mm256_cmpeq_epi64, _mm256_loadu_si256, _mm256_movemask_pd,
    _mm256_permutevar8x32_epi32, _mm256_set1_epi64x, _mm256_setr_epi64x, _mm256_storeu_si256, _mm256_xor_si256,
};

use super::portable::unpack_words;
use super::{Changes, Kernel, LINES, Page, Parsed, WORD, fits};

const VECTOR: usize = 32;

/// Lines of the next base that are fetched ahead (measured, `benches/NOTES.md`).
const PREFETCH_LINES: usize = 8;

/// Lines compared before the length is looked at: their masks are one `u64`.
const BLOCK: usize = 8;

/// For each mask of four words the permutation, as 32-bit places, that moves the words named to the front.
const GATHER: [[u8; VECTOR]; 16] = permutations(true);

/// The inverse: moves the words at the front to the places named.
const SPREAD: [[u8; VECTOR]; 16] = permutations(false);

const fn permutations(gather: bool) -> [[u8; VECTOR]; 16] {
    let mut table = [[0; VECTOR]; 16];
    let mut mask = 0;
    while mask < 16 {
        let (mut word, mut rank) = (0, 0);
        while word < 4 {
            if mask >> word & 1 == 1 {
                let (from, to) = if gather { (word, rank) } else { (rank, word) };
                table[mask][8 * to] = 2 * from as u8;
                table[mask][8 * to + 4] = 2 * from as u8 + 1;
                rank += 1;
            }
            word += 1;
        }
        mask += 1;
    }
    table
}

/// Proof that the processor has what the kernels need.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub(super) fn detect() -> Option<Self> {
        let here = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("popcnt");
        here.then_some(Self(()))
    }
}

impl Kernel for Avx2 {
    fn compare(self, base: &Page, new: &Page) -> Option<Changes> {
        // SAFETY: `self` exists only where the features were detected.
        unsafe { compare(base, new) }
    }

    fn pack(self, changes: &Changes, base: &Page, new: &Page, masks: &mut [u8], words: &mut [u8]) {
        // SAFETY: as in `compare`.
        unsafe { pack(changes, base, new, masks, words) }
    }

    fn unpack(self, delta: &Parsed<'_>, page: &mut Page) {
        // SAFETY: as in `compare`.
        unsafe { unpack(delta, page) }
    }
}

/// Asks for the first lines of a page, into the second-level cache, whose streamer fetches the others once it
/// has seen these.
pub(super) fn prefetch(page: &Page) {
    for line in page.as_chunks::<64>().0.iter().take(PREFETCH_LINES) {
        #[allow(unused_unsafe)] // safe in later versions of Rust
        // SAFETY: a prefetch may name any address.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().cast());
        }
    }
}

#[target_feature(enable = "avx2,popcnt")]
fn compare(base: &Page, new: &Page) -> Option<Changes> {
    let (base, new) = (blocks(base), blocks(new));
    let mut masks = [0; LINES];
    let (mut lines, mut words) = (0, 0);
    for (index, masks) in masks.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let mut equal = 0;
        for half in 0..2 * BLOCK {
            let words = _mm256_cmpeq_epi64(load(&base[index][half]), load(&new[index][half]));
            equal |= (_mm256_movemask_pd(_mm256_castsi256_pd(words)) as u64) << (4 * half);
        }
        *masks = (!equal).to_le_bytes();
        let unchanged = _mm_cmpeq_epi8(_mm_cvtsi64_si128(equal as i64), _mm_set1_epi8(-1));
        lines |= u64::from(!_mm_movemask_epi8(unchanged) as u8) << (BLOCK * index);
        words += equal.count_zeros() as usize;
        if !fits(lines.count_ones() as usize, words) {
            return None;
        }
    }
    Some(Changes { lines, masks, words })
}

#[target_feature(enable = "avx2,popcnt")]
fn pack(changes: &Changes, base: &Page, new: &Page, masks: &mut [u8], words: &mut [u8]) {
    let (base, new) = (halves(base), halves(new));
    let mut at = 0;
    for (line, into) in super::set_bits(changes.lines).zip(masks) {
        let mask = changes.masks[line];
        *into = mask;
        let Some(into) = words[at..].first_chunk_mut::<{ 2 * VECTOR }>() else { return };
        let [low, high] = [usize::from(mask & 15), usize::from(mask >> 4)];
        for (half, mask, at) in [(0, low, 0), (1, high, low.count_ones() as usize * WORD)] {
            let change = _mm256_xor_si256(load(&base[line][half]), load(&new[line][half]));
            let gathered = _mm256_permutevar8x32_epi32(change, load(&GATHER[mask]));
            if let Some(into) = into[at..].first_chunk_mut() {
                store(into, gathered);
            }
        }
        at += mask.count_ones() as usize * WORD;
    }
}

#[target_feature(enable = "avx2,popcnt")]
fn unpack(delta: &Parsed<'_>, page: &mut Page) {
    let place = _mm256_setr_epi64x(1, 2, 4, 8);
    let mut words = delta.words;
    for (line, mask) in delta.changes() {
        for (half, mask) in [(2 * line, mask & 15), (2 * line + 1, mask >> 4)] {
            let into = &mut page.as_chunks_mut::<VECTOR>().0[half];
            let Some(next) = words.as_flattened().first_chunk() else {
                // The last words are fewer than a vector.
                unpack_words(into.as_chunks_mut().0, mask, &mut words.iter());
                words = &words[mask.count_ones() as usize..];
                continue;
            };
            let spread = _mm256_permutevar8x32_epi32(load(next), load(&SPREAD[usize::from(mask)]));
            let named = _mm256_and_si256(_mm256_set1_epi64x(i64::from(mask)), place);
            let change = _mm256_and_si256(spread, _mm256_cmpeq_epi64(named, place));
            let changed = _mm256_xor_si256(load(into), change);
            store(into, changed);
            words = &words[mask.count_ones() as usize..];
        }
    }
}

/// The two halves of every line.
fn halves(page: &Page) -> &[[[u8; VECTOR]; 2]] {
    page.as_chunks().0.as_chunks().0
}

fn blocks(page: &Page) -> &[[[u8; VECTOR]; 2 * BLOCK]] {
    page.as_chunks().0.as_chunks().0
}

#[target_feature(enable = "avx2")]
fn load(bytes: &[u8; VECTOR]) -> __m256i {
    // SAFETY: the reference is to 32 readable bytes; the instruction takes any alignment.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

#[target_feature(enable = "avx2")]
fn store(bytes: &mut [u8; VECTOR], vector: __m256i) {
    // SAFETY: the reference is to 32 writable bytes; the instruction takes any alignment.
    unsafe { _mm256_storeu_si256(bytes.as_mut_ptr().cast(), vector) }
}
