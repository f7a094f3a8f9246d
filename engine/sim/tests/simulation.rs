//! The simulator in short: enough seeds to meet every ending, a few of the exhaustive cuts, and the
//! proof that its checkers see what they are there to see.

use pageferry_sim::{Ending, Failure, Statistics, run_canaries, run_case, run_exhaustive, run_seed, run_seeds};

const ENDINGS: [Ending; 7] = [
    Ending::Completed,
    Ending::Cancelled,
    Ending::Failed,
    Ending::SettledSource,
    Ending::SettledDestination,
    Ending::Undecided,
    Ending::Lost,
];

fn assert_passed(statistics: &Statistics) {
    let broken: Vec<String> = statistics.failures.iter().map(describe).collect();
    assert!(statistics.passed(), "{}", broken.join("\n"));
}

fn describe(failure: &Failure) -> String {
    let Failure { name, violation, replay, .. } = failure;
    format!("{name}: {violation}; replay: cargo run --release -p pageferry-sim -- {replay}")
}

#[test]
fn no_seed_breaks_a_rule_and_every_ending_and_every_coding_is_met() {
    let statistics = run_seeds(0, 200, |_| {});
    assert_passed(&statistics);
    assert_eq!(statistics.runs, 200);
    for ending in ENDINGS {
        assert!(statistics.ended(ending) > 0, "no run ended: {ending}");
    }
    assert_eq!(statistics.unmet(), Vec::<&str>::new(), "hardly met: {:?}", statistics.codings);
}

#[test]
fn a_seed_means_the_same_run_every_time() {
    for seed in 0..20 {
        let (first, again) = (run_seed(seed, false), run_seed(seed, false));
        assert_eq!((first.trace, first.steps, first.ending), (again.trace, again.steps, again.ending), "seed {seed}");
    }
}

#[test]
fn seeds_mean_different_runs() {
    let traces: std::collections::BTreeSet<u64> = (0..20).map(|seed| run_seed(seed, false).trace).collect();
    assert_eq!(traces.len(), 20);
}

#[test]
fn every_canary_is_caught() {
    for canary in run_canaries() {
        assert!(canary.caught.is_some(), "{} was not caught in {} runs", canary.name, canary.runs);
    }
}

#[test]
fn a_sample_of_all_cuts_breaks_no_rule() {
    // A prime, so that every kind of cut and every place in a page comes up.
    assert_passed(&run_exhaustive(97, |_| {}));
}

#[test]
fn a_case_is_found_by_its_name_and_no_other() {
    assert!(run_case("no-lanes/greeting-0/sent/kill", false).is_some_and(|result| result.violation.is_none()));
    assert!(run_case("no-lanes/greeting-0/sent/nothing", false).is_none());
}
