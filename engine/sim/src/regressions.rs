//! One scenario for each bug that the simulator has found in the engine, so that it stays found when
//! seeds come to mean other runs.

use std::time::Duration;

use pageferry::config::{OnTimeout, Verify};
use pageferry::memory::{Layout, Region};
use pageferry::transport::LaneRole;
use pageferry::units::PAGE_SIZE;
use pageferry::wire::Kind;

use crate::fault::{Call, Cut, Fault, Scope, Trigger, Which};
use crate::guest::Mix;
use crate::run::{Ending, run};
use crate::scenario::{Pattern, Scenario, Visit};

fn calm(pages: &[u64]) -> Scenario {
    let region = |(pages, index): (&u64, u64)| Region::ram(format!("r{index}"), index << 32, pages * PAGE_SIZE as u64);
    Scenario::calm("regression", Layout::new(pages.iter().zip(0..).map(region).collect()).unwrap())
}

fn cut(source: bool, destination: bool, heals_after: Option<Duration>) -> Fault {
    let notices = |sees: bool| sees.then_some(Duration::ZERO);
    let (source_notices, destination_notices) = (notices(source), notices(destination));
    Fault::Cut(Cut { scope: Scope::Link, source_notices, destination_notices, heals_after })
}

fn sent(kind: Kind) -> Trigger {
    Trigger::Sent(Which::Kind(kind, 0))
}

fn arrived(kind: Kind) -> Trigger {
    Trigger::Arrived(Which::Kind(kind, 0))
}

/// The scenario breaks no rule and ends as it should.
fn ends(scenario: &Scenario, ending: Ending) {
    let result = run(scenario, false, false);
    assert_eq!(result.violation, None, "after {:?}", result.faults);
    assert_eq!(result.ending, Some(ending), "after {:?}", result.faults);
}

#[test]
fn a_record_of_pages_ends_where_its_region_ends() {
    let mut scenario = calm(&[64, 64, 3]);
    scenario.filled = 100;
    ends(&scenario, Ending::Completed);
}

/// A run copied from does, too: pages on both sides of a border have neighbouring numbers.
#[test]
fn a_run_copied_from_ends_where_its_region_ends() {
    for seed in 0..20 {
        let mut scenario = calm(&[64, 64, 64]);
        scenario.seed = seed;
        scenario.filled = 100;
        scenario.pattern = Pattern {
            interval: Duration::from_micros(200),
            writes: 20,
            reach: 192,
            first: 0,
            gives_back: false,
            mix: Mix::Moves,
        };
        scenario.patience = 20;
        ends(&scenario, Ending::Completed);
    }
}

/// Else it is harvested again and again, and nothing is planned and nobody heard.
#[test]
fn a_slow_harvest_in_the_middle_of_a_round_lets_the_round_go_on() {
    for seed in 0..5 {
        let mut scenario = calm(&[300, 300]);
        scenario.seed = seed;
        scenario.filled = 100;
        scenario.link.bandwidth = vec![500_000];
        scenario.link.capacity = 4096;
        scenario.encoding.buffers = 1;
        scenario.pattern.mix = Mix::New;
        scenario.vm.longest_call = scenario.config.peer_timeout * 2;
        ends(&scenario, Ending::Completed);
    }
}

#[test]
fn a_vm_that_throttles_once_and_no_further_is_not_left_throttled() {
    let mut scenario = calm(&[200]);
    scenario.filled = 100;
    scenario.pattern = Pattern { interval: Duration::from_micros(100), writes: 20, reach: 200, ..scenario.pattern };
    scenario.link.bandwidth = vec![20_000_000];
    scenario.config.downtime_limit = Duration::from_millis(1);
    scenario.vm.failures = vec![(Call::Throttle, 1)];
    scenario.patience = 30;
    scenario.faults = vec![(sent(Kind::State), cut(true, true, None))];
    ends(&scenario, Ending::Failed);
}

#[test]
fn a_vm_that_takes_long_to_throttle_is_no_silence() {
    for seed in 0..10 {
        let mut scenario = calm(&[200]);
        scenario.seed = seed;
        scenario.filled = 100;
        scenario.pattern.writes = 20;
        scenario.pattern.reach = 200;
        scenario.pattern.interval = Duration::from_micros(100);
        scenario.config.downtime_limit = Duration::from_millis(1);
        scenario.vm.longest_call = scenario.config.peer_timeout * 2;
        scenario.patience = 8;
        ends(&scenario, Ending::Completed);
    }
}

#[test]
fn a_guest_without_memory_migrates() {
    for pages in [&[][..], &[0], &[1]] {
        let mut scenario = calm(pages);
        scenario.filled = 0;
        ends(&scenario, Ending::Completed);
    }
}

