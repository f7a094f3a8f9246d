//! How much of a link a migration uses: what nobody can pack, beside a plain copy of as many bytes.

use crate::outcome::median;
use crate::study::{Engine, Guest, Link, Mover, Study};

use super::group::{Group, Quantity};

/// A migration may take so many times what the copy takes ...
pub(crate) const MOST_RATIO: f64 = 1.03;

/// ... and this much for its start and its end.
pub(crate) const MOST_MORE_SECONDS: f64 = 0.05;

/// One mover beside the copy.
#[derive(Clone, Debug)]
pub(crate) struct Beside<'a> {
    pub(crate) link: &'a Link,
    pub(crate) guest: &'a Guest,
    pub(crate) mover: &'a Mover,
    /// Medians.
    pub(crate) copy_seconds: f64,
    pub(crate) seconds: f64,
}

impl Beside<'_> {
    pub(crate) fn ratio(&self) -> f64 {
        self.seconds / self.copy_seconds
    }

    /// Whether it takes no longer than it may.
    pub(crate) fn met(&self) -> bool {
        self.seconds <= self.copy_seconds * MOST_RATIO + MOST_MORE_SECONDS
    }
}

/// Every mover of ours that was run beside a plain copy, and came to its end every time.
pub(crate) fn beside(study: &Study) -> Vec<Beside<'_>> {
    let mut all = Vec::new();
    for link in &study.links {
        for guest in &study.guests {
            let of_cell = |copy: &&crate::study::PlainCopy| copy.link == link.name && copy.guest == guest.name;
            let copies: Vec<f64> = study.copies.iter().filter(of_cell).map(|copy| copy.seconds).collect();
            for mover in study.movers.iter().filter(|mover| mover.engine == Engine::Pageferry) {
                // Those that came to an end would speak for those that did not.
                let group = Group::of(study, link, guest, mover).filter(Group::finished);
                let seconds = group.map_or(f64::NAN, |group| group.sample(Quantity::Time).median());
                let copy_seconds = median(&copies);
                if copy_seconds.is_finite() && seconds.is_finite() {
                    all.push(Beside { link, guest, mover, copy_seconds, seconds });
                }
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;
    use crate::study::{End, PlainCopy};

    #[test]
    fn a_migration_is_measured_by_the_median_copy() {
        let mut study = example::small(&[10.0, 12.0, 11.0]);
        let guest = study.guests[0].name.clone();
        for (turn, seconds) in [(1, 9.0), (2, 10.75), (3, 11.0)] {
            study.copies.push(PlainCopy { link: study.links[0].name.clone(), guest: guest.clone(), turn, seconds });
        }
        let found = beside(&study);
        assert_eq!(found.len(), 1);
        assert!((found[0].ratio() - 11.0 / 10.75).abs() < 1e-9 && found[0].met());
        study.copies[1].seconds = 10.6;
        assert!(!beside(&study)[0].met());
        study.runs[0].end = End::GivenUp;
        assert!(beside(&study).is_empty());
        study.runs.clear();
        assert!(beside(&study).is_empty());
    }
}
