//! The source's half of the protocol for a guest that comes out of a file. No I/O: it hears what the destination says and says
//! whose turn it is.
//!
//! A file has no guest that could run on, so there is little to lose here; but the destination must hear Commit only after it
//! has proved that it holds what was saved, and must never be left alone with the question whose the guest is.

use pageferry::config::Verify;
use pageferry::wire::{Finish, Greeting, GreetingRole, Kind, Message, Offer, PROTOCOL_MAX, PROTOCOL_MIN, SessionId};

/// What the control lane does next.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Turn {
    /// Says this.
    Say(Message),
    /// Repeats the next frame of the file, if [`Player::repeat`] allows it.
    Repeat,
    /// Waits for an answer, silently.
    Wait,
    /// Waits for an answer, and says now and then that it is alive.
    WaitAlive,
    /// Has nothing to say any more.
    End,
}

#[derive(Clone, PartialEq, Debug)]
enum State {
    Greeting,
    AwaitWelcome,
    Offering,
    AwaitAccept,
    Playing,
    AwaitPrepared,
    Committing,
    AwaitRunning,
    /// The lane is gone: another one asks whose the guest is.
    Asking,
    AwaitSettled,
    Ending,
    Aborting(String),
    Over,
}

/// A guest that is being repeated.
#[derive(Debug)]
pub(crate) struct Player {
    state: State,
    session: SessionId,
    protocol: u16,
    lanes: u16,
    lanes_open: bool,
    finish: Option<Finish>,
}

impl Player {
    /// Plays a guest that was saved in this protocol over so many data lanes, under a fresh name.
    pub(crate) fn new(session: SessionId, protocol: u16, lanes: u16) -> Self {
        Self { state: State::Greeting, session, protocol, lanes, lanes_open: false, finish: None }
    }

    /// The greeting of a lane.
    pub(crate) fn greeting(&self, role: GreetingRole) -> Message {
        let (version_min, version_max) = (self.protocol.max(PROTOCOL_MIN), self.protocol.min(PROTOCOL_MAX));
        Message::Greeting(Greeting { version_min, version_max, session: self.session, role })
    }

    /// Data lanes that the guest was saved over.
    pub(crate) fn lanes(&self) -> u16 {
        self.lanes
    }

    /// Whether the destination takes data lanes.
    pub(crate) fn lanes_open(&self) -> bool {
        self.lanes_open
    }

    /// Whether everything was said.
    pub(crate) fn is_over(&self) -> bool {
        self.state == State::Over
    }

    /// Whether another lane has to ask whose the guest is.
    pub(crate) fn asks(&self) -> bool {
        self.state == State::Asking
    }

    /// What the control lane does next.
    pub(crate) fn turn(&mut self) -> Turn {
        let (next, turn) = match &self.state {
            State::Greeting => (State::AwaitWelcome, Turn::Say(self.greeting(GreetingRole::Control))),
            State::Committing => (State::AwaitRunning, Turn::Say(Message::Commit)),
            State::Asking => (State::AwaitSettled, Turn::Say(self.greeting(GreetingRole::Settle))),
            State::Ending => (State::Over, Turn::Say(Message::Done)),
            State::Aborting(reason) => (State::Over, Turn::Say(Message::Abort { reason: reason.clone() })),
            State::Offering | State::Playing => return Turn::Repeat,
            State::AwaitWelcome | State::AwaitAccept | State::AwaitSettled => return Turn::Wait,
            State::AwaitPrepared | State::AwaitRunning => return Turn::WaitAlive,
            State::Over => return Turn::End,
        };
        self.state = next;
        turn
    }

    /// The control lane's next frame in the file is this; `message` unless it is of pages. An error says why it cannot be
    /// repeated.
    pub(crate) fn repeat(&mut self, kind: Kind, message: Option<&Message>) -> Result<(), String> {
        match (&self.state, message) {
            (State::Offering, Some(Message::Offer(offer))) => {
                check_offer(offer, self.lanes)?;
                self.state = State::AwaitAccept;
            }
            (State::Playing, Some(Message::State(_))) => {}
            (State::Playing, Some(Message::StepEnd { .. })) if self.lanes == 0 => {}
            (State::Playing, None) if self.lanes == 0 && kind == Kind::Pages => {}
            (State::Playing, Some(Message::Finish(finish))) => {
                self.finish = Some(*finish);
                self.state = State::AwaitPrepared;
            }
            // Overtaken by a failure.
            (State::Aborting(_) | State::Over, _) => return Err("it is over".to_owned()),
            _ => return Err(format!("there is a frame of kind {kind:?} where none belongs")),
        }
        Ok(())
    }

