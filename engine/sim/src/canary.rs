//! Engines that are broken on purpose. A checker that does not sing when it meets them is worthless.

use pageferry::config::Verify;

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
    /// What the checker that must find it says.
    words: &'static str,
}

const SONGS: [Song; 4] = [
    Song {
        name: "lost dirty bit",
        canary: Canary::LostDirtyBit,
        verify: Verify::Digest,
        words: "memory differs at hand-over",
    },
    Song {
        name: "lost dirty bit, full verify",
        canary: Canary::LostDirtyBit,
        verify: Verify::Full,
        words: "full re-hash of all memory",
    },
    Song {
        name: "start without Commit",
        canary: Canary::StartsWithoutCommit,
        verify: Verify::Digest,
        words: "two owners",
    },
    Song {
        name: "newer round overtakes",
        canary: Canary::BarrierOvertaken,
        verify: Verify::Full,
        words: "memory differs",
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
            if let Some(violation) = result.violation.filter(|violation| violation.contains(self.words)) {
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
        scenario.tracking.loses_a_bit = self.canary == Canary::LostDirtyBit;
        scenario
    }
}
