//! The destination's half of the protocol for a guest that goes into a file. No I/O: it hears what came and says what to do.
//!
//! The guest is the file's once that has its final name (R10 to R12). That happens after Commit and at no other time; until
//! then whatever goes wrong gives the guest up and removes the file. If it cannot be done, the source is told that it owns the
//! guest.

use std::collections::VecDeque;

use pageferry::barrier::{Barrier, Entry};
use pageferry::batch::round_of;
use pageferry::config::Verify;
use pageferry::wire::{
    Finish, Greeting, GreetingRole, Message, Offer, Owner, PROTOCOL_MAX, PROTOCOL_MIN, Prepared, Refusal, SessionId,
};

/// What is to be done, in order.
#[derive(Clone, PartialEq, Debug)]
pub(crate) enum Action {
    /// Tell the source.
    Answer(Message),
    /// Write down all that came, and whatever makes the file complete but its name; tell by [`Recorder::sealed`].
    Seal,
    /// Give the file its name; tell by [`Recorder::published`].
    Publish,
    /// Remove the file.
    Discard,
}

/// How far it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    AwaitOffer,
    Recording,
    Sealing,
    /// The source may commit.
    Ready,
    Publishing,
    /// The guest is in the file.
    Published,
    /// The guest is the source's, for good.
    GivenUp,
}

/// A guest that is being written down.
#[derive(Debug)]
pub(crate) struct Recorder {
    state: State,
    session: SessionId,
    version: u16,
    lanes: u16,
    barrier: Barrier,
    rounds_complete: u32,
    finish: Option<Finish>,
    state_bytes: u64,
    actions: VecDeque<Action>,
}

impl Recorder {
    /// Answers the greeting of a source that wants to save its guest.
    pub(crate) fn greeted(greeting: &Greeting) -> Result<Self, Refusal> {
        let version = greeting.version_max.min(PROTOCOL_MAX);
        if version < greeting.version_min || version < PROTOCOL_MIN || greeting.role != GreetingRole::Control {
            return Err(Refusal::Version { min: PROTOCOL_MIN, max: PROTOCOL_MAX });
        }
        Ok(Self {
            state: State::AwaitOffer,
            session: greeting.session,
            version,
            lanes: 0,
            barrier: Barrier::new(1),
            rounds_complete: 0,
            finish: None,
            state_bytes: 0,
            actions: VecDeque::from([Action::Answer(Message::Welcome { version })]),
        })
    }

    /// The protocol that is spoken.
    pub(crate) fn version(&self) -> u16 {
        self.version
    }

    /// Data lanes, once there was an offer.
    pub(crate) fn lanes(&self) -> u16 {
        self.lanes
    }

    /// Which migration it is.
    pub(crate) fn session(&self) -> SessionId {
        self.session
    }

    /// Whether data lanes are expected and pages may come.
    pub(crate) fn records(&self) -> bool {
        self.state == State::Recording
    }

