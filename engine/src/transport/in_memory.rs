//! Lanes within one process: for examples, tests and measurements without a network.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use super::{Acceptor, Dialer, Lane, LaneCloser, LaneHalves, LaneReceiver, LaneRole, LaneSender, TransportError};
use crate::wire::FrameBuffer;

/// Frames that wait in a lane before the sender blocks.
const DEPTH: usize = 4;

/// How often a waiting half looks whether the lane was closed.
const CLOSE_POLL: Duration = Duration::from_millis(5);

/// A dialer and an acceptor that are joined within this process.
pub fn in_memory() -> (InMemoryDialer, InMemoryAcceptor) {
    let (sender, receiver) = bounded(usize::from(crate::limits::MAX_LANES) + 1);
    (InMemoryDialer(sender), InMemoryAcceptor(receiver))
}

/// The dialling end of [`in_memory`].
#[derive(Debug, Clone)]
pub struct InMemoryDialer(Sender<InMemoryLane>);

/// The accepting end of [`in_memory`].
#[derive(Debug, Clone)]
pub struct InMemoryAcceptor(Receiver<InMemoryLane>);

impl Dialer for InMemoryDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let (there, back) = (bounded(DEPTH), bounded(DEPTH));
        let closed = Arc::new(AtomicBool::new(false));
        let lane = |sender, receiver| InMemoryLane { sender, receiver, closed: Arc::clone(&closed) };
        let ours = lane(there.0, back.1);
        let theirs = lane(back.0, there.1);
        self.0.send_timeout(theirs, timeout).map_err(|_| TransportError::Dial {
            peer: format!("the acceptor in this process ({role})"),
            source: io::ErrorKind::ConnectionRefused.into(),
        })?;
        Ok(Box::new(ours))
    }
}

impl Acceptor for InMemoryAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        match self.0.recv_timeout(timeout) {
            Ok(lane) => Ok(Some(Box::new(lane))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(TransportError::Accept {
                local: "this process".to_owned(),
                source: io::ErrorKind::NotConnected.into(),
            }),
        }
    }
}

#[derive(Debug)]
struct InMemoryLane {
    sender: Sender<Vec<u8>>,
    receiver: Receiver<Vec<u8>>,
    closed: Arc<AtomicBool>,
}

impl Lane for InMemoryLane {
    fn peer(&self) -> String {
        "this process".to_owned()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let closed = self.closed;
        Ok(LaneHalves {
            sender: Box::new(SendHalf(self.sender, Arc::clone(&closed))),
            receiver: Box::new(ReceiveHalf(self.receiver, Arc::clone(&closed))),
            closer: Arc::new(CloseFlag(closed)),
        })
    }
}

struct SendHalf(Sender<Vec<u8>>, Arc<AtomicBool>);

impl LaneSender for SendHalf {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut message: Vec<u8> = frame.iter().flat_map(|part| part.iter().copied()).collect();
        loop {
            if self.1.load(Ordering::Acquire) {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            match self.0.send_timeout(message, CLOSE_POLL) {
                Ok(()) => return Ok(()),
                Err(crossbeam_channel::SendTimeoutError::Timeout(back)) => message = back,
                Err(crossbeam_channel::SendTimeoutError::Disconnected(_)) => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
            }
        }
    }
}

struct ReceiveHalf(Receiver<Vec<u8>>, Arc<AtomicBool>);

impl LaneReceiver for ReceiveHalf {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        loop {
            // Looked at first: what was sent before the lane was closed is there then.
            let closed = self.1.load(Ordering::Acquire);
            match self.0.recv_timeout(CLOSE_POLL) {
                Ok(message) => return frame.fill(&message),
                Err(RecvTimeoutError::Timeout) if !closed => {}
                Err(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            }
        }
    }
}

struct CloseFlag(Arc<AtomicBool>);

impl LaneCloser for CloseFlag {
    fn close(&self) {
        self.0.store(true, Ordering::Release);
    }
}
