//! What the guest writes: contents that move between pages, come back, change a little or not at all,
//! so that every coding is met, and met in the round in which what it refers to changes.

use pageferry::memory::RegionId;
use pageferry::units::PAGE_SIZE;

use super::Guest;
use crate::random::Random;

/// Contents that the guest writes again and again.
const KNOWN: u64 = 3;

/// Most pages that it copies in a row.
const RUN: u64 = 12;

/// What the guest likes to write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mix {
    /// New contents and small changes.
    New,
    /// Contents move from page to page.
    Moves,
    /// Few contents, zeros among them, come and go.
    Flips,
    /// Small changes, and many writes that change nothing.
    Touches,
    /// All of it.
    All,
}

/// One write.
#[derive(Clone, Copy, Debug)]
enum Write {
    Zero,
    GiveBack,
    FewBytes,
    Random,
    Pattern,
    /// The content that is there.
    Same,
    /// One of a few contents.
    Known,
    /// The content of another page.
    Copy,
    /// Two pages change places.
    Swap,
    /// The content of another page, which becomes zero.
    Move,
    /// The content of another page, which gets a new one.
    Replace,
    /// Three pages pass their contents on in a circle.
    Rotate,
    /// The contents of a few pages in a row.
    CopyRun,
}

impl Mix {
    /// How often each write comes.
    fn weights(self) -> &'static [(u64, Write)] {
        match self {
            Self::New => {
                &[(10, Write::Zero), (5, Write::GiveBack), (35, Write::FewBytes), (47, Write::Random), (3, Write::Same)]
            }
            Self::Moves => &[
                (14, Write::Zero),
                (2, Write::GiveBack),
                (10, Write::FewBytes),
                (15, Write::Random),
                (20, Write::Copy),
                (20, Write::Swap),
                (12, Write::Move),
                (10, Write::Replace),
                (7, Write::Rotate),
                (10, Write::CopyRun),
            ],
            Self::Flips => &[
                (20, Write::Zero),
                (5, Write::GiveBack),
                (15, Write::Pattern),
                (40, Write::Known),
                (10, Write::Copy),
                (10, Write::Swap),
            ],
            Self::Touches => {
                &[(5, Write::Zero), (50, Write::FewBytes), (30, Write::Same), (10, Write::Random), (5, Write::Copy)]
            }
            Self::All => &[
                (8, Write::Zero),
                (4, Write::GiveBack),
                (20, Write::FewBytes),
                (12, Write::Random),
                (8, Write::Pattern),
                (8, Write::Same),
                (8, Write::Known),
                (10, Write::Copy),
                (10, Write::Swap),
                (4, Write::Move),
                (4, Write::Replace),
                (4, Write::Rotate),
                (6, Write::CopyRun),
            ],
        }
    }

    fn pick(self, random: &mut Random) -> Write {
        let weights = self.weights();
        let mut left = random.below(weights.iter().map(|(weight, _)| weight).sum());
        for (weight, write) in weights {
            if left < *weight {
                return *write;
            }
            left -= weight;
        }
        Write::FewBytes
    }
}

type Place = (RegionId, u64);
type Content = [u8; PAGE_SIZE];

impl Guest {
    /// A page's first content.
    pub(super) fn fill_page(&mut self, place: Place) {
        let kind = if self.pattern.mix == Mix::New { 99 } else { self.random.below(100) };
        match kind {
            0..=24 => self.write_known(place),
            25..=34 => self.write_pattern(place),
            35..=59 => drop(self.copy_from_elsewhere(place)),
            _ => self.write_random(place),
        }
    }

    pub(super) fn write_somewhere(&mut self) {
        let Some(place) = self.somewhere() else { return };
        match self.pattern.mix.pick(&mut self.random) {
            Write::GiveBack if self.pattern.gives_back => self.give_back(place),
            Write::Zero | Write::GiveBack => self.put(place, &[0; PAGE_SIZE]),
            Write::FewBytes => self.write_few_bytes(place),
            Write::Random => self.write_random(place),
            Write::Pattern => self.write_pattern(place),
            Write::Same => {
                let content = self.content(place);
                self.put(place, &content);
            }
            Write::Known => self.write_known(place),
            Write::Copy => drop(self.copy_from_elsewhere(place)),
            Write::Swap => self.pass_on(place, 2),
            Write::Rotate => self.pass_on(place, 3),
            Write::CopyRun => self.copy_run(),
            Write::Move => {
                if let Some(from) = self.copy_from_elsewhere(place) {
                    self.put(from, &[0; PAGE_SIZE]);
                }
            }
            Write::Replace => {
                if let Some(from) = self.copy_from_elsewhere(place) {
                    self.write_random(from);
                }
            }
        }
    }

