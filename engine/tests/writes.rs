//! How fast a guest writes is seen between two looks at the dirty bits, and not by what is dirty in the end.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use common::source::{NOW, source_until};
use pageferry::encode::Tally;
use pageferry::session::{SourceAction, SourceInput};
use pageferry::stats::Event;
use pageferry::wire::Message;

const PAGE: f64 = 4096.0;

#[test]
fn a_round_that_outlasts_the_working_set_still_tells_how_fast_the_guest_writes() {
    let mut session = source_until(|action| matches!(action, SourceAction::SendRound { .. }));
    let mut now = NOW;
    let working_set = 5_000;
    // Looks by the way: by the second all of it is armed, and four fifths of it are written in half a second, twice. Once
    // something writes still faster.
    for writes in [100, 4_000, 4_900, 4_000] {
        now += Duration::from_millis(500);
        session.handle(now, SourceInput::Tick);
        assert!(matches!(session.poll_action(), Some(SourceAction::Harvest(_))));
        session.handle(now, SourceInput::Harvested { dirty_pages: working_set, writes });
    }
    // Much too soon after the last look to say anything.
    now += Duration::from_millis(1);
    let tally = Tally { pages: 100_000, wire_bytes: 100 << 20, ..Tally::default() };
    for input in [
        SourceInput::RoundQueued,
        SourceInput::RoundFlushed(tally),
        SourceInput::Message(Message::RoundAck { round: 0 }),
        SourceInput::Harvested { dirty_pages: working_set, writes: 500 },
    ] {
        session.handle(now, input);
    }
    let finished = std::iter::from_fn(|| session.poll_action()).find_map(|action| match action {
        SourceAction::Notify(Event::RoundFinished(round)) => Some(round),
        _ => None,
    });
    let round = finished.expect("the round is over");
    assert!((round.write_rate / (4_000.0 * PAGE / 0.5) - 1.0).abs() < 0.01, "{round:?}");
    assert!((round.dirty_rate / (5_000.0 * PAGE / 2.001) - 1.0).abs() < 0.01, "{round:?}");
}