/// Rounds without a page tell nothing about the link, and their ends are signs of life.
#[test]
fn a_guest_that_holds_nothing_is_switched_over_on_a_long_link() {
    for latency in [1, 30, 80] {
        let mut scenario = calm(&[24]);
        scenario.filled = 0;
        scenario.pattern.writes = 0;
        scenario.vm.state_len = 5_000;
        scenario.link.latency = vec![Duration::from_millis(latency)];
        scenario.config.timeout = Duration::from_secs(60);
        scenario.config.on_timeout = OnTimeout::Cancel;
        ends(&scenario, Ending::Completed);
    }
}

#[test]
fn an_undecided_destination_never_says_that_it_owns_the_guest() {
    let mut scenario = calm(&[24]);
    scenario.faults = vec![(arrived(Kind::Prepared), cut(true, false, None))];
    assert_eq!(run(&scenario, false, false).violation, None);
    scenario.faults = vec![(arrived(Kind::StepEnd), cut(true, false, None))];
    ends(&scenario, Ending::Failed);
}

#[test]
fn a_source_that_settles_takes_its_locks_back_before_it_resumes() {
    let mut scenario = calm(&[24]);
    scenario.faults = vec![(sent(Kind::Commit), cut(true, true, None))];
    ends(&scenario, Ending::SettledSource);
}

#[test]
fn a_guest_that_is_given_up_undecided_is_not_left_throttled() {
    let mut scenario = calm(&[200]);
    scenario.filled = 100;
    scenario.pattern.writes = 20;
    scenario.pattern.reach = 200;
    scenario.pattern.interval = Duration::from_micros(100);
    scenario.link.bandwidth = vec![20_000_000];
    scenario.config.downtime_limit = Duration::from_millis(1);
    scenario.config.max_throttle = 99;
    scenario.config.timeout = Duration::from_secs(20);
    scenario.config.on_timeout = OnTimeout::SwitchOver;
    scenario.faults = vec![(sent(Kind::Commit), cut(true, true, None))];
    ends(&scenario, Ending::SettledSource);
}

#[test]
fn a_round_that_takes_longer_than_the_silence_limit_is_no_silence() {
    let mut scenario = calm(&[300]);
    scenario.filled = 100;
    scenario.link.bandwidth = vec![200_000];
    scenario.link.capacity = 8 << 20;
    scenario.config.timeout = Duration::from_secs(600);
    scenario.config.lanes = 2;
    scenario.config.verify = Verify::Full;
    ends(&scenario, Ending::Completed);
}

#[test]
fn a_vm_that_is_busy_for_longer_than_the_silence_limit_is_no_silence() {
    for lanes in [0, 2] {
        let mut scenario = calm(&[24]);
        scenario.config.lanes = lanes;
        scenario.vm.longest_call = scenario.config.peer_timeout * 2;
        ends(&scenario, Ending::Completed);
    }
}

#[test]
fn a_destination_that_cannot_start_gives_the_guest_back() {
    let mut scenario = calm(&[24]);
    scenario.vm.failures = vec![(Call::Commit, 0)];
    ends(&scenario, Ending::Failed);
}

#[test]
fn a_destination_that_is_cancelled_after_it_was_prepared_gives_the_guest_back() {
    for trigger in [sent(Kind::Prepared), arrived(Kind::Prepared), sent(Kind::Commit)] {
        let mut scenario = calm(&[24]);
        scenario.faults = vec![(trigger, Fault::CancelDestination)];
        assert_eq!(run(&scenario, false, false).violation, None);
    }
}

#[test]
fn a_lane_that_breaks_after_it_was_replaced_means_nothing() {
    for (source, destination) in [(300, 2_500), (2_500, 300), (100, 900), (900, 100)] {
        let mut scenario = calm(&[24]);
        scenario.config.settle_window = Duration::from_secs(30);
        scenario.destination_config.settle_window = Duration::from_secs(30);
        let cut = Cut {
            scope: Scope::Role(LaneRole::Control),
            source_notices: Some(Duration::from_millis(source)),
            destination_notices: Some(Duration::from_millis(destination)),
            heals_after: None,
        };
        scenario.faults = vec![(arrived(Kind::Commit), Fault::Cut(cut))];
        ends(&scenario, Ending::Completed);
    }
}

#[test]
fn a_stranger_that_offers_nothing_is_forgotten() {
    for visit in [Visit::Leaves, Visit::Waits, Visit::Silent, Visit::Version, Visit::Garbage] {
        let mut scenario = calm(&[24]);
        // Before the source comes: it may be told that the destination is busy, and no more.
        scenario.visits = vec![(Duration::ZERO, visit)];
        let result = run(&scenario, false, false);
        assert_eq!(result.violation, None);
    }
}

#[test]
fn a_source_whose_data_lanes_never_come_does_not_hold_the_destination_for_ever() {
    let mut scenario = calm(&[24]);
    scenario.config.lanes = 3;
    let cut = Cut {
        scope: Scope::Role(LaneRole::Data(1)),
        source_notices: None,
        destination_notices: None,
        heals_after: None,
    };
    scenario.faults = vec![(Trigger::Sent(Which::Kind(Kind::Greeting, 2)), Fault::Truncate { bytes: 5, cut })];
    assert_eq!(run(&scenario, false, false).violation, None);
}
