//! One lane: one queue pair, rings of slots with credits at both ends, and an order for its end.
//!
//! The two halves of a lane, and whoever closes it, share a [`Core`]. Any of them moves it on: fetches completions, takes
//! credits and answers in, keeps messages for the receiving half. When there is nothing to do, one of the waiting threads (the
//! *watcher*) sleeps on the descriptors and the others sleep until it has news.
//!
//! A slot at the peer costs a credit; credits come back with whatever is sent, or in a message of their own when half of them
//! are due. Messages that cannot wait for a credit have reserved slots: see [`RESERVED_SLOTS`](crate::message::RESERVED_SLOTS).

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::cm::{Event, Id};
use crate::failure::{ConnectFailure, LaneFailure};
use crate::ledger::{Arrived, Awaited, Ledger};
use crate::message::{Answer, Ask, Hello, Kind, PREFIX, SMALL, decode, encode};
use crate::plan::Rings;
use crate::registered::Window;
use crate::sys::{Flag, wait_readable};
use crate::verbs::{CELLS, Completion, Place, Queue, Remote, Sizes, Status};

/// Writes into the peer's memory that may be under way at once: with whole pages, as much as a ring holds.
const WRITES: u32 = 64;

/// Time that the end of a lane may take to reach the peer.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the parts of a lane share.
pub(crate) struct Core {
    queue: Arc<Queue>,
    flag: Flag,
    rings: Rings,
    probe_after: Duration,
    peer: String,
    state: Mutex<Ledger>,
    changed: Condvar,
}

impl Core {
    /// The queue pair of a connection that is to be made, with all slots ready.
    pub(crate) fn new(id: &Arc<Id>, rings: Rings, probe_after: Duration, peer: String) -> Result<Self, ConnectFailure> {
        let depth = u32::from(rings.send_slots) + CELLS as u32 + WRITES;
        let sizes = Sizes { send_slots: rings.send_slots, receive_slots: rings.receive_slots(), depth };
        let queue = Arc::new(Queue::new(id, sizes)?);
        let host = |error| ConnectFailure::Host { what: "a lane", error };
        for slot in 0..sizes.receive_slots {
            queue.post_receive(slot).map_err(host)?;
        }
        let (state, changed) = (Mutex::new(Ledger::new(rings)), Condvar::new());
        Ok(Self { queue, flag: Flag::new().map_err(host)?, rings, probe_after, peer, state, changed })
    }

    /// What the peer has said of itself.
    pub(crate) fn meet(&self, hello: Hello) {
        self.lock().meet(hello.credits);
    }

    pub(crate) fn peer(&self) -> &str {
        &self.peer
    }

    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // Waiting.

