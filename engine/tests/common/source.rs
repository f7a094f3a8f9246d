//! The source's session against a willing destination, without either's driver.

use std::time::Duration;

use pageferry::SourceConfig;
use pageferry::converge::Adaptive;
use pageferry::digest::DigestKey;
use pageferry::encode::Tally;
use pageferry::session::{SourceAction, SourceInput, SourceSession, SourceSetup};
use pageferry::vm::Step;
use pageferry::wire::{Message, PROTOCOL_MAX, Prepared, SessionId};

use super::layout;

/// When everything happens.
pub const NOW: Duration = Duration::from_secs(1);

/// A source session that has met a willing destination until it asked for `last`, which is not performed.
pub fn source_until(last: impl Fn(&SourceAction) -> bool) -> SourceSession {
    let mut session = SourceSession::new(SourceSetup {
        config: SourceConfig::default(),
        session: SessionId([1; 16]),
        digest_key: DigestKey([2; 32]),
        layout: layout(64),
        vm_config: Vec::new(),
        run: true,
        state_bytes_estimate: 0,
        policy: Box::new(Adaptive::default()),
    });
    session.handle(NOW, SourceInput::Tick);
    loop {
        let action = session.poll_action().expect("the session has something to do");
        if last(&action) {
            return session;
        }
        for input in source_answers(&action) {
            session.handle(NOW, input);
        }
    }
}

pub fn source_answers(action: &SourceAction) -> Vec<SourceInput> {
    let prepared = Message::Prepared(Prepared::default());
    match action {
        SourceAction::Dial => vec![SourceInput::Dialled { peer: "there".to_owned() }],
        SourceAction::Send(Message::Greeting(_)) => {
            vec![SourceInput::Message(Message::Welcome { version: PROTOCOL_MAX })]
        }
        SourceAction::Send(Message::Offer(_)) => vec![SourceInput::Message(Message::Accept { exposed: false })],
        SourceAction::Send(Message::Finish(_)) => vec![SourceInput::Message(prepared)],
        SourceAction::OpenLanes { .. } => vec![SourceInput::LanesOpen],
        SourceAction::StartTracking => vec![SourceInput::Tracking { dirty_pages: 0 }],
        &SourceAction::SendRound { round, .. } => vec![
            SourceInput::RoundQueued,
            SourceInput::RoundFlushed(Tally::default()),
            SourceInput::Message(Message::RoundAck { round }),
        ],
        SourceAction::Harvest(_) => vec![SourceInput::Harvested { dirty_pages: 0, writes: 0 }],
        SourceAction::Pause => vec![SourceInput::Paused],
        SourceAction::Save => vec![SourceInput::Saved { bytes: 0, waited: Duration::ZERO }],
        SourceAction::Step(Step::BeforeHandover) => vec![SourceInput::StepDone],
        _ => Vec::new(),
    }
}
