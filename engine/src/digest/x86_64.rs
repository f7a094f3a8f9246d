//! The passes with carry-less products of 16, 32 or 64 bytes at a time: the wider, the fewer instructions.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, __m256i, __m512i, _mm_clmulepi64_si128, _mm_loadu_si128, _mm_setzero_si128, _mm_storeu_si128,
    _mm_xor_si128, _mm256_castsi256_si128, _mm256_clmulepi64_epi128, _mm256_extracti128_si256, _mm256_loadu_si256,
    _mm256_setzero_si256, _mm256_xor_si256, _mm512_castsi512_si256, _mm512_clmulepi64_epi128,
    _mm512_extracti64x4_epi64, _mm512_loadu_si512, _mm512_setzero_si512, _mm512_xor_si512,
};

use super::hasher::{PassKey, Passes, SHIFT, WORDS};
use crate::units::PAGE_SIZE;

/// The lower word of every 16 bytes times the higher one.
const LOW_BY_HIGH: i32 = 0x10;

/// Bytes by which the second pass's key is further on.
const SHIFT_BYTES: usize = SHIFT * 8;

/// What the processor can do; made only by [`Vectors::detect`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Vectors {
    Bytes16,
    Bytes32,
    Bytes64,
}

impl Vectors {
    /// All that this processor has, the widest first.
    pub(super) fn detect() -> impl Iterator<Item = Self> {
        let narrow = is_x86_feature_detected!("pclmulqdq");
        let wide = is_x86_feature_detected!("vpclmulqdq") && is_x86_feature_detected!("avx2");
        let widest = wide && is_x86_feature_detected!("avx512f");
        let all = [(widest, Self::Bytes64), (wide, Self::Bytes32), (narrow, Self::Bytes16)];
        all.into_iter().filter_map(|(has, vectors)| has.then_some(vectors))
    }
}

// The safety of the three functions below: what they load lies within the page, which has PAGE_SIZE bytes, and the
// key, which has SHIFT_BYTES more.
const _: () = assert!(size_of::<PassKey>() >= PAGE_SIZE + SHIFT_BYTES && WORDS * 8 == PAGE_SIZE);

#[target_feature(enable = "pclmulqdq")]
fn passes_16(page: &[u8; PAGE_SIZE], key: &PassKey) -> Passes {
    let load = |from: *const u8| {
        // SAFETY: see above.
        unsafe { _mm_loadu_si128(from.cast()) }
    };
    let (page, key) = (page.as_ptr(), key.0.as_ptr().cast::<u8>());
    let mut sums = [_mm_setzero_si128(); 2];
    for at in (0..PAGE_SIZE).step_by(size_of::<__m128i>()) {
        let words = load(page.wrapping_add(at));
        for (pass, sum) in sums.iter_mut().enumerate() {
            let keyed = _mm_xor_si128(words, load(key.wrapping_add(at + pass * SHIFT_BYTES)));
            *sum = _mm_xor_si128(*sum, _mm_clmulepi64_si128::<LOW_BY_HIGH>(keyed, keyed));
        }
    }
    sums.map(whole)
}

#[target_feature(enable = "avx2,vpclmulqdq")]
fn passes_32(page: &[u8; PAGE_SIZE], key: &PassKey) -> Passes {
    let load = |from: *const u8| {
        // SAFETY: see above.
        unsafe { _mm256_loadu_si256(from.cast()) }
    };
    let (page, key) = (page.as_ptr(), key.0.as_ptr().cast::<u8>());
    let mut sums = [_mm256_setzero_si256(); 2];
    for at in (0..PAGE_SIZE).step_by(size_of::<__m256i>()) {
        let words = load(page.wrapping_add(at));
        for (pass, sum) in sums.iter_mut().enumerate() {
            let keyed = _mm256_xor_si256(words, load(key.wrapping_add(at + pass * SHIFT_BYTES)));
            *sum = _mm256_xor_si256(*sum, _mm256_clmulepi64_epi128::<LOW_BY_HIGH>(keyed, keyed));
        }
    }
    sums.map(|sum| whole(halves(sum)))
}

#[target_feature(enable = "avx512f,avx2,vpclmulqdq")]
fn passes_64(page: &[u8; PAGE_SIZE], key: &PassKey) -> Passes {
    let load = |from: *const u8| {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    };
    let (page, key) = (page.as_ptr(), key.0.as_ptr().cast::<u8>());
    let mut sums = [_mm512_setzero_si512(); 2];
    for at in (0..PAGE_SIZE).step_by(size_of::<__m512i>()) {
        let words = load(page.wrapping_add(at));
        for (pass, sum) in sums.iter_mut().enumerate() {
            let keyed = _mm512_xor_si512(words, load(key.wrapping_add(at + pass * SHIFT_BYTES)));
            *sum = _mm512_xor_si512(*sum, _mm512_clmulepi64_epi128::<LOW_BY_HIGH>(keyed, keyed));
        }
    }
    sums.map(|sum| {
        let sum = _mm256_xor_si256(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64::<1>(sum));
        whole(halves(sum))
    })
}

#[target_feature(enable = "avx2")]
fn halves(sum: __m256i) -> __m128i {
    _mm_xor_si128(_mm256_castsi256_si128(sum), _mm256_extracti128_si256::<1>(sum))
}

fn whole(sum: __m128i) -> u128 {
    let mut bytes = [0; 16];
    // SAFETY: 16 bytes are stored into 16 bytes.
    unsafe { _mm_storeu_si128(bytes.as_mut_ptr().cast(), sum) };
    u128::from_le_bytes(bytes)
}

impl Vectors {
    /// The two passes over a page.
    pub(super) fn passes(self, page: &[u8; PAGE_SIZE], key: &PassKey) -> Passes {
        // SAFETY: `self` was detected, and with it what the function needs.
        unsafe {
            match self {
                Self::Bytes16 => passes_16(page, key),
                Self::Bytes32 => passes_32(page, key),
                Self::Bytes64 => passes_64(page, key),
            }
        }
    }
}