    /// Waits until `ready` has something to say, which is asked again whenever the lane has moved on.
    fn wait<'a, T>(
        &'a self,
        mut state: MutexGuard<'a, Ledger>,
        mut ready: impl FnMut(&mut Ledger) -> Option<Result<T, LaneFailure>>,
    ) -> (MutexGuard<'a, Ledger>, Result<T, LaneFailure>) {
        loop {
            self.move_on(&mut state);
            if let Some(found) = ready(&mut state) {
                return (state, found);
            }
            if state.watched {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            // What comes between the last look and this is seen by the look after it.
            if self.queue.arm().is_err() {
                state.fail(LaneFailure::BrokenOff);
            }
            if self.move_on(&mut state) {
                continue;
            }
            if let Some(found) = ready(&mut state) {
                return (state, found);
            }
            state = self.watch(state);
        }
    }

    /// Sleeps until something happens on the lane.
    fn watch<'a>(&'a self, mut state: MutexGuard<'a, Ledger>) -> MutexGuard<'a, Ledger> {
        state.watched = true;
        drop(state);
        // A failure here is one of the arguments, which are ours: the next look finds out.
        let _ = wait_readable(&self.fds(), self.probe_after);
        let mut state = self.lock();
        state.watched = false;
        self.queue.take_events();
        self.hear_events(&mut state);
        self.probe(&mut state);
        self.changed.notify_all();
        state
    }

    /// Descriptors that become readable when something happens.
    pub(crate) fn fds(&self) -> [i32; 3] {
        [self.queue.fd(), self.queue.id().fd(), self.flag.fd()]
    }

    /// Asks the peer's device for a sign of life, when there was none for long.
    fn probe(&self, state: &mut Ledger) {
        if state.last_sign.elapsed() < self.probe_after || state.failure.is_some() || state.told > state.done {
            return;
        }
        state.last_sign = Instant::now();
        let number = state.next(true);
        if self.queue.post_probe(number).is_err() {
            state.fail(LaneFailure::BrokenOff);
        }
    }

    /// Takes in what happened to the connection.
    fn hear_events(&self, state: &mut Ledger) {
        while let Ok(Some(event)) = self.queue.id().next_event() {
            if matches!(event, Event::Disconnected | Event::Failed(_) | Event::Rejected(..)) {
                // The end, if it was sent, was acknowledged before: it is here.
                self.move_on(state);
                state.fail(LaneFailure::Dropped);
            }
        }
    }

    /// Takes in what the device has done, and sends what is due. Says whether there was anything.
    fn move_on(&self, state: &mut Ledger) -> bool {
        let mut any = false;
        loop {
            match self.queue.poll(&mut |completion| self.complete(state, completion)) {
                Ok(0) => break,
                Ok(_) => any = true,
                Err(_) => {
                    state.fail(LaneFailure::BrokenOff);
                    break;
                }
            }
        }
        if any {
            state.last_sign = Instant::now();
            self.changed.notify_all();
        }
        if state.failure.is_none() {
            self.send_due(state);
        }
        any
    }

    fn complete(&self, state: &mut Ledger, completion: Completion) {
        match completion {
            Completion::Done(number) => state.done = state.done.max(number),
            Completion::Received { slot, len } => {
                if let Err(failure) = self.take_in(state, slot, len) {
                    state.fail(failure);
                    // Nothing more of what such a peer sends is wanted.
                    let _ = self.queue.stop();
                }
            }
            Completion::Failed(status) => state.fail(match status {
                Status::NoAnswer => LaneFailure::Dead,
                Status::WriteRefused => LaneFailure::WriteRefused,
                Status::Flushed => LaneFailure::BrokenOff,
                Status::Other(code) => LaneFailure::Device(code),
            }),
        }
    }

    fn take_in(&self, state: &mut Ledger, slot: u16, len: usize) -> Result<(), LaneFailure> {
        let mut bytes = [0; SMALL];
        self.queue.get(slot, 0, &mut bytes);
        let (kind, credits) = decode(&bytes, len).map_err(|malformed| LaneFailure::Protocol(malformed.0))?;
        if state.take_in(Arrived { slot, len, kind }, credits)? {
            return Ok(());
        }
        self.queue.post_receive(slot).map_err(|_| LaneFailure::BrokenOff)
    }

    // Sending.

    /// Sends what needs no credit: answers, and credits if half of them are due.
    fn send_due(&self, state: &mut Ledger) {
        if let Some(reply) = state.reply
            && self.send_small(state, Kind::Answer(reply))
        {
            state.reply = None;
        }
        if state.owed >= self.rings.credits.div_ceil(2) {
            self.send_small(state, Kind::Credits);
        }
    }

    /// Sends a small message if a cell is free; it says so.
    fn send_small(&self, state: &mut Ledger, kind: Kind) -> bool {
        // One is kept for the end, which must not wait.
        let cells = if kind == Kind::End { CELLS } else { CELLS - 1 };
        let Some(cell) = state.cells[..cells].iter().position(|&last| last <= state.done) else { return false };
        let (bytes, len) = encode(kind, std::mem::take(&mut state.owed));
        self.queue.put(Place::Cell(cell), 0, &bytes[..len]);
        let number = state.next(true);
        state.cells[cell] = number;
        if self.queue.post_send(number, Place::Cell(cell), len, true).is_err() {
            state.fail(LaneFailure::BrokenOff);
        }
        true
    }

    /// Waits for a slot to send from, and for a credit of the peer's.
    pub(crate) fn slot(&self) -> Result<u16, LaneFailure> {
        let (_state, found) = self.wait(self.lock(), |state| {
            let next = state.slots.iter().position(|&last| last <= state.done);
            match (state.over(), next) {
                (Some(failure), _) => Some(Err(failure)),
                (None, Some(slot)) if state.credits > 0 => {
                    state.credits -= 1;
                    Some(Ok(slot as u16))
                }
                _ => None,
            }
        });
        found
    }

    /// Sends a part of a frame, whose bytes stand in the slot behind the prefix.
    pub(crate) fn send_fragment(&self, slot: u16, left: usize, len: usize) -> Result<(), LaneFailure> {
        let mut state = self.lock();
        self.send_from(&mut state, slot, Kind::Fragment { left: left as u32 }, len, left == len)
    }

    fn send_from(
        &self,
        state: &mut Ledger,
        slot: u16,
        kind: Kind,
        payload: usize,
        signaled: bool,
    ) -> Result<(), LaneFailure> {
        let (bytes, _) = encode(kind, std::mem::take(&mut state.owed));
        self.queue.put(Place::Slot(slot), 0, &bytes[..PREFIX]);
        let (number, signaled) = state.next_maybe(signaled);
        state.slots[usize::from(slot)] = number;
        self.queue.post_send(number, Place::Slot(slot), PREFIX + payload, signaled).map_err(|_| {
            state.fail(LaneFailure::BrokenOff);
            LaneFailure::BrokenOff
        })
    }

    /// Asks the peer for a window; the answer is told by [`answer`](Self::answer). One question at a time.
    pub(crate) fn ask(&self, ask: Ask) -> Result<(), LaneFailure> {
        let slot = self.slot()?;
        let mut state = self.lock();
        let (bytes, len) = encode(Kind::Ask(ask), 0);
        self.queue.put(Place::Slot(slot), PREFIX, &bytes[PREFIX..len]);
        state.answer = Awaited::Answer;
        self.send_from(&mut state, slot, Kind::Ask(ask), len - PREFIX, true)
    }

    /// Waits for the answer to the last question.
    pub(crate) fn answer(&self) -> Result<Answer, LaneFailure> {
        let (_state, found) = self.wait(self.lock(), |state| match state.answer {
            Awaited::Here(answer) => {
                state.answer = Awaited::Nothing;
                Some(Ok(answer))
            }
            _ => state.over().map(Err),
        });
        found
    }

    /// Answers the peer's question.
    pub(crate) fn reply(&self, answer: Answer) -> Result<(), LaneFailure> {
        let mut state = self.lock();
        if state.reply.replace(answer).is_some() {
            return Err(LaneFailure::Protocol("a question before the answer to the last one"));
        }
        self.send_due(&mut state);
        state.over().map_or(Ok(()), Err)
    }

    /// Writes a part of a window into the peer's memory; says by which number that is known.
    pub(crate) fn write(
        &self,
        window: &Window,
        offset: u64,
        len: u32,
        remote: Remote,
        last: bool,
    ) -> Result<u64, LaneFailure> {
        let (mut state, found) = self.wait(self.lock(), |state| match state.over() {
            Some(failure) => Some(Err(failure)),
            None => (state.posted - state.done < u64::from(WRITES)).then_some(Ok(())),
        });
        found?;
        let (number, signaled) = state.next_maybe(last);
        self.queue.post_write(number, window, offset, len, remote, signaled).map_err(|_| {
            state.fail(LaneFailure::BrokenOff);
            LaneFailure::BrokenOff
        })?;
        Ok(number)
    }

    /// Waits until some work is done.
    pub(crate) fn finish(&self, number: u64) -> Result<(), LaneFailure> {
        let mut state = self.lock();
        if state.told < number && state.failure.is_none() {
            let probe = state.next(true);
            self.queue.post_probe(probe).map_err(|_| LaneFailure::BrokenOff)?;
        }
        let (_state, found) = self.wait(state, |state| match state.over() {
            _ if state.done >= number => Some(Ok(())),
            failure => failure.map(Err),
        });
        found
    }

    /// Says that nothing more comes, once; if the device takes it, it arrives after all else.
    fn say_farewell(&self, state: &mut Ledger) {
        if !std::mem::replace(&mut state.farewell, true) && state.failure.is_none() {
            self.send_small(state, Kind::End);
        }
    }

    // Receiving.

    /// The next message for the receiving half.
    pub(crate) fn next_arrived(&self) -> Result<Arrived, LaneFailure> {
        let (_state, found) = self.wait(self.lock(), |state| match state.arrived.pop_front() {
            _ if state.farewell => Some(Err(LaneFailure::Closed)),
            Some(arrived) => Some(Ok(arrived)),
            None => state.over().map(Err),
        });
        found
    }

    /// Whether a message waits, or the lane is over: asks without waiting, and has [`fds`](Self::fds) tell of the next one.
    pub(crate) fn has_arrived(&self) -> Result<bool, LaneFailure> {
        let mut state = self.lock();
        self.queue.take_events();
        self.hear_events(&mut state);
        let _ = self.queue.arm();
        self.move_on(&mut state);
        match state.over() {
            _ if !state.arrived.is_empty() => Ok(true),
            Some(failure) => Err(failure),
            None => Ok(false),
        }
    }

    /// Gives a slot back, once its message was read.
    pub(crate) fn recycle(&self, slot: u16) -> Result<(), LaneFailure> {
        let mut state = self.lock();
        self.queue.post_receive(slot).map_err(|_| LaneFailure::BrokenOff)?;
        state.owed += 1;
        if state.failure.is_none() {
            self.send_due(&mut state);
        }
        Ok(())
    }

    // Ending.

    /// Ends both directions.
    pub(crate) fn close(&self) {
        let mut state = self.lock();
        self.say_farewell(&mut state);
        self.flag.set();
        self.changed.notify_all();
    }

    /// Lets whatever waits come out with an error, without a word to the peer.
    pub(crate) fn give_up(&self) {
        self.lock().fail(LaneFailure::Dropped);
    }

    /// Waits until everything that was sent is with the peer's device.
    fn linger(&self) {
        let mut state = self.lock();
        let deadline = Instant::now() + FAREWELL;
        while state.failure.is_none() && !state.ended && state.done < state.posted && Instant::now() < deadline {
            let _ = self.queue.arm();
            if !self.move_on(&mut state) {
                let _ = wait_readable(&[self.queue.fd(), self.queue.id().fd()], deadline - Instant::now());
                self.queue.take_events();
                self.hear_events(&mut state);
            }
        }
    }
}

/// For tests that break the rules.
#[cfg(test)]
impl Core {
    /// Sends a small message, whatever it is, and gives credits back that were never taken.
    pub(crate) fn send_raw(&self, kind: Kind, credits: u16) {
        let mut state = self.lock();
        state.owed = credits;
        assert!(self.send_small(&mut state, kind));
    }

    /// Takes a credit that the peer did not give.
    pub(crate) fn steal_credit(&self) {
        self.lock().credits = 1;
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        self.close();
        self.linger();
        self.queue.id().disconnect();
    }
}
