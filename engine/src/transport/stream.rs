//! Frames over any byte stream.

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;

use super::{Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use crate::wire::{FrameBuffer, HEADER_LEN};

/// A lane over a byte stream: a reading half, a writing half, and what ends them.
pub struct StreamLane<R, W> {
    peer: String,
    reader: R,
    writer: W,
    closer: Arc<dyn LaneCloser>,
}

impl<R, W> std::fmt::Debug for StreamLane<R, W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StreamLane").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<R: Read + Send + 'static, W: Write + Send + 'static> StreamLane<R, W> {
    /// A lane over two halves of a stream. `closer` must make blocked reads and writes return.
    pub fn new(peer: impl Into<String>, reader: R, writer: W, closer: Arc<dyn LaneCloser>) -> Self {
        let peer = peer.into();
        Self { peer, reader, writer, closer }
    }
}

impl<R: Read + Send + 'static, W: Write + Send + 'static> Lane for StreamLane<R, W> {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        Ok(LaneHalves {
            sender: Box::new(StreamSender(self.writer)),
            receiver: Box::new(StreamReceiver(self.reader)),
            closer: self.closer,
        })
    }
}

struct StreamSender<W>(W);

impl<W: Write + Send> LaneSender for StreamSender<W> {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let mut left = frame;
        while left.iter().any(|part| !part.is_empty()) {
            match self.0.write_vectored(left) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => IoSlice::advance_slices(&mut left, written),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.0.flush()
    }
}

struct StreamReceiver<R>(R);

impl<R: Read + Send> LaneReceiver for StreamReceiver<R> {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        self.0.read_exact(frame.prepare(HEADER_LEN)?)?;
        let body = frame.announced_body()?;
        self.0.read_exact(frame.extend(body)?)
    }
}