    /// Whether it is decided whose the guest is.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.state, State::Published | State::GivenUp)
    }

    /// The next thing to do.
    pub(crate) fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// A message came on the control lane. Returns whether it is part of the guest.
    pub(crate) fn message(&mut self, message: &Message) -> bool {
        match (self.state, message) {
            (State::AwaitOffer, Message::Offer(offer)) => self.offered(offer),
            (State::Recording, Message::State(piece)) => {
                self.state_bytes += piece.len() as u64;
                true
            }
            (State::Recording, Message::StepEnd { step }) if self.lanes == 0 => self.step_end(0, *step),
            (State::Recording, Message::Finish(finish)) if self.finish.is_none() => {
                self.finish = Some(*finish);
                self.check_complete();
                self.state != State::GivenUp
            }
            (State::Ready, Message::Commit) => {
                self.state = State::Publishing;
                self.actions.push_back(Action::Publish);
                false
            }
            (State::Published | State::GivenUp, _) | (_, Message::Heartbeat { .. }) => false,
            (_, Message::Abort { .. }) => {
                self.give_up();
                false
            }
            (state, _) => {
                self.fail(format!("the source sent a message that does not belong to state {state:?}"));
                false
            }
        }
    }

    fn offered(&mut self, offer: &Offer) -> bool {
        if offer.verify == Verify::Full {
            let reason = "a full verification compares the guest's memory with another, and a file has none; save without it, \
                          what is in the file is checked when it is restored";
            self.actions.push_back(Action::Answer(Message::Refuse(Refusal::Guest(reason.to_owned()))));
            self.give_up();
            return false;
        }
        self.lanes = offer.data_lanes;
        self.barrier = Barrier::new(offer.data_lanes.max(1));
        self.state = State::Recording;
        self.actions.push_back(Action::Answer(Message::Accept { exposed: false }));
        true
    }

    /// A frame of pages came on a lane that carries pages. Returns whether it may.
    pub(crate) fn pages(&mut self, lane: u16, step: u32) -> bool {
        if self.state != State::Recording {
            return false;
        }
        match self.barrier.enter(lane, step) {
            Ok(Entry::Now) => true,
            // The source lets no lane go on before all have ended a step.
            Ok(Entry::Wait) => self.fail(format!("lane {lane} went on to step {step} before the others")),
            Err(error) => self.fail(error.to_string()),
        }
    }

    /// A lane has ended a step. Returns whether it may.
    pub(crate) fn step_end(&mut self, lane: u16, step: u32) -> bool {
        if !self.pages(lane, step) {
            return false;
        }
        if let Some((round, true)) = self.barrier.end(lane).map(round_of) {
            self.rounds_complete = round.saturating_add(1);
            self.actions.push_back(Action::Answer(Message::RoundAck { round }));
            self.check_complete();
        }
        self.state != State::GivenUp
    }

    fn check_complete(&mut self) {
        let Some(finish) = self.finish else { return };
        if self.rounds_complete <= finish.last_round {
            return;
        }
        if finish.state_len != self.state_bytes {
            let (announced, came) = (finish.state_len, self.state_bytes);
            self.fail(format!("it announced {announced} bytes of state and sent {came}"));
            return;
        }
        self.state = State::Sealing;
        self.actions.push_back(Action::Seal);
    }

    /// The file is complete but for its name, or cannot be.
    pub(crate) fn sealed(&mut self, result: Result<(), String>) {
        match (self.state, result, self.finish) {
            (State::Sealing, Ok(()), Some(finish)) => {
                self.state = State::Ready;
                let prepared = Prepared { digest: finish.digest, ..Prepared::default() };
                self.actions.push_back(Action::Answer(Message::Prepared(prepared)));
            }
            (State::Sealing, result, _) => {
                self.fail(result.err().unwrap_or_default());
            }
            // Something else has ended it meanwhile.
            _ => {}
        }
    }

    /// The file has its name, or cannot have it.
    pub(crate) fn published(&mut self, result: Result<(), String>) {
        if self.state != State::Publishing {
            return;
        }
        match result {
            Ok(()) => {
                self.state = State::Published;
                self.actions.push_back(Action::Answer(Message::Running { resume_us: 0 }));
            }
            Err(reason) => {
                // Let go first, then promise.
                self.give_up();
                self.actions.push_back(Action::Answer(Message::Abort { reason }));
                self.actions.push_back(Action::Answer(Message::Settled(Owner::Source)));
            }
        }
    }

    /// What came cannot be written down. Always `false`.
    pub(crate) fn fail(&mut self, reason: String) -> bool {
        if !self.is_over() && self.state != State::Publishing {
            self.give_up();
            self.actions.push_back(Action::Answer(Message::Abort { reason }));
        }
        false
    }

    /// The control lane has ended: no Commit can come any more.
    pub(crate) fn lost(&mut self) {
        if self.state != State::Publishing {
            self.give_up();
        }
    }

    /// The source asks whose the guest is. `None` if it has nothing to ask.
    pub(crate) fn settle(&mut self, session: SessionId) -> Option<Message> {
        if session != self.session || self.state == State::AwaitOffer {
            return None;
        }
        if self.state == State::Published {
            return Some(Message::Settled(Owner::Destination));
        }
        self.give_up();
        Some(Message::Settled(Owner::Source))
    }

    fn give_up(&mut self) {
        if !self.is_over() {
            self.state = State::GivenUp;
            self.actions.push_back(Action::Discard);
        }
    }
}

#[cfg(test)]
mod tests {
    use pageferry::digest::{Digest, DigestKey};
    use pageferry::memory::{Layout, Region};

    use super::*;

    const SESSION: SessionId = SessionId([4; 16]);

    fn greeting() -> Greeting {
        let role = GreetingRole::Control;
        Greeting { version_min: PROTOCOL_MIN, version_max: PROTOCOL_MAX, session: SESSION, role }
    }

    fn offer(data_lanes: u16, verify: Verify) -> Message {
        let layout = Layout::new(vec![Region::ram("ram", 0, 1 << 20)]).unwrap();
        let digest_key = DigestKey([0; 32]);
        Message::Offer(Box::new(Offer { digest_key, data_lanes, verify, run: true, layout, config: Vec::new() }))
    }

    fn finish(last_round: u32, state_len: u64) -> Message {
        Message::Finish(Finish { last_round, digest: Digest(77), state_len })
    }

    fn actions(recorder: &mut Recorder) -> Vec<Action> {
        std::iter::from_fn(|| recorder.poll_action()).collect()
    }

    fn recording(lanes: u16) -> Recorder {
        let mut recorder = Recorder::greeted(&greeting()).unwrap();
        assert!(recorder.message(&offer(lanes, Verify::Digest)));
        let version = PROTOCOL_MAX;
        let answers = [Message::Welcome { version }, Message::Accept { exposed: false }].map(Action::Answer);
        assert_eq!(actions(&mut recorder), answers);
        recorder
    }

    /// Up to where the source may commit.
    fn ready() -> Recorder {
        let mut recorder = recording(2);
        for step in 0..2 {
            assert!(recorder.pages(0, step) && recorder.step_end(0, step) && recorder.step_end(1, step));
        }
        assert!(recorder.message(&Message::State(vec![0; 10])) && recorder.message(&finish(0, 10)));
        assert_eq!(actions(&mut recorder), [Action::Answer(Message::RoundAck { round: 0 }), Action::Seal]);
        recorder.sealed(Ok(()));
        let [Action::Answer(Message::Prepared(prepared))] = actions(&mut recorder)[..] else { panic!("not prepared") };
        assert_eq!(prepared.digest, Digest(77));
        recorder
    }

