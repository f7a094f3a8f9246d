//! Which page a writer writes next, and when.
//!
//! A writer goes over its share of the working set again and again in one fixed scattered order. So
//! how often each page was written follows from a single count of steps: no table of generations is
//! needed, and one that went stale could not hide a stale page.

use super::page::PAGE_BYTES;
use super::params::Rate;

/// A writer that fell behind (it was paused or throttled) makes up for this much time and forgets the rest.
const MOST_DEBT_MS: u64 = 20;

/// One writer's share of the working set.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sweep {
    first: u64,
    count: u64,
    stride: u64,
}

impl Sweep {
    /// The share of writer number `writer` of `writers` in a working set of `pages` pages.
    pub(crate) const fn share(pages: u64, writer: u64, writers: u64) -> Self {
        let first = pages * writer / writers;
        let count = pages * (writer + 1) / writers - first;
        Self { first, count, stride: stride(count) }
    }

    /// What the step after `steps` steps writes: the page's index in the working set and its new
    /// generation, from 1. `None` when the share is empty.
    pub(crate) const fn step(&self, steps: u64) -> Option<(u64, u64)> {
        if self.count == 0 {
            return None;
        }
        Some((self.index(steps % self.count), steps / self.count + 1))
    }

    /// Every page of the share with the generation it has after `steps` steps; 0 is "as filled".
    pub(crate) fn generations(self, steps: u64) -> impl Iterator<Item = (u64, u64)> {
        (0..self.count).map(move |position| {
            let this_round = u64::from(position < steps % self.count);
            (self.index(position), steps / self.count + this_round)
        })
    }

    const fn index(&self, position: u64) -> u64 {
        self.first + position * self.stride % self.count
    }
}

/// A step that visits each of `count` pages once in `count` steps, in an order that is neither
/// ascending nor clustered: about 0.618 of the way round, without common factor.
const fn stride(count: u64) -> u64 {
    const MOST: u64 = 1 << 22; // keeps position * stride within 64 bits for any memory size
    let around = if count < MOST { count } else { MOST };
    let mut stride = around * 618 / 1000;
    while greatest_common_divisor(count, stride) > 1 {
        stride += 1;
    }
    stride
}

const fn greatest_common_divisor(mut a: u64, mut b: u64) -> u64 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// When the next step is due. Time is in ticks of whatever clock the caller has.
#[derive(Clone, Debug)]
pub(crate) struct Pace {
    /// Zero: always due. `u64::MAX`: never.
    ticks_per_page: u64,
    most_debt: u64,
    next: u64,
}

impl Pace {
    /// The pace of one of `writers` writers that together write at `rate`.
    pub(crate) fn new(rate: Rate, writers: u64, ticks_per_second: u64, now: u64) -> Self {
        let ticks_per_page = match rate {
            Rate::Max => 0,
            Rate::BytesPerSecond(0) => u64::MAX,
            Rate::BytesPerSecond(bytes) => {
                let ticks = u128::from(ticks_per_second) * u128::from(writers) * PAGE_BYTES as u128;
                u64::try_from(ticks / u128::from(bytes)).unwrap_or(u64::MAX)
            }
        };
        Self { ticks_per_page, most_debt: ticks_per_second * MOST_DEBT_MS / 1000, next: now }
    }

    /// Whether a step is due at `now`; if so it counts as taken.
    pub(crate) fn take(&mut self, now: u64) -> bool {
        if self.ticks_per_page == u64::MAX || now < self.next {
            return false;
        }
        self.next = self.next.max(now.saturating_sub(self.most_debt)).saturating_add(self.ticks_per_page);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Generations by brute force: take every step.
    fn stepped(sweep: &Sweep, pages: usize, steps: u64) -> Vec<u64> {
        let mut generations = vec![0; pages];
        for step in 0..steps {
            let (index, generation) = sweep.step(step).unwrap();
            generations[index as usize] += 1;
            assert_eq!(generations[index as usize], generation);
        }
        generations
    }

    #[test]
    fn generations_follow_from_the_number_of_steps() {
        for pages in [1, 2, 3, 10, 97, 1024] {
            let sweep = Sweep::share(pages, 0, 1);
            for steps in [0, 1, pages - 1, pages, pages + 1, 3 * pages + pages / 2] {
                let mut derived = vec![u64::MAX; pages as usize];
                sweep.generations(steps).for_each(|(index, generation)| derived[index as usize] = generation);
                assert_eq!(derived, stepped(&sweep, pages as usize, steps), "{pages} pages, {steps} steps");
            }
        }
    }

    #[test]
    fn shares_cover_the_working_set_without_overlap() {
        for (pages, writers) in [(10, 3), (2, 4), (0, 2), (4096, 7)] {
            let shares = (0..writers).map(|writer| Sweep::share(pages, writer, writers));
            let mut indices: Vec<u64> = shares.flat_map(|share| share.generations(0)).map(|(index, _)| index).collect();
            indices.sort_unstable();
            assert_eq!(indices, (0..pages).collect::<Vec<_>>());
        }
    }

    #[test]
    fn an_empty_share_has_no_step() {
        assert_eq!(Sweep::share(0, 0, 1).step(5), None);
    }

    #[test]
    fn the_pace_keeps_the_rate() {
        let mut pace = Pace::new(Rate::BytesPerSecond(20 << 20), 2, 1_000_000, 0);
        let steps = (0..1_000_000).filter(|&now| pace.take(now)).count();
        assert_eq!(steps, 2565); // 2,560 a second, rounded down to whole ticks between steps
    }

    #[test]
    fn a_long_pause_is_not_made_up_for() {
        let mut pace = Pace::new(Rate::BytesPerSecond(4096 * 1000), 1, 1_000_000, 0);
        let after_a_minute = 60_000_000;
        let steps = (0..1000).filter(|_| pace.take(after_a_minute)).count();
        assert_eq!(steps as u64, MOST_DEBT_MS + 1);
    }

    #[test]
    fn an_idle_guest_never_writes_and_the_fastest_always_may() {
        assert!(!Pace::new(Rate::BytesPerSecond(0), 1, 1000, 0).take(u64::MAX - 1));
        let mut fastest = Pace::new(Rate::Max, 1, 1000, 0);
        assert!(fastest.take(0) && fastest.take(0));
    }
}
