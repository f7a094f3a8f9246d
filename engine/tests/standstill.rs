//! A guest that was paused for the last pages does not stand still for as long as the destination likes.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use common::source::{NOW, source_until};
use pageferry::encode::Tally;
use pageferry::limits::{STANDSTILL_FACTOR, WORK_FACTOR};
use pageferry::session::{Outcome, SourceAction, SourceInput, SourceSession};
use pageferry::wire::Message;
use pageferry::{Error, SourceConfig};

/// What `SourceConfig::default` gives a destination to work without a sign of progress.
fn work_limit() -> Duration {
    SourceConfig::default().peer_timeout * WORK_FACTOR
}

/// Heartbeats that claim progress, one a second, until the session does something or `end`.
fn claim_progress(session: &mut SourceSession, end: Duration) -> Option<(Duration, Vec<SourceAction>)> {
    let mut now = NOW;
    for received in 1.. {
        now += Duration::from_secs(1);
        session.handle(now, SourceInput::Message(Message::Heartbeat { received }));
        let actions: Vec<_> = std::iter::from_fn(|| session.poll_action()).collect();
        if !actions.is_empty() || now > end {
            return (!actions.is_empty()).then_some((now, actions));
        }
    }
    None
}

#[test]
fn a_destination_that_only_claims_progress_does_not_hold_a_paused_guest() {
    let mut session = source_until(|action| matches!(action, SourceAction::Send(Message::Finish(_))));
    let (after, actions) = claim_progress(&mut session, Duration::from_secs(3600)).expect("an end");
    // Next to nothing was predicted.
    let limit = work_limit() + Duration::from_secs(1) * STANDSTILL_FACTOR;
    assert!(after > work_limit() && after < NOW + limit, "after {after:?}");
    assert!(actions.iter().any(|action| matches!(action, SourceAction::Resume)), "{actions:?}");
    match session.into_parts().0 {
        Some(Outcome::SourceOwns(error @ Error::StoodTooLong { .. })) => {
            assert!(error.to_string().contains("it runs on here"), "{error}");
        }
        other => panic!("the guest is the source's: {other:?}"),
    }
}

/// What was sent before the switch-over was forced says little about what is left.
#[test]
fn a_forced_switch_over_has_the_time_that_the_rest_takes_whole() {
    let (pages, sent, rate) = (1 << 20, 100_000, 10 << 20);
    let whole = Duration::from_secs(pages * 4096 / rate);
    for wire_bytes in [rate, 0] {
        let mut session = source_until(|action| matches!(action, SourceAction::SendRound { .. }));
        let tally = Tally { pages: sent, wire_bytes, ..Tally::default() };
        for input in [
            SourceInput::SwitchOverNow,
            SourceInput::RoundQueued,
            SourceInput::RoundFlushed(tally),
            SourceInput::Message(Message::RoundAck { round: 0 }),
            SourceInput::Harvested { dirty_pages: pages, writes: 0 },
            SourceInput::Paused,
            SourceInput::Harvested { dirty_pages: pages, writes: 0 },
        ] {
            session.handle(NOW + Duration::from_secs(1), input);
            while session.poll_action().is_some() {}
        }
        assert!(claim_progress(&mut session, NOW + whole).is_none(), "{:?}", session.into_parts().0);
    }
}

#[test]
fn after_commit_a_destination_that_only_claims_progress_is_asked_who_owns_the_guest() {
    let mut session = source_until(|action| matches!(action, SourceAction::Send(Message::Commit)));
    let (after, actions) = claim_progress(&mut session, Duration::from_secs(3600)).expect("an end");
    assert!(after >= work_limit() && after <= NOW + work_limit() + Duration::from_secs(1), "after {after:?}");
    assert!(actions.iter().any(|action| matches!(action, SourceAction::DialSettle)), "{actions:?}");
    assert!(!actions.iter().any(|action| matches!(action, SourceAction::Resume)), "{actions:?}");
}

#[test]
fn what_the_source_itself_takes_is_no_reason_to_give_up() {
    let mut session = source_until(|action| matches!(action, SourceAction::Save));
    // Longer than any limit.
    let saved = NOW + work_limit() * 100;
    session.handle(saved, SourceInput::Saved { bytes: 0, waited: Duration::ZERO });
    let harvested = saved + work_limit() * 100;
    session.handle(harvested, SourceInput::Harvested { dirty_pages: 0, writes: 0 });
    assert!(session.outcome().is_none());
    let timeout = session.poll_timeout().expect("it waits");
    assert!(timeout > harvested, "{timeout:?}");
}

#[test]
fn a_destination_that_takes_the_machine_state_slowly_does_not_hold_a_paused_guest() {
    for answers in [true, false] {
        let mut session = source_until(|action| matches!(action, SourceAction::Save));
        let patience = session.patience(NOW);
        assert!(patience >= work_limit() && patience < work_limit() * 2, "{patience:?}");
        // Whether it was all taken in the end, or given up.
        let (bytes, waited) = (4096, patience + session.patience_for(4096));
        let end = NOW + waited;
        let waited = SourceInput::Saved { bytes, waited };
        session.handle(end, if answers { waited } else { SourceInput::Tick });
        let actions: Vec<_> = std::iter::from_fn(|| session.poll_action()).collect();
        assert!(actions.iter().any(|action| matches!(action, SourceAction::Resume)), "{actions:?}");
        assert!(matches!(session.into_parts().0, Some(Outcome::SourceOwns(Error::StoodTooLong { .. }))));
    }
}

#[test]
fn a_state_longer_than_the_vmm_had_said_may_take_its_time() {
    let mut session = source_until(|action| matches!(action, SourceAction::Save));
    let waited = session.patience(NOW) + session.patience_for(1 << 30) / 2;
    session.handle(NOW + waited, SourceInput::Saved { bytes: 1 << 30, waited });
    assert!(session.outcome().is_none());
}
