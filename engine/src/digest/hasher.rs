//! The keyed hash of a page: a proven bound on collisions, whoever chooses the pages (R7).
//!
//! Two passes of carry-less NH over 64-bit words, the second with the key moved on (Toeplitz), then a multilinear
//! hash of the 256 bits that come out. Take any two different pages, chosen without knowledge of the key. A pass
//! gives both the same for at most one key in 2^64 (Lemire and Kaser, "Faster 64-bit universal hashing using
//! carry-less multiplications", 2016, on CLNH). Of the last unit of [`SHIFT`] words in which the pages differ, the second pass
//! uses key words that the first uses only where they do not: so both passes fail for at most one key in 2^128. The
//! multilinear hash adds at most that again (Lemire and Kaser, "Strongly universal string hashing is fast", 2014, with
//! independent factors for each half): a collision for less than one key in 2^126, all in all.
//!
//! Fast hashes without such a proof, xxh3 among them, have pairs of pages that collide for one key in 2^33.

use std::fmt;
use std::sync::Arc;

use chacha20::ChaCha20;
use chacha20::cipher::{KeyIvInit, StreamCipher};

#[cfg(target_arch = "x86_64")]
use super::x86_64::Vectors;
use super::{DigestKey, PageHash};
use crate::units::PAGE_SIZE;

/// Words of a page.
pub(super) const WORDS: usize = PAGE_SIZE / 8;

/// Words by which the second pass's key is further on than the first's: 64 bytes, so that vectors of every width
/// find it aligned.
pub(super) const SHIFT: usize = 8;

/// The key of both passes. Aligned to what a cache line holds.
#[repr(C, align(64))]
pub(super) struct PassKey(pub(super) [u64; WORDS + SHIFT]);

/// What the two passes make of a page.
pub(super) type Passes = [u128; 2];

/// Hashes pages under a migration's key. Clones share the stretched key, some 4 KiB.
#[derive(Clone)]
pub struct PageHasher {
    key: Arc<StretchedKey>,
    #[cfg(target_arch = "x86_64")]
    vectors: Option<Vectors>,
}

struct StretchedKey {
    passes: PassKey,
    /// A constant, and a factor for each word that the passes leave; for the lower half of the hash and the higher one.
    factors: [[u128; 5]; 2],
}

impl fmt::Debug for PageHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PageHasher(..)")
    }
}

impl PageHasher {
    /// Stretches the key by ChaCha20 (RFC 8439, with nonce and first counter 0).
    pub fn new(key: &DigestKey) -> Self {
        let mut stream = ChaCha20::new(&key.0.into(), &[0; 12].into());
        let mut next = || {
            let mut word = [0; 8];
            stream.apply_keystream(&mut word);
            u64::from_le_bytes(word)
        };
        let passes = PassKey(std::array::from_fn(|_| next()));
        let factors = [(); 2].map(|()| [(); 5].map(|()| u128::from(next()) | u128::from(next()) << 64));
        Self {
            key: Arc::new(StretchedKey { passes, factors }),
            #[cfg(target_arch = "x86_64")]
            vectors: Vectors::detect().next(),
        }
    }

    /// The hash of a page that is known not to be all zeros.
    pub fn hash(&self, page: &[u8; PAGE_SIZE]) -> PageHash {
        #[cfg(target_arch = "x86_64")]
        if let Some(vectors) = self.vectors {
            return self.key.finish(vectors.passes(page, &self.key.passes));
        }
        self.hash_portable(page)
    }

    /// The same without vectors, word by word: for processors that have none, and to test the others against. A hundred
    /// times as slow and more.
    pub fn hash_portable(&self, page: &[u8; PAGE_SIZE]) -> PageHash {
        let (words, key) = (page.as_chunks::<8>().0, &self.key.passes.0);
        self.key.finish([&key[..WORDS], &key[SHIFT..]].map(|key| {
            let pairs = words.chunks_exact(2).zip(key.chunks_exact(2));
            pairs.fold(0, |sum, (words, key)| {
                let [even, odd] = [0, 1].map(|at| u64::from_le_bytes(words[at]) ^ key[at]);
                sum ^ carryless_product(even, odd)
            })
        }))
    }
}

impl StretchedKey {
    fn finish(&self, [first, second]: Passes) -> PageHash {
        let words = [first as u64, (first >> 64) as u64, second as u64, (second >> 64) as u64];
        let [low, high] = self.factors.each_ref().map(|[constant, factors @ ..]| {
            let products = factors.iter().zip(words).map(|(factor, word)| factor.wrapping_mul(word.into()));
            // The bound is for the upper half of the sum.
            products.fold(*constant, u128::wrapping_add) >> 64
        });
        PageHash(high << 64 | low)
    }
}

/// Every so many bits of a factor are multiplied at a time: of the 13 that are there, at most 13 products meet in one place,
/// which five bits can count.
const APART: usize = 5;

/// The bits of each place: 0, 5, 10 and so on; 1, 6, 11; up to 4, 9, 14.
const PLACES: [u128; APART] = {
    let mut places = [0; APART];
    let mut bit = 0;
    while bit < 128 {
        places[bit % APART] |= 1 << bit;
        bit += 1;
    }
    places
};

/// The product of two polynomials over the field of two elements, a coefficient a bit. From products of integers,
/// with so much room between the bits that no carry reaches another one's place.
fn carryless_product(a: u64, b: u64) -> u128 {
    let [a, b] = [a, b].map(|factor| PLACES.map(|places| u128::from(factor & places as u64)));
    let parts = std::array::from_fn::<_, APART, _>(|place| {
        let products = (0..APART).map(|of| a[of] * b[(place + APART - of) % APART]);
        products.fold(0, |sum, product| sum ^ product) & PLACES[place]
    });
    parts.into_iter().fold(0, |sum, part| sum | part)
}

