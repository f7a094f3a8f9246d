//! What every page must hold: a pure function of (seed, page number, generation).
//!
//! Generation 0 is the fill. A page is zero, one of a few duplicates, text-like (it compresses about
//! three to one) or random, in the chosen mix; runs of neighbouring pages share their kind as they do in
//! real guests. A write makes the next generation: either the whole page anew, of the same kind, or
//! one patch of 32 bytes, of which the last eight stay visible.

use super::page::{LivePage, Mismatch, PAGE_BYTES, Page};
use super::params::{Mix, Writes};

/// Neighbouring pages that share a kind.
const RUN_PAGES: u64 = 16;
/// Different contents among all duplicate pages.
const DUPLICATES: u64 = 1024;
/// Patches of a page that are visible at once.
const PATCHES: u64 = 8;
/// Words one patch changes.
const PATCH_WORDS: usize = 4;

/// What a page is filled with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All zero; never touched unless asked for.
    Zero,
    /// One of a few pages that occur again and again.
    Duplicate,
    /// Words and numbers.
    Text,
    /// Incompressible.
    Random,
}

/// The content of a whole guest.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Content {
    /// Everything is derived from this.
    pub(crate) seed: u64,
    /// Per cent of each kind.
    pub(crate) mix: Mix,
    /// What a write changes.
    pub(crate) writes: Writes,
    /// Whether filling a zero page writes its zeros (so that the page exists) or leaves it untouched.
    pub(crate) touch_zero: bool,
    /// Whether the memory may hold something before it is filled.
    pub(crate) used_ram: bool,
}

impl Content {
    /// The kind of a page.
    pub(crate) const fn kind(&self, page: u64) -> Kind {
        let percent = hash(self.seed, page / RUN_PAGES, 0) % 100;
        let Mix { zero, duplicate, text, .. } = self.mix;
        if percent < zero as u64 {
            Kind::Zero
        } else if percent < zero as u64 + duplicate as u64 {
            Kind::Duplicate
        } else if percent < zero as u64 + duplicate as u64 + text as u64 {
            Kind::Text
        } else {
            Kind::Random
        }
    }

    /// Brings memory to generation 0: untouched zero memory, if it is not said to be used.
    pub(crate) fn fill(&self, page: u64, at: LivePage) {
        let is_there = self.kind(page) == Kind::Zero && (!self.used_ram || at.compare(&Page::ZERO).is_ok());
        if self.touch_zero || !is_there {
            at.store(&self.expected(page, 0));
        }
    }

    /// Brings a page to `generation` (1 or more) from the one before.
    pub(crate) fn write(&self, page: u64, generation: u64, at: LivePage) {
        match self.writes {
            Writes::Full => at.store(&self.whole(page, generation)),
            Writes::Few => {
                let (first, words) = self.patch(page, generation);
                at.store_words(first, &words);
            }
        }
    }

    /// Compares a page with what it must hold at `generation`.
    pub(crate) fn check(&self, page: u64, generation: u64, at: LivePage) -> Result<(), Mismatch> {
        at.compare(&self.expected(page, generation))
    }

    /// What a page must hold at `generation`.
    pub(crate) fn expected(&self, page: u64, generation: u64) -> Page {
        if self.writes == Writes::Full {
            return self.whole(page, generation);
        }
        let mut content = self.whole(page, 0);
        for patch in generation.saturating_sub(PATCHES) + 1..=generation {
            let (first, words) = self.patch(page, patch);
            content.0[first..first + PATCH_WORDS].copy_from_slice(&words);
        }
        content
    }

    /// A page all of one generation. A zero page that is written as a whole becomes text.
    fn whole(&self, page: u64, generation: u64) -> Page {
        match self.kind(page) {
            Kind::Zero if generation == 0 => Page::ZERO,
            Kind::Zero | Kind::Text => text(hash(self.seed, page, generation)),
            Kind::Random => random(hash(self.seed, page, generation)),
            Kind::Duplicate => {
                let original = hash(self.seed, page, generation) % DUPLICATES;
                let make = if original.is_multiple_of(2) { text } else { random };
                make(hash(self.seed, u64::MAX, original))
            }
        }
    }

