//! Connections break all the time, on both paths: nothing is lost, doubled or out of order.

mod common;

use std::sync::Arc;
use std::time::Duration;

use pageferry_conformance::{Joined, lanes, migrations};
use pageferry_paths::PathOptions;

/// With somebody who takes the connections with which lanes go on.
fn join_with_doorman() -> Joined {
    let Joined { dialer, acceptor } = join();
    Joined { dialer, acceptor: Arc::new(common::Doorman::new(acceptor)) }
}

fn join() -> Joined {
    let (joined, relays) = common::over_relays(&PathOptions::default());
    std::thread::spawn(move || {
        // Longer than any test needs; the first comes while lanes are being opened.
        for turn in 0..1500 {
            std::thread::sleep(Duration::from_millis(15 + turn % 5 * 7));
            relays[turn as usize % 2].cut();
        }
    });
    joined
}

#[test]
fn frames_arrive_once_and_in_order() {
    lanes::big_frames_arrive_intact(join_with_doorman);
    lanes::many_small_frames_arrive_intact(join_with_doorman);
    lanes::small_and_big_frames_mix(join_with_doorman);
    lanes::lanes_carry_both_ways_at_once(join_with_doorman);
}

#[test]
fn guests_move_with_every_page() {
    migrations::a_guest_moves_with_as_many_lanes_as_there_are(join);
    migrations::a_guest_that_writes_moves_with_every_page(join);
    migrations::a_capped_migration_arrives(join);
}

#[test]
fn a_cancelled_guest_stays_and_can_move_again() {
    migrations::a_cancelled_guest_stays_and_can_move_again(join);
}
