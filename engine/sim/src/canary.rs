//! Engines that are broken on purpose. A checker that does not sing when it meets them is worthless.

use pageferry::config::Verify;
use pageferry::wire::Kind;

use crate::fault::{Fault, Trigger, Which};
use crate::run::run;
use crate::scenario::{Canary, Scenario};

/// Seeds that a canary gets; most sing at the first.
const SEEDS: u64 = 500;

/// Whether a broken engine was found out.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct CanaryResult {
    /// What is broken.
    pub name: &'static str,
    /// What the checker said; `None` when it said nothing.
    pub caught: Option<String>,
    /// Migrations that it took.
    pub runs: u64,
}

struct Song {
    name: &'static str,
    canary: Canary,
    verify: Verify,
    /// What the checkers that may find it say.
    words: &'static [&'static str],
}

const SONGS: [Song; 8] = [
    Song {
        name: "lost dirty bit",
        canary: Canary::LostDirtyBit,
        verify: Verify::Digest,
        words: &["memory differs at hand-over"],
    },
    Song {
        name: "lost dirty bit, full verify",
        canary: Canary::LostDirtyBit,
        verify: Verify::Full,
        words: &["full re-hash of all memory"],
    },
    Song {
        name: "start without Commit",
        canary: Canary::StartsWithoutCommit,
        verify: Verify::Digest,
        words: &["two owners"],
    },
    Song {
        name: "newer step overtakes",
        canary: Canary::BarrierOvertaken,
        verify: Verify::Full,
        words: &["memory differs", "checksum of Pages frame"],
    },
    Song {
        name: "copies overtake contents",
        canary: Canary::CopiesOvertake,
        verify: Verify::Digest,
        words: &["checksum of Pages frame"],
    },
    Song {
        name: "copies of copies",
        canary: Canary::CopiesUnchecked,
        verify: Verify::Digest,
        words: &["is copied from"],
    },
    Song {
        name: "given back, booked as sent",
        canary: Canary::GivenBackBooked,
        verify: Verify::Digest,
        words: &["memory differs at hand-over"],
    },
    Song {
        name: "the same, full verify",
        canary: Canary::GivenBackBooked,
        verify: Verify::Full,
        words: &["full re-hash of all memory"],
    },
];

/// Runs all canaries.
pub fn run_canaries() -> Vec<CanaryResult> {
    SONGS.iter().map(Song::listen).collect()
}

impl Song {
    fn listen(&self) -> CanaryResult {
        for seed in 0..SEEDS {
            let result = run(&self.scenario(seed), false, false);
            let heard = |violation: &String| self.words.iter().any(|words| violation.contains(words));
            if let Some(violation) = result.violation.filter(heard) {
                let caught = Some(format!("seed {seed}: {violation}"));
                return CanaryResult { name: self.name, caught, runs: seed + 1 };
            }
        }
        CanaryResult { name: self.name, caught: None, runs: SEEDS }
    }

    fn scenario(&self, seed: u64) -> Scenario {
        let mut scenario = Scenario::of_seed(seed);
        scenario.faults.clear();
        scenario.vm.failures.clear();
        scenario.visits.clear();
        scenario.config.verify = self.verify;
        scenario.canary = Some(self.canary);
        if self.canary == Canary::GivenBackBooked {
            scenario.faults = vec![(Trigger::Sent(Which::Kind(Kind::Pages, seed % 4)), Fault::SwitchOver)];
        }
        scenario.tracking.loses_a_bit = self.canary == Canary::LostDirtyBit;
        scenario
    }
}