    /// The words that write number `generation` changes, and where. The page is cut in 64 lines of 64
    /// bytes; patches go round eight lines, which ones depends on the page.
    fn patch(&self, page: u64, generation: u64) -> (usize, [u64; PATCH_WORDS]) {
        let line = (hash(self.seed, page, 0) + generation % PATCHES * (64 / PATCHES)) % 64;
        let mut words = Random(hash(self.seed, page, generation));
        (line as usize * 8, core::array::from_fn(|_| words.next()))
    }
}

/// Mixes three numbers to one. With [`mix`], which is a bijection, two inputs that differ in one
/// number only never collide.
const fn hash(a: u64, b: u64, c: u64) -> u64 {
    mix(mix(mix(a) ^ b) ^ c)
}

/// The finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// SplitMix64: cheap enough to fill memory at several GB/s.
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }
}

fn random(key: u64) -> Page {
    let mut words = Random(key);
    Page(core::array::from_fn(|_| words.next()))
}

/// The words of text-like pages, each with the space after it; a leading few are drawn most often.
const VOCABULARY: [&[u8; 8]; 64] = [
    b"the     ",
    b"of      ",
    b"memory  ",
    b"page    ",
    b"info    ",
    b"and     ",
    b"to      ",
    b"is      ",
    b"kernel  ",
    b"in      ",
    b"error   ",
    b"a       ",
    b"cache   ",
    b"for     ",
    b"state   ",
    b"user    ",
    b"open    ",
    b"with    ",
    b"return  ",
    b"was     ",
    b"host    ",
    b"size    ",
    b"type    ",
    b"not     ",
    b"value   ",
    b"index   ",
    b"at      ",
    b"thread  ",
    b"from    ",
    b"buffer  ",
    b"device  ",
    b"name    ",
    b"time    ",
    b"path    ",
    b"write   ",
    b"read    ",
    b"socket  ",
    b"usr     ",
    b"lib     ",
    b"table   ",
    b"query   ",
    b"entry   ",
    b"lock    ",
    b"begin   ",
    b"end     ",
    b"count   ",
    b"offset  ",
    b"status  ",
    b"length  ",
    b"null    ",
    b"string  ",
    b"object  ",
    b"stack   ",
    b"signal  ",
    b"flags   ",
    b"file    ",
    b"header  ",
    b"source  ",
    b"target  ",
    b"block   ",
    b"queue   ",
    b"driver  ",
    b"module  ",
    b"frame   ",
];

/// [`VOCABULARY`] as words to store at once, with the bytes of each that count.
const WORDS: [(u64, usize); 64] = {
    let mut words = [(0, 0); 64];
    let mut index = 0;
    while index < words.len() {
        let bytes = VOCABULARY[index];
        let mut len = 0;
        while bytes[len] != b' ' {
            len += 1;
        }
        words[index] = (u64::from_le_bytes(*bytes), len + 1);
        index += 1;
    }
    words
};

fn text(key: u64) -> Page {
    let mut bytes = [0; PAGE_BYTES + 8];
    let mut draws = Random(key);
    let mut at = 0;
    while at < PAGE_BYTES {
        let mut draw = draws.next();
        for _ in 0..4 {
            let (word, len) = token(draw as u16);
            draw >>= 16;
            let start = at.min(PAGE_BYTES); // tokens past the end of the page land in the spare bytes
            bytes[start..start + 8].copy_from_slice(&word.to_le_bytes());
            at = start + len;
        }
    }
    let (words, _) = bytes.as_chunks();
    Page(core::array::from_fn(|index| u64::from_le_bytes(words[index])))
}

/// A word or, one time in eight, a number of four digits.
const fn token(draw: u16) -> (u64, usize) {
    let (low, high) = (draw as usize % 64, draw as usize / 64 % 64);
    if draw >> 13 == 0 {
        return (number(draw % 8192), 5);
    }
    WORDS[low * high / 64]
}