    /// The destination says something.
    pub(crate) fn answered(&mut self, message: &Message) {
        match (&self.state, message) {
            (State::AwaitWelcome, Message::Welcome { version }) if *version == self.protocol => {
                self.state = State::Offering;
            }
            (State::AwaitAccept, Message::Accept { .. }) => {
                self.state = State::Playing;
                self.lanes_open = true;
            }
            (State::AwaitPrepared, Message::Prepared(prepared)) => match self.finish {
                Some(finish) if finish.digest == prepared.digest => self.state = State::Committing,
                _ => self.fail("what arrived is not what was saved".to_owned()),
            },
            (State::AwaitRunning | State::AwaitSettled, Message::Running { .. } | Message::Settled(_)) => {
                self.state = State::Ending;
            }
            (State::AwaitRunning | State::AwaitSettled | State::Aborting(_) | State::Over, _)
            | (_, Message::Heartbeat { .. } | Message::RoundAck { .. }) => {}
            (_, Message::Abort { .. } | Message::Refuse(_) | Message::Settled(_)) => self.state = State::Over,
            (state, _) => self.fail(format!("the destination sent a message that does not belong to state {state:?}")),
        }
    }

    /// The file cannot be repeated any further.
    pub(crate) fn fail(&mut self, reason: String) {
        if !self.committed() && !matches!(self.state, State::Aborting(_) | State::Over) {
            self.state = State::Aborting(reason);
        }
    }

    /// The control lane is gone.
    pub(crate) fn lost(&mut self) {
        // Having heard Finish the destination may hold the guest ready, and wait to be asked.
        let may_wait = matches!(self.state, State::AwaitPrepared | State::Committing | State::AwaitRunning);
        self.state = if may_wait { State::Asking } else { State::Over };
        self.lanes_open = false;
    }

    fn committed(&self) -> bool {
        matches!(self.state, State::AwaitRunning | State::Asking | State::AwaitSettled | State::Ending)
    }
}

