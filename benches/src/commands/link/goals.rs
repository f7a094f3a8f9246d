//! What a run is to prove: quotients of what was measured, and bounds for them.

use super::summary::{Key, Runs, beside, seconds, wire_bytes};
use crate::outcome::{Outcome, Target};

/// Something measured.
#[derive(Clone, Debug)]
pub(super) enum Quantity {
    /// Median time of a migration.
    Seconds(Key),
    /// The least of the median times of these.
    LeastSeconds(Vec<Key>),
    /// What the bytes of a migration take at iperf3's speed.
    WireSeconds(Key),
    /// What so many bytes take at iperf3's speed over this link.
    CopySeconds(String, u64),
    /// Median of bytes on the wire.
    Wire(Key),
    /// The strongest throttle in any turn.
    Throttle(Key),
    /// The most memory in any turn that is not the guest's: of the source, and of the destination.
    SourceMemory(Key),
    DestinationMemory(Key),
    /// A number known beforehand.
    Known(f64),
}

impl Quantity {
    /// Not a number if it was not measured, or if one of our migrations did not converge: no bound holds for that.
    fn value(&self, runs: &Runs) -> f64 {
        match self {
            Self::Seconds(key) => runs.converged_median(key, seconds),
            Self::LeastSeconds(keys) => {
                let all = keys.iter().map(|key| runs.converged_median(key, seconds));
                all.filter(|seconds| !seconds.is_nan()).fold(f64::NAN, f64::min)
            }
            Self::WireSeconds(key) => runs.wire_seconds(key),
            Self::CopySeconds(rate, bytes) => *bytes as f64 / runs.goodput(rate),
            Self::Wire(key) => runs.converged_median(key, wire_bytes),
            Self::Throttle(key) => runs.most(key, |moved| moved.throttle_percent),
            Self::SourceMemory(key) => runs.most(key, |moved| beside(&moved.source)),
            Self::DestinationMemory(key) => runs.most(key, |moved| beside(&moved.destination)),
            Self::Known(value) => *value,
        }
    }
}

/// A quotient and its bound.
#[derive(Clone, Debug)]
pub(super) struct Goal {
    name: String,
    quantity: Quantity,
    divisor: Quantity,
    target: Target,
}

impl Goal {
    pub(super) fn at_most(name: String, quantity: Quantity, divisor: Quantity, bound: f64) -> Self {
        Self { name, quantity, divisor, target: Target::AtMost(bound) }
    }

    pub(super) fn at_least(name: String, quantity: Quantity, divisor: Quantity, bound: f64) -> Self {
        Self { name, quantity, divisor, target: Target::AtLeast(bound) }
    }

    /// Adds the figure, and whether it is what it should be.
    pub(super) fn judge(&self, runs: &Runs, outcome: &mut Outcome) {
        let value = self.quantity.value(runs) / self.divisor.value(runs);
        outcome.figure(&self.name, "", value, Some(self.target));
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::tests::{key, moved};
    use super::*;
    use crate::network::Rate;

    fn judged(goal: &Goal, runs: &Runs) -> String {
        let mut outcome = Outcome::new("test", String::new());
        goal.judge(runs, &mut outcome);
        outcome.to_string()
    }

    fn runs() -> Runs {
        let mut runs = Runs::default();
        runs.add_goodput(Rate::BitsPerSecond(1_000_000_000), 100.0);
        for (mover, seconds, converged) in
            [("auto", 2.0, true), ("off", 4.0, true), ("9", 1.9, true), ("lost", 1.0, false)]
        {
            runs.add(key("mix", mover), moved(seconds, 100, converged));
        }
        runs
    }

    #[test]
    fn the_best_of_several_is_the_fastest_that_converged() {
        let fixed = ["off", "9", "lost", "never-run"].map(|mover| key("mix", mover));
        let goal = |bound| {
            let (auto, best) = (Quantity::Seconds(key("mix", "auto")), Quantity::LeastSeconds(fixed.to_vec()));
            Goal::at_most("auto".to_owned(), auto, best, bound)
        };
        assert!(judged(&goal(1.08), &runs()).contains(": met"));
        assert!(judged(&goal(1.05), &runs()).contains("NOT MET"));
    }

    #[test]
    fn what_did_not_converge_or_was_not_run_meets_no_bound() {
        for mover in ["lost", "never-run"] {
            let quantity = Quantity::Seconds(key("mix", mover));
            let most = Goal::at_most("most".to_owned(), quantity.clone(), Quantity::Known(1.0), 1e9);
            let least = Goal::at_least("least".to_owned(), quantity, Quantity::Known(1.0), 0.0);
            assert!(judged(&most, &runs()).contains("NOT MET") && judged(&least, &runs()).contains("NOT MET"));
        }
    }

    #[test]
    fn a_qemu_that_was_given_up_counts_as_slow_as_it_was_by_then() {
        let mut runs = runs();
        runs.add(key("mix", "qemu-plain"), moved(40.0, 9, false));
        let (qemu, ours) = (Quantity::Seconds(key("mix", "qemu-plain")), Quantity::Seconds(key("mix", "auto")));
        assert!(judged(&Goal::at_least("faster".to_owned(), qemu, ours, 20.0), &runs).contains(": met"));
    }
}