const fn number(value: u16) -> u64 {
    let [a, b, c, d] = [value / 1000 % 10, value / 100 % 10, value / 10 % 10, value % 10];
    u64::from_le_bytes([b'0' + a as u8, b'0' + b as u8, b'0' + c as u8, b'0' + d as u8, b' ', 0, 0, 0])
}

#[cfg(test)]
mod tests {
    use super::super::page::PAGE_WORDS;
    use super::*;

    const EVEN: Mix = Mix { zero: 30, duplicate: 10, text: 40, random: 20 };
    const PAGES: u64 = 16_384;

    fn content(writes: Writes) -> Content {
        Content { seed: 7, mix: EVEN, writes, touch_zero: true, used_ram: false }
    }

    fn live(page: &mut Page) -> LivePage {
        // SAFETY: the page is a page long and outlives its use in each test.
        #[allow(unsafe_code)]
        unsafe {
            LivePage::new(page.0.as_mut_ptr().cast())
        }
    }

    fn page_of(content: &Content, kind: Kind) -> u64 {
        (0..PAGES).find(|&page| content.kind(page) == kind).unwrap()
    }

    const KINDS: [Kind; 4] = [Kind::Zero, Kind::Duplicate, Kind::Text, Kind::Random];

    #[test]
    fn the_mix_is_kept() {
        let content = content(Writes::Few);
        for (kind, percent) in KINDS.into_iter().zip([30.0, 10.0, 40.0, 20.0]) {
            let share = (0..PAGES).filter(|&page| content.kind(page) == kind).count() as f64 * 100.0 / PAGES as f64;
            assert!((share - percent).abs() < 4.0, "{kind:?}: {share} % instead of {percent} %");
        }
    }

    #[test]
    fn written_step_by_step_or_derived_at_once_the_content_is_the_same() {
        for content in [content(Writes::Few), content(Writes::Full)] {
            for page in KINDS.map(|kind| page_of(&content, kind)) {
                let mut memory = Page::ZERO;
                content.fill(page, live(&mut memory));
                for generation in 0..20 {
                    if generation > 0 {
                        content.write(page, generation, live(&mut memory));
                    }
                    assert_eq!(content.check(page, generation, live(&mut memory)), Ok(()), "{page} {generation}");
                }
            }
        }
    }

    #[test]
    fn an_older_generation_is_told_from_the_current_one() {
        for content in [content(Writes::Few), content(Writes::Full)] {
            for page in KINDS.map(|kind| page_of(&content, kind)) {
                for generation in 1..20 {
                    let mut stale = content.expected(page, generation - 1);
                    assert!(content.check(page, generation, live(&mut stale)).is_err(), "{page} {generation}");
                }
            }
        }
    }

    #[test]
    fn duplicates_repeat_and_other_pages_do_not() {
        let content = content(Writes::Few);
        let distinct = |kind| {
            let mut seen: Vec<_> = (0..PAGES).filter(|&page| content.kind(page) == kind).collect();
            let pages = seen.len();
            seen.sort_by_cached_key(|&page| content.expected(page, 0).0);
            seen.dedup_by_key(|page| content.expected(*page, 0).0);
            (pages, seen.len())
        };
        assert!(distinct(Kind::Duplicate).1 <= DUPLICATES as usize);
        let (pages, different) = distinct(Kind::Text);
        assert_eq!(pages, different);
    }

    #[test]
    fn an_untouched_zero_page_is_not_written() {
        let content = Content { touch_zero: false, ..content(Writes::Few) };
        let mut memory = Page([3; PAGE_WORDS]);
        content.fill(page_of(&content, Kind::Zero), live(&mut memory));
        assert_eq!(memory.0[0], 3);
    }

    #[test]
    fn a_zero_page_that_firmware_has_used_is_cleared() {
        let content = Content { touch_zero: false, used_ram: true, ..content(Writes::Few) };
        let mut memory = Page([3; PAGE_WORDS]);
        content.fill(page_of(&content, Kind::Zero), live(&mut memory));
        assert!(memory == Page::ZERO);
    }

    #[test]
    fn text_is_text() {
        let page = text(1);
        let bytes: Vec<u8> = page.0.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert!(bytes.iter().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b' '));
    }
}
