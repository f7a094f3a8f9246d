//! One suite for every transport, written against the seam ([`pageferry::transport`]).
//!
//! A transport's own tests say how it is joined, and get every case as a test of its own:
//!
//! ```ignore
//! fn join() -> Joined { .. }
//! pageferry_conformance::suite!(join);
//! ```
//!
//! Where nobody is at the other end until later, as with a file, [`saved_suite!`] takes its place.
//!
//! Cases panic where a transport fails, and when something hangs: they are for tests.

pub mod frames;
mod guest;
pub mod lanes;
pub mod migrations;
pub mod saves;

pub use guest::{Guest, Room};
pub use saves::Shelf;

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use pageferry::transport::{Acceptor, Dialer};

/// Both ends of a transport that reach each other.
pub struct Joined {
    /// The source's.
    pub dialer: Arc<dyn Dialer>,
    /// The destination's.
    pub acceptor: Arc<dyn Acceptor>,
}

impl Joined {
    /// Two ends.
    pub fn new(dialer: impl Dialer + 'static, acceptor: impl Acceptor + 'static) -> Self {
        Self { dialer: Arc::new(dialer), acceptor: Arc::new(acceptor) }
    }
}

impl fmt::Debug for Joined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Joined").finish_non_exhaustive()
    }
}

/// All cases as tests; `$join` is a `fn() -> Joined` that joins two new ends. A transport that not every host has adds a
/// `fn() -> Option<String>`: why nothing can be tested here, which is printed.
#[macro_export]
macro_rules! suite {
    ($join:path) => {
        $crate::suite!($join, unless: $crate::never);
    };
    ($join:path, unless: $missing:path) => {
        $crate::cases!($join, $missing, lanes:
            big_frames_arrive_intact,
            many_small_frames_arrive_intact,
            small_and_big_frames_mix,
            a_frame_in_many_parts_arrives_intact,
            lanes_carry_both_ways_at_once,
            the_end_of_a_lane_is_told,
            what_was_sent_before_the_end_arrives,
            closing_ends_a_blocked_send_and_a_blocked_receive,
            the_peer_notices_a_close,
            sending_to_a_peer_that_is_gone_is_an_error,
            a_stuck_lane_holds_up_no_other,
            many_lanes_are_open_at_once,
            accepting_ends_with_its_timeout_and_goes_on_afterwards,
            a_lane_names_its_peer,
        );
        $crate::cases!($join, $missing, migrations:
            a_guest_moves_with_as_many_lanes_as_there_are,
            a_guest_that_writes_moves_with_every_page,
            a_guest_that_gives_memory_back_moves_with_every_page,
            a_capped_migration_arrives,
            a_cancelled_guest_stays_and_can_move_again,
            a_cut_lane_leaves_one_owner,
        );
    };
}

/// All cases for transports whose destination comes later, as tests; `$shelf` is a `fn() -> Box<dyn Shelf>` that makes a new,
/// empty one.
#[macro_export]
macro_rules! saved_suite {
    ($shelf:path) => {
        $crate::cases!($shelf, $crate::never, saves:
            a_guest_comes_back_with_every_page_over_as_many_lanes_as_there_are,
            a_guest_that_writes_comes_back_with_its_last_write,
            a_capped_save_is_complete,
            a_cancelled_guest_stays_and_can_be_saved_again,
            a_cut_lane_leaves_the_guest_or_a_save,
            a_saved_guest_can_be_restored_twice,
            a_cancelled_restore_can_be_repeated,
            a_cut_restore_runs_the_guest_or_says_that_it_does_not,
            a_guest_of_more_than_one_extent_comes_back,
            a_full_verification_is_refused,
        );
    };
}

/// Some cases of one module as tests.
#[doc(hidden)]
#[macro_export]
macro_rules! cases {
    ($join:path, $missing:path, $module:ident: $($case:ident),+ $(,)?) => {
        $(
            #[test]
            fn $case() {
                if !$crate::skips($missing()) {
                    $crate::$module::$case($join);
                }
            }
        )+
    };
}

/// A transport that every host has.
pub fn never() -> Option<String> {
    None
}

/// Says why a test is skipped, if it is.
#[allow(clippy::needless_pass_by_value)] // It is always fresh from a function.
pub fn skips(missing: Option<String>) -> bool {
    if let Some(reason) = &missing {
        // Past the test runner, which keeps back what a test that passes prints.
        let _ = io::stderr().write_all(format!("skipped: {reason}\n").as_bytes());
    }
    missing.is_some()
}