/// Whether an offer is one that a recorder takes.
pub(crate) fn check_offer(offer: &Offer, lanes: u16) -> Result<(), String> {
    if offer.data_lanes != lanes || offer.verify != Verify::Digest {
        return Err(format!("its offer is for {} data lanes, {:?} verification", offer.data_lanes, offer.verify));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use pageferry::digest::{Digest, DigestKey};
    use pageferry::memory::{Layout, Region};
    use pageferry::wire::{Owner, Prepared, Refusal};

    use super::*;

    fn offer(data_lanes: u16, verify: Verify) -> Message {
        let layout = Layout::new(vec![Region::ram("ram", 0, 1 << 20)]).unwrap();
        let digest_key = DigestKey([0; 32]);
        Message::Offer(Box::new(Offer { digest_key, data_lanes, verify, run: true, layout, config: Vec::new() }))
    }

    fn finish() -> Message {
        Message::Finish(Finish { last_round: 0, digest: Digest(5), state_len: 0 })
    }

    fn prepared(digest: u128) -> Message {
        Message::Prepared(Prepared { digest: Digest(digest), ..Prepared::default() })
    }

    /// Up to the answer to the offer.
    fn playing(lanes: u16) -> Player {
        let mut player = Player::new(SessionId([1; 16]), PROTOCOL_MAX, lanes);
        assert!(matches!(player.turn(), Turn::Say(Message::Greeting(_))));
        assert_eq!(player.turn(), Turn::Wait);
        player.answered(&Message::Welcome { version: PROTOCOL_MAX });
        assert_eq!(player.turn(), Turn::Repeat);
        player.repeat(Kind::Offer, Some(&offer(lanes, Verify::Digest))).unwrap();
        assert!(player.turn() == Turn::Wait && !player.lanes_open());
        player.answered(&Message::Accept { exposed: false });
        assert!(player.turn() == Turn::Repeat && player.lanes_open());
        player
    }

    fn finished() -> Player {
        let mut player = playing(2);
        player.repeat(Kind::State, Some(&Message::State(vec![1]))).unwrap();
        player.repeat(Kind::Finish, Some(&finish())).unwrap();
        assert_eq!(player.turn(), Turn::WaitAlive);
        player
    }

    #[test]
    fn commit_follows_the_proof_and_done_follows_the_guest() {
        let mut player = finished();
        player.answered(&Message::RoundAck { round: 0 });
        player.answered(&prepared(5));
        assert_eq!(player.turn(), Turn::Say(Message::Commit));
        assert_eq!(player.turn(), Turn::WaitAlive);
        player.answered(&Message::Running { resume_us: 1 });
        assert_eq!(player.turn(), Turn::Say(Message::Done));
        assert_eq!(player.turn(), Turn::End);
    }

    #[test]
    fn another_digest_gets_no_commit() {
        let mut player = finished();
        player.answered(&prepared(6));
        assert!(matches!(player.turn(), Turn::Say(Message::Abort { .. })));
        assert_eq!(player.turn(), Turn::End);
    }

    #[test]
    fn what_cannot_be_read_is_told_before_commit_and_no_matter_afterwards() {
        let mut player = playing(1);
        player.fail("extent 3 is damaged".to_owned());
        assert!(player.repeat(Kind::Finish, Some(&finish())).is_err());
        let reason = "extent 3 is damaged".to_owned();
        assert_eq!(player.turn(), Turn::Say(Message::Abort { reason }));
        let mut player = finished();
        player.answered(&prepared(5));
        player.turn();
        player.fail("late".to_owned());
        assert_eq!(player.turn(), Turn::WaitAlive);
    }

    #[test]
    fn a_destination_that_may_hold_the_guest_ready_is_asked_when_its_lane_is_gone() {
        for committed in [false, true] {
            let mut player = finished();
            if committed {
                player.answered(&prepared(5));
                player.turn();
            }
            player.lost();
            assert!(player.asks() && !player.lanes_open());
            let Turn::Say(Message::Greeting(greeting)) = player.turn() else { panic!("no greeting") };
            assert_eq!(greeting.role, GreetingRole::Settle);
            assert_eq!(player.turn(), Turn::Wait);
            player.answered(&Message::Settled(Owner::Source));
            assert_eq!(player.turn(), Turn::Say(Message::Done));
        }
        let mut player = playing(1);
        player.lost();
        assert!(!player.asks() && player.turn() == Turn::End);
    }

    #[test]
    fn frames_are_repeated_only_where_they_belong() {
        let mut player = playing(2);
        assert!(player.repeat(Kind::Pages, None).is_err());
        assert!(player.repeat(Kind::StepEnd, Some(&Message::StepEnd { step: 0 })).is_err());
        assert!(player.repeat(Kind::Commit, Some(&Message::Commit)).is_err());
        assert!(player.repeat(Kind::Offer, Some(&offer(2, Verify::Digest))).is_err());
        let mut player = playing(0);
        assert!(player.repeat(Kind::Pages, None).is_ok());
        assert!(player.repeat(Kind::StepEnd, Some(&Message::StepEnd { step: 0 })).is_ok());
        let mut player = Player::new(SessionId([1; 16]), PROTOCOL_MAX, 2);
        player.turn();
        player.answered(&Message::Welcome { version: PROTOCOL_MAX });
        assert!(player.repeat(Kind::Finish, Some(&finish())).is_err());
        assert!(player.repeat(Kind::Offer, Some(&offer(1, Verify::Digest))).is_err());
        assert!(player.repeat(Kind::Offer, Some(&offer(2, Verify::Full))).is_err());
    }

    #[test]
    fn a_destination_that_says_no_has_the_last_word() {
        for no in [Message::Abort { reason: String::new() }, Message::Refuse(Refusal::Guest("no room".to_owned()))] {
            let mut player = playing(1);
            player.answered(&no);
            assert_eq!(player.turn(), Turn::End);
        }
        let mut player = playing(1);
        player.answered(&Message::Commit);
        assert!(matches!(player.turn(), Turn::Say(Message::Abort { .. })));
    }
}