    #[test]
    fn the_file_gets_its_name_after_commit_and_the_source_hears_it_afterwards() {
        let mut recorder = ready();
        assert!(!recorder.message(&Message::Commit));
        assert_eq!(actions(&mut recorder), [Action::Publish]);
        recorder.published(Ok(()));
        assert_eq!(actions(&mut recorder), [Action::Answer(Message::Running { resume_us: 0 })]);
        assert_eq!(recorder.settle(SESSION), Some(Message::Settled(Owner::Destination)));
        recorder.lost();
        assert!(recorder.fail("late".to_owned()) || actions(&mut recorder).is_empty());
    }

    #[test]
    fn a_name_that_cannot_be_had_gives_the_guest_back() {
        let mut recorder = ready();
        recorder.message(&Message::Commit);
        actions(&mut recorder);
        recorder.published(Err("the folder is gone".to_owned()));
        let reason = "the folder is gone".to_owned();
        let answers = [Message::Abort { reason }, Message::Settled(Owner::Source)].map(Action::Answer);
        assert_eq!(actions(&mut recorder), [&[Action::Discard][..], &answers].concat());
        assert_eq!(recorder.settle(SESSION), Some(Message::Settled(Owner::Source)));
    }

    #[test]
    fn whatever_ends_it_before_commit_leaves_no_file_and_no_way_back() {
        let ends: [fn(&mut Recorder); 5] = [
            |recorder| recorder.lost(),
            |recorder| assert!(!recorder.message(&Message::Abort { reason: String::new() })),
            |recorder| assert!(!recorder.fail("the disk is full".to_owned())),
            |recorder| assert_eq!(recorder.settle(SESSION), Some(Message::Settled(Owner::Source))),
            |recorder| assert!(!recorder.message(&Message::Accept { exposed: false })),
        ];
        for (case, end) in ends.iter().enumerate() {
            for mut recorder in [recording(2), ready()] {
                end(&mut recorder);
                assert_eq!(actions(&mut recorder)[0], Action::Discard, "case {case}");
                assert!(!recorder.message(&Message::Commit) && !recorder.pages(0, 0));
                recorder.sealed(Ok(()));
                recorder.published(Ok(()));
                assert_eq!(actions(&mut recorder), [], "case {case}");
                assert!(recorder.is_over());
            }
        }
    }

    #[test]
    fn a_disk_that_fails_while_the_file_is_completed_is_told() {
        let mut recorder = recording(0);
        for step in 0..2 {
            assert!(recorder.message(&Message::StepEnd { step }));
        }
        assert!(recorder.message(&finish(0, 0)));
        actions(&mut recorder);
        recorder.sealed(Err("no space".to_owned()));
        assert_eq!(
            actions(&mut recorder),
            [Action::Discard, Action::Answer(Message::Abort { reason: "no space".to_owned() })]
        );
    }

    #[test]
    fn commit_before_everything_is_there_is_no_commit() {
        for mut recorder in [Recorder::greeted(&greeting()).unwrap(), recording(1)] {
            assert!(!recorder.message(&Message::Commit));
            assert!(!actions(&mut recorder).contains(&Action::Publish));
        }
    }

    #[test]
    fn a_full_verification_is_refused_and_says_why() {
        let mut recorder = Recorder::greeted(&greeting()).unwrap();
        assert!(!recorder.message(&offer(1, Verify::Full)));
        let refused = actions(&mut recorder).into_iter().any(|action| {
            matches!(action, Action::Answer(Message::Refuse(Refusal::Guest(why))) if why.contains("save without it"))
        });
        assert!(refused && recorder.is_over());
    }

    #[test]
    fn signs_of_life_are_no_part_of_the_guest() {
        let mut recorder = recording(2);
        assert!(!recorder.message(&Message::Heartbeat { received: 0 }));
        assert!(actions(&mut recorder).is_empty() && recorder.records());
    }

    #[test]
    fn steps_out_of_order_and_state_of_another_length_are_refused() {
        let mut recorder = recording(2);
        assert!(recorder.step_end(0, 0) && !recorder.pages(0, 1));
        assert!(recorder.is_over());
        let mut recorder = recording(0);
        for step in 0..2 {
            recorder.message(&Message::StepEnd { step });
        }
        recorder.message(&finish(0, 3));
        assert!(recorder.is_over());
    }

    #[test]
    fn a_source_of_another_version_and_a_question_of_another_migration_are_turned_away() {
        let other = Greeting { version_min: PROTOCOL_MAX + 1, version_max: PROTOCOL_MAX + 2, ..greeting() };
        assert!(matches!(Recorder::greeted(&other), Err(Refusal::Version { .. })));
        assert_eq!(ready().settle(SessionId([5; 16])), None);
        assert_eq!(Recorder::greeted(&greeting()).unwrap().settle(SESSION), None);
    }
}
