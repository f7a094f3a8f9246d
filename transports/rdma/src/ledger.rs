//! What a lane keeps account of: credits, the numbers of its work, what has arrived and how it ends. No device is in it.

use std::collections::VecDeque;
use std::time::Instant;

use crate::failure::LaneFailure;
use crate::message::{Answer, Kind};
use crate::plan::Rings;
use crate::verbs::CELLS;

/// Work that the device may do without saying that it is done. No ring of slots is shorter.
const QUIET: u32 = 4;

/// A message that waits for the receiving half.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrived {
    pub(crate) slot: u16,
    pub(crate) len: usize,
    pub(crate) kind: Kind,
}

/// The answer to this side's question.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Awaited {
    Nothing,
    Answer,
    Here(Answer),
}

/// What one lane is at the moment.
pub(crate) struct Ledger {
    /// Messages of the peer's that may wait for the receiving half: it has as many credits.
    arrived_most: usize,
    /// Slots at the peer that may be sent to, and all there are.
    pub(crate) credits: u16,
    credits_most: u16,
    /// Numbers of the last work given to the device, of the last that is done, and of the last whose end it will tell.
    pub(crate) posted: u64,
    pub(crate) done: u64,
    pub(crate) told: u64,
    /// The work that last used each slot and cell.
    pub(crate) slots: Vec<u64>,
    pub(crate) cells: [u64; CELLS],
    /// Slots of ours that the peer may use again, and does not know of.
    pub(crate) owed: u16,
    pub(crate) arrived: VecDeque<Arrived>,
    pub(crate) answer: Awaited,
    /// What the peer asked is answered so; it waits for a cell.
    pub(crate) reply: Option<Answer>,
    /// The peer said that this was all.
    pub(crate) ended: bool,
    /// This side did.
    pub(crate) farewell: bool,
    pub(crate) failure: Option<LaneFailure>,
    /// A thread sleeps on the descriptors.
    pub(crate) watched: bool,
    pub(crate) last_sign: Instant,
}

impl Ledger {
    pub(crate) fn new(rings: Rings) -> Self {
        Self {
            arrived_most: usize::from(rings.credits),
            credits: 0,
            credits_most: 0,
            posted: 0,
            done: 0,
            told: 0,
            slots: vec![0; usize::from(rings.send_slots)],
            cells: [0; CELLS],
            owed: 0,
            arrived: VecDeque::new(),
            answer: Awaited::Nothing,
            reply: None,
            ended: false,
            farewell: false,
            failure: None,
            watched: false,
            last_sign: Instant::now(),
        }
    }

    /// The peer has so many slots.
    pub(crate) fn meet(&mut self, credits: u16) {
        (self.credits, self.credits_most) = (credits, credits);
    }

    /// Takes in a message, and the credits that came with it. Says whether its slot is still needed, for the receiving half to read.
    pub(crate) fn take_in(&mut self, message: Arrived, credits: u16) -> Result<bool, LaneFailure> {
        self.credits = self
            .credits
            .checked_add(credits)
            .filter(|&sum| sum <= self.credits_most)
            .ok_or(LaneFailure::Protocol("more credits than it has slots"))?;
        match message.kind {
            Kind::Fragment { .. } | Kind::Ask(_) if self.arrived.len() >= self.arrived_most => {
                return Err(LaneFailure::Protocol("more messages than it has credits"));
            }
            Kind::Fragment { .. } | Kind::Ask(_) => {
                self.arrived.push_back(message);
                return Ok(true);
            }
            Kind::Credits => {}
            Kind::End => self.ended = true,
            Kind::Answer(answer) if self.answer == Awaited::Answer => self.answer = Awaited::Here(answer),
            Kind::Answer(_) => return Err(LaneFailure::Protocol("an answer to nothing")),
        }
        Ok(false)
    }

    /// The first failure is the cause; others follow from it.
    pub(crate) fn fail(&mut self, failure: LaneFailure) {
        self.failure.get_or_insert(failure);
    }

    /// Why nothing more can be sent or will come.
    pub(crate) fn over(&self) -> Option<LaneFailure> {
        match self.failure {
            _ if self.ended => Some(LaneFailure::Closed),
            _ if self.farewell => Some(LaneFailure::ClosedHere),
            failure => failure,
        }
    }

    /// A number for new work.
    pub(crate) fn next(&mut self, signaled: bool) -> u64 {
        self.posted += 1;
        if signaled {
            self.told = self.posted;
        }
        self.posted
    }

    /// A number for new work, and whether its end is to be told: now and then it must.
    pub(crate) fn next_maybe(&mut self, signaled: bool) -> (u64, bool) {
        let signaled = signaled || self.posted + 1 - self.told >= u64::from(QUIET);
        (self.next(signaled), signaled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Refusal;

    fn ledger(credits: u16) -> Ledger {
        let mut ledger = Ledger::new(Rings::new(None));
        ledger.meet(credits);
        ledger
    }

    fn message(kind: Kind) -> Arrived {
        Arrived { slot: 3, len: 9, kind }
    }

    #[test]
    fn credits_come_back_up_to_as_many_as_there_are_slots() {
        let mut ledger = ledger(5);
        ledger.credits = 2;
        assert_eq!(ledger.take_in(message(Kind::Credits), 3), Ok(false));
        assert_eq!(ledger.credits, 5);
        for more in [1, u16::MAX] {
            assert!(matches!(ledger.take_in(message(Kind::Credits), more), Err(LaneFailure::Protocol(_))), "{more}");
        }
        assert_eq!(ledger.credits, 5);
    }

    #[test]
    fn no_more_messages_wait_than_there_are_credits() {
        let mut ledger = ledger(5);
        let part = message(Kind::Fragment { left: 9 });
        for _ in 0..ledger.arrived_most {
            assert_eq!(ledger.take_in(part, 0), Ok(true));
        }
        assert_eq!(ledger.take_in(part, 0), Err(LaneFailure::Protocol("more messages than it has credits")));
        // What needs no credit comes through.
        assert_eq!(ledger.take_in(message(Kind::End), 0), Ok(false));
        assert_eq!(ledger.over(), Some(LaneFailure::Closed));
    }

    #[test]
    fn an_answer_is_taken_once_and_to_a_question_only() {
        let mut ledger = ledger(5);
        let refused = Answer::Refused(Refusal::Host);
        assert!(ledger.take_in(message(Kind::Answer(refused)), 0).is_err());
        ledger.answer = Awaited::Answer;
        assert_eq!(ledger.take_in(message(Kind::Answer(refused)), 0), Ok(false));
        assert_eq!(ledger.answer, Awaited::Here(refused));
        assert!(ledger.take_in(message(Kind::Answer(refused)), 0).is_err());
    }

    #[test]
    fn the_device_is_never_quiet_for_long() {
        let mut ledger = ledger(5);
        let mut quiet = 0;
        for number in 1..100 {
            let (given, signaled) = ledger.next_maybe(number % 9 == 0);
            assert_eq!(given, number);
            quiet = if signaled { 0 } else { quiet + 1 };
            assert!(quiet < QUIET, "{number}");
        }
    }

    #[test]
    fn the_first_failure_is_the_one_that_is_told() {
        let mut ledger = ledger(5);
        ledger.fail(LaneFailure::Dead);
        ledger.fail(LaneFailure::BrokenOff);
        assert_eq!(ledger.over(), Some(LaneFailure::Dead));
    }
}
