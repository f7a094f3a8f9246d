use super::*;

/// A small generator, so that the oracle sees the same pages in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 33
    }

    fn page(&mut self) -> Page {
        std::array::from_fn(|_| self.next() as u8)
    }

    /// The same page with about `percent` of its words changed, each in one to eight bytes.
    fn changed(&mut self, base: &Page, percent: u64) -> Page {
        let mut new = *base;
        for word in 0..PAGE_SIZE / WORD {
            if self.next() % 100 < percent {
                for _ in 0..=self.next() % 8 {
                    new[word * WORD + self.next() as usize % WORD] ^= 1 + (self.next() % 255) as u8;
                }
            }
        }
        new
    }
}

/// The format as its description reads, byte by byte.
fn naive(base: &Page, new: &Page) -> Option<Vec<u8>> {
    let (mut lines, mut masks, mut words) = ([0u8; 8], Vec::new(), Vec::new());
    for line in 0..64 {
        let mut mask = 0;
        for word in 0..8 {
            let bytes = line * 64 + word * 8..line * 64 + word * 8 + 8;
            if base[bytes.clone()] != new[bytes.clone()] {
                mask |= 1 << word;
                words.extend(bytes.map(|byte| base[byte] ^ new[byte]));
            }
        }
        if mask != 0 {
            lines[line / 8] |= 1 << (line % 8);
            masks.push(mask);
        }
    }
    let delta = [&lines[..], &masks, &words].concat();
    (delta.len() <= MAX_DELTA).then_some(delta)
}

/// What [`encode_with`] and [`encode`] append to bytes that are there already.
fn encodings(base: &Page, new: &Page) -> Vec<Option<Vec<u8>>> {
    let collect = |encode: &dyn Fn(&mut Vec<u8>) -> Option<usize>| {
        let mut out = vec![0xEE; 3];
        let len = encode(&mut out);
        assert_eq!(out[..3], [0xEE; 3]);
        assert_eq!(out.len(), 3 + len.unwrap_or(0));
        len.map(|_| out.split_off(3))
    };
    let mut all = vec![collect(&|out| encode(base, new, out)), collect(&|out| encode_with(Portable, base, new, out))];
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = Avx2::detect() {
        all.push(collect(&|out| encode_with(avx2, base, new, out)));
    }
    all
}

/// What every kernel makes of a page and a delta; they must agree.
fn applied(page: &Page, delta: &[u8]) -> (Result<usize, DeltaError>, Page) {
    let mut with_portable = *page;
    let portable = apply_with(Portable, &mut with_portable, delta);
    let mut with_any = *page;
    assert_eq!(apply(&mut with_any, delta), portable);
    assert!(with_any == with_portable);
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = Avx2::detect() {
        let mut with_avx2 = *page;
        assert_eq!(apply_with(avx2, &mut with_avx2, delta), portable);
        assert!(with_avx2 == with_portable);
    }
    (portable, with_portable)
}

#[track_caller]
fn check(base: &Page, new: &Page) -> Option<Vec<u8>> {
    let expected = naive(base, new);
    for found in encodings(base, new) {
        assert!(found == expected);
    }
    if let Some(delta) = &expected {
        // A delta ends where it says; what follows it is nobody's.
        for after in [0, 5, 100] {
            let (used, page) = applied(base, &[delta.as_slice(), &vec![0xFF; after]].concat());
            assert_eq!(used, Ok(delta.len()));
            assert!(page == *new);
        }
    }
    expected
}

#[test]
fn every_kernel_agrees_with_the_naive_one_at_every_density() {
    let mut random = Random(3);
    for percent in 0..=100 {
        for _ in 0..10 {
            let base = random.page();
            let new = random.changed(&base, percent);
            let delta = check(&base, &new);
            assert!(delta.is_some() || percent > 40, "{percent} %");
            assert!(delta.is_none() || percent < 60, "{percent} %");
        }
    }
}

#[test]
fn one_changed_bit_anywhere_is_one_word() {
    let base = Random(4).page();
    for byte in 0..PAGE_SIZE {
        let mut new = base;
        new[byte] ^= 1 << (byte % 8);
        assert_eq!(check(&base, &new).map(|delta| delta.len()), Some(HEAD + 1 + WORD));
    }
}

#[test]
fn every_mask_of_a_line_gathers_and_spreads_its_words() {
    let mut random = Random(5);
    let base = random.page();
    for mask in 0..256 {
        let mut new = base;
        for line in [0, 17, 63] {
            for word in (0..8).filter(|word| mask >> word & 1 == 1) {
                new[line * 64 + word * 8 + random.next() as usize % 8] ^= 0x80;
            }
        }
        check(&base, &new);
    }
}

#[test]
fn equal_pages_have_the_shortest_delta() {
    let page = Random(6).page();
    assert_eq!(check(&page, &page), Some(vec![0; 8]));
}

#[test]
fn the_longest_delta_is_made_and_one_word_more_is_not() {
    let base = Random(7).page();
    let mut new = base;
    // 8 + 64 + 247 * 8 bytes are the limit.
    for index in 0..247 {
        new[(index % 64) * 64 + (index / 64) * 8] ^= 1;
    }
    assert_eq!(check(&base, &new).map(|delta| delta.len()), Some(MAX_DELTA));
    new[4095] ^= 1;
    assert_eq!(check(&base, &new), None);
}

#[test]
fn a_delta_cut_anywhere_is_refused_and_changes_nothing() {
    let mut random = Random(8);
    for percent in [1, 20, 40] {
        let base = random.page();
        let new = random.changed(&base, percent);
        let delta = naive(&base, &new).expect("short enough");
        for found in 0..delta.len() {
            let (result, page) = applied(&base, &delta[..found]);
            assert!(page == base);
            let Err(DeltaError::Truncated { needed, found: told }) = result else { panic!("{found}: {result:?}") };
            assert!(told == found && found < needed && needed <= delta.len(), "{found}: {result:?}");
        }
    }
}

#[test]
fn masks_without_words_and_deltas_over_the_limit_are_refused() {
    let base = Random(9).page();
    let mut empty = vec![0b101, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    empty.extend([7; 100]);
    assert_eq!(applied(&base, &empty), (Err(DeltaError::EmptyLine { line: 2 }), base));

    let mut long = vec![0xFF; 8 + 64];
    long.extend([7; 4096]);
    assert_eq!(applied(&base, &long), (Err(DeltaError::TooLong { len: 8 + 64 + 4096 }), base));
}

#[test]
fn random_bytes_are_refused_or_undone_by_a_second_time() {
    let mut random = Random(10);
    let base = random.page();
    let mut accepted = 0;
    for round in 0..20_000 {
        let mut bytes = vec![0; random.next() as usize % 600];
        bytes.fill_with(|| random.next() as u8);
        // Few lines, or hardly any random delta would be short enough.
        let lines = (1u64 << (random.next() % 64)) | (1 << (random.next() % 64)) | (round % 4);
        if let Some(head) = bytes.first_chunk_mut() {
            *head = lines.to_le_bytes();
        }
        match applied(&base, &bytes) {
            (Ok(len), page) => {
                assert!(len <= bytes.len() && page != base);
                assert_eq!(naive(&base, &page).map(|delta| delta.len()), Some(len));
                let (again, page) = applied(&page, &bytes);
                assert!(again == Ok(len) && page == base);
                accepted += 1;
            }
            (Err(_), page) => assert!(page == base),
        }
    }
    assert!((1000..19_000).contains(&accepted), "{accepted} of 20,000");
}
