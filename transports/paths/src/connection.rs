//! One connection on one path, and the sending end of the present one.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, bounded};
use pageferry::transport::{LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::FrameBuffer;

use crate::message::PathMessage;
use crate::{PathFailure, PathOptions};

/// A connection: a lane of one path's transport.
pub(crate) struct Connection {
    pub(crate) sender: Box<dyn LaneSender>,
    pub(crate) receiver: Box<dyn LaneReceiver>,
    pub(crate) closer: Arc<dyn LaneCloser>,
}

impl From<LaneHalves> for Connection {
    fn from(LaneHalves { sender, receiver, closer }: LaneHalves) -> Self {
        Self { sender, receiver, closer }
    }
}

impl Connection {
    pub(crate) fn tell(&mut self, message: PathMessage) -> io::Result<()> {
        self.sender.send(&mut [IoSlice::new(&message.encode())])
    }

    /// The next message, which must come in time; no frame of the engine is due.
    pub(crate) fn hear(&mut self, within: Duration, options: &PathOptions) -> io::Result<PathMessage> {
        let (done, waiting) = bounded::<()>(0);
        let closer = Arc::clone(&self.closer);
        options.spawn("patience", move || {
            if waiting.recv_timeout(within) == Err(RecvTimeoutError::Timeout) {
                closer.close();
            }
        })?;
        let mut frame = FrameBuffer::with_limit(MAX_MESSAGE);
        self.receiver.receive(&mut frame)?;
        drop(done);
        let message = PathMessage::decode(&frame)?;
        Ok(message.ok_or(PathFailure::Misbehaved("it did not say which lane it means"))?)
    }
}

/// Bytes of a message's frame.
pub(crate) const MAX_MESSAGE: usize = 128;

/// The sending end of the present connection, and how far it is.
#[derive(Default)]
pub(crate) struct Wire {
    sender: Option<Box<dyn LaneSender>>,
    closer: Option<Arc<dyn LaneCloser>>,
    /// The number of the frame that it takes next.
    next: u64,
    /// A thread sends what came before.
    behind: bool,
}

impl Wire {
    pub(crate) fn begin(&mut self, sender: Box<dyn LaneSender>, closer: Arc<dyn LaneCloser>, next: u64) {
        *self = Self { sender: Some(sender), closer: Some(closer), next, behind: true };
    }

    /// Nothing more can be sent on this connection; whoever receives on it notices.
    pub(crate) fn fail(&mut self) {
        self.sender = None;
        self.behind = false;
        if let Some(closer) = self.closer.take() {
            closer.close();
        }
    }

    pub(crate) fn is_behind(&self, end: u64) -> bool {
        self.next < end
    }

    pub(crate) fn caught_up(&mut self) {
        self.behind = false;
    }

    pub(crate) fn next_to_resend(&self) -> Option<u64> {
        (self.behind && self.sender.is_some()).then_some(self.next)
    }

    /// Whether it is this frame's turn, and nobody else's task.
    pub(crate) fn is_next(&self, number: u64) -> bool {
        self.sender.is_some() && !self.behind && self.next == number
    }

    /// Sends the next frame.
    pub(crate) fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let sender = self.sender.as_mut().ok_or(io::ErrorKind::NotConnected)?;
        sender.send(frame)?;
        self.next += 1;
        Ok(())
    }

    /// Sends a message between frames; `false` if there is no connection that takes it.
    pub(crate) fn tell(&mut self, message: PathMessage) -> bool {
        let frame = message.encode();
        self.sender.as_mut().is_some_and(|sender| sender.send(&mut [IoSlice::new(&frame)]).is_ok())
    }
}