    /// A page that the guest writes.
    fn somewhere(&mut self) -> Option<Place> {
        let pages = self.page_count();
        let reach = self.pattern.reach.clamp(1, pages.max(1));
        let page = self.pattern.first + self.random.below(reach);
        self.place(page % pages.max(1))
    }

    /// A page that it reads: mostly one of those that it also writes.
    fn elsewhere(&mut self) -> Option<Place> {
        if self.random.chance(60) {
            return self.somewhere();
        }
        let pages = self.page_count();
        let page = self.random.below(pages.max(1));
        self.place(page)
    }

    fn page_count(&self) -> u64 {
        self.layout.regions().iter().map(pageferry::memory::Region::page_count).sum()
    }

    fn place(&self, mut page: u64) -> Option<Place> {
        for (region, described) in self.layout.iter() {
            if page < described.page_count() {
                return Some((region, page));
            }
            page -= described.page_count();
        }
        None
    }

    fn content(&self, (region, page): Place) -> Content {
        let start = page as usize * PAGE_SIZE;
        let mut content = [0; PAGE_SIZE];
        content.copy_from_slice(&self.truth[region.0 as usize][start..start + PAGE_SIZE]);
        content
    }

    fn put(&mut self, (region, page): Place, content: &[u8]) {
        self.write(region, page, 0, content);
    }

    fn write_few_bytes(&mut self, (region, page): Place) {
        let bytes = self.random.next().to_le_bytes();
        let at = self.random.below(PAGE_SIZE as u64 - 8) as usize;
        self.write(region, page, at, &bytes);
    }

    fn write_random(&mut self, place: Place) {
        let mut bytes = [0; PAGE_SIZE];
        let len = self.random.pick(&[1, 64, PAGE_SIZE / 2, PAGE_SIZE]);
        self.random.fill(&mut bytes[..len]);
        self.put(place, &bytes[..len]);
    }

    fn write_pattern(&mut self, place: Place) {
        let word = self.random.pick(&[1, 0xFF00_0000, u64::MAX]).to_le_bytes();
        let mut content = [0; PAGE_SIZE];
        content.as_chunks_mut().0.fill(word);
        self.put(place, &content);
    }

    fn write_known(&mut self, place: Place) {
        let mut content = [0; PAGE_SIZE];
        Random::new(self.random.below(KNOWN)).fill(&mut content);
        self.put(place, &content);
    }

    fn copy_from_elsewhere(&mut self, place: Place) -> Option<Place> {
        let from = self.elsewhere()?;
        let content = self.content(from);
        self.put(place, &content);
        (from != place).then_some(from)
    }

    /// Copies pages in a row, of whichever regions.
    fn copy_run(&mut self) {
        let pages = self.page_count().max(1);
        let from = self.random.below(pages);
        let to = self.pattern.first + self.random.below(self.pattern.reach.clamp(1, pages));
        for index in 0..self.random.within(2..=RUN) {
            let (Some(from), Some(to)) = (self.place((from + index) % pages), self.place((to + index) % pages)) else {
                return;
            };
            let content = self.content(from);
            self.put(to, &content);
        }
    }

    /// So many pages pass their contents on in a circle.
    fn pass_on(&mut self, place: Place, count: usize) {
        let places: Vec<Place> =
            std::iter::once(Some(place)).chain((1..count).map(|_| self.elsewhere())).flatten().collect();
        let contents: Vec<Content> = places.iter().map(|place| self.content(*place)).collect();
        for (place, content) in places.iter().zip(contents.iter().cycle().skip(1)) {
            self.put(*place, content);
        }
    }
}