#[cfg(test)]
mod tests {
    use super::*;

    type Page = [u8; PAGE_SIZE];

    fn hasher(key: u8) -> PageHasher {
        PageHasher::new(&DigestKey([key; 32]))
    }

    fn random_page(seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        ChaCha20::new(&key.into(), &[7; 12].into()).apply_keystream(&mut page);
        page
    }

    fn with_word(mut page: Page, word: usize, value: u64) -> Page {
        page[word * 8..][..8].copy_from_slice(&value.to_le_bytes());
        page
    }

    #[test]
    fn all_widths_of_vectors_give_what_the_portable_hash_gives() {
        for seed in 0..50 {
            let (hasher, page) = (hasher(seed), random_page(seed.into()));
            let naive = hasher.hash_portable(&page);
            assert_eq!(hasher.hash(&page), naive);
            #[cfg(target_arch = "x86_64")]
            for vectors in Vectors::detect() {
                assert_eq!(hasher.key.finish(vectors.passes(&page, &hasher.key.passes)), naive, "{vectors:?}");
            }
        }
    }

    /// What other implementations have to reach: the first page is all ones, the second counts its words.
    #[test]
    fn hashes_are_those_that_the_protocol_names() {
        let counting = (0..WORDS).fold([0; PAGE_SIZE], |page, word| with_word(page, word, word as u64));
        let hasher = PageHasher::new(&DigestKey(std::array::from_fn(|index| index as u8)));
        assert_eq!(hasher.hash(&[0xff; PAGE_SIZE]).0, EXPECTED.0);
        assert_eq!(hasher.hash(&counting).0, EXPECTED.1);
    }

    /// From another program, in another language, with integers of any length.
    const EXPECTED: (u128, u128) =
        (0x4c4f_0c6e_3e47_a901_6a03_0e2e_8d46_6138, 0x8211_47cf_3812_e13c_3e01_d8d2_78d7_496b);

    #[test]
    fn products_are_those_of_polynomials() {
        // (x + 1) (x + 1) = x^2 + 1: what is carried in integers vanishes.
        assert_eq!(carryless_product(3, 3), 5);
        assert_eq!(carryless_product(1 << 63, 1 << 63), 1 << 126);
        assert_eq!(carryless_product(0, u64::MAX), 0);
        let naive =
            |a: u64, b: u64| (0..64).filter(|bit| b >> bit & 1 == 1).fold(0, |sum, bit| sum ^ u128::from(a) << bit);
        // All ones makes every place as full as it can be.
        let page = random_page(1);
        let random = page.as_chunks().0.iter().map(|word| u64::from_le_bytes(*word));
        let words: Vec<u64> = random.take(100).chain([u64::MAX, u64::MAX - 1, 1 << 63, 1]).collect();
        for &a in &words {
            for &b in &words {
                assert_eq!(carryless_product(a, b), naive(a, b), "{a:#x} {b:#x}");
            }
        }
    }

    #[test]
    fn a_change_of_any_bit_changes_the_hash() {
        let (hasher, page) = (hasher(5), random_page(1));
        let hash = hasher.hash(&page);
        for bit in 0..PAGE_SIZE * 8 {
            let mut changed = page;
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(hasher.hash(&changed), hash, "bit {bit}");
        }
    }

    /// The attack on xxh3: two words whose top bits are turned over. Where the secret's lower halves at both are the same, and the top bits not,
    /// every page collides with its variant.
    #[test]
    fn pages_that_collide_under_xxh3_do_not_collide() {
        // Words of one lane, in stripes 0 and 1; the secret moves on by 8 bytes a stripe.
        let mut secret = [0x6b; 192];
        for (index, byte) in secret.iter_mut().enumerate() {
            *byte = (index as u8).wrapping_mul(0x9d) ^ 0x5c;
        }
        let (first, second) = (0, 8);
        secret[8..12].copy_from_slice(&[0x6b, 0x11, 0x42, 0x93]);
        secret.copy_within(8..16, 0);
        secret[7] = secret[15] ^ 0x80;
        for seed in 0..200 {
            let page = with_word(with_word(random_page(seed), first, 0), second, 0);
            let variant = with_word(with_word(page, first, 1 << 63), second, 1 << 63);
            let old = |page: &Page| xxhash_rust::xxh3::xxh3_128_with_secret(page, &secret);
            assert_eq!(old(&page), old(&variant), "the attack is one");
            let hasher = hasher(seed as u8);
            assert_ne!(hasher.hash(&page), hasher.hash(&variant));
        }
    }

    /// Whoever knew the key could make one pass blind for a word, by making the other word of the pair vanish.
    #[test]
    fn what_one_pass_does_not_see_the_other_does() {
        let hasher = hasher(9);
        let key = hasher.key.passes.0;
        let collide = |pages: [&Page; 2], shift: usize| {
            let one_pass = |page: &Page| {
                let word = |at: usize| u64::from_le_bytes(page.as_chunks().0[at]) ^ key[at + shift];
                (0..WORDS).step_by(2).fold(0, |sum, at| sum ^ carryless_product(word(at), word(at + 1)))
            };
            one_pass(pages[0]) == one_pass(pages[1])
        };
        for at in [0, 6, WORDS - 2] {
            for blind in [0, SHIFT] {
                let page = with_word(random_page(3), at + 1, key[at + 1 + blind]);
                let variant = with_word(page, at, 12345);
                assert!(collide([&page, &variant], blind) && !collide([&page, &variant], SHIFT - blind));
                assert_ne!(hasher.hash(&page), hasher.hash(&variant));
            }
        }
    }
}
