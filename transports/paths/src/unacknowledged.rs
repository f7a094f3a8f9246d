//! What a lane has sent and the peer has not acknowledged: kept, so that it can be sent again.

use std::collections::VecDeque;
use std::io::IoSlice;

use crate::PathFailure;

/// Frames in order, by number.
#[derive(Debug, Default)]
pub(crate) struct Unacknowledged {
    frames: VecDeque<Vec<u8>>,
    /// The number of the first of them: so many were acknowledged.
    first: u64,
    bytes: usize,
    /// Buffers to use again.
    spare: Vec<Vec<u8>>,
}

/// Buffers that are kept for reuse.
pub(crate) const SPARE: usize = 8;

impl Unacknowledged {
    /// The number of the frame that comes next.
    pub(crate) fn end(&self) -> u64 {
        self.first + self.frames.len() as u64
    }

    /// So many frames were acknowledged.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.first
    }

    /// Whether all was acknowledged.
    pub(crate) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Bytes kept.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps a frame; returns its number.
    pub(crate) fn push(&mut self, parts: &[IoSlice<'_>]) -> u64 {
        let mut frame = self.spare.pop().unwrap_or_default();
        frame.clear();
        for part in parts {
            frame.extend_from_slice(part);
        }
        self.bytes += frame.len();
        self.frames.push_back(frame);
        self.end() - 1
    }

    /// The peer has received so many frames.
    pub(crate) fn acknowledge(&mut self, received: u64) -> Result<(), PathFailure> {
        if received < self.first || received > self.end() {
            return Err(PathFailure::Misbehaved("it acknowledges what was not sent"));
        }
        for frame in self.frames.drain(..(received - self.first) as usize) {
            self.bytes -= frame.len();
            if self.spare.len() < SPARE {
                self.spare.push(frame);
            }
        }
        self.first = received;
        Ok(())
    }

    /// The frame of this number, copied, if it was not acknowledged.
    pub(crate) fn copy(&self, number: u64, into: &mut Vec<u8>) -> bool {
        let frame = number.checked_sub(self.first).and_then(|at| self.frames.get(at as usize));
        into.clear();
        into.extend_from_slice(frame.map_or(&[], |frame| frame));
        frame.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_stay_until_they_are_acknowledged() {
        let mut sent = Unacknowledged::default();
        for number in 0..10u64 {
            assert_eq!(sent.push(&[IoSlice::new(&[number as u8; 3]), IoSlice::new(&[9])]), number);
        }
        assert_eq!(sent.bytes(), 40);
        sent.acknowledge(4).unwrap();
        sent.acknowledge(4).unwrap();
        assert_eq!(sent.bytes(), 24);
        let mut frame = Vec::new();
        assert!(!sent.copy(3, &mut frame) && sent.copy(4, &mut frame) && frame == [4, 4, 4, 9]);
        assert!(sent.copy(9, &mut frame) && !sent.copy(10, &mut frame));
        assert!(sent.acknowledge(3).is_err() && sent.acknowledge(11).is_err());
        sent.acknowledge(10).unwrap();
        assert_eq!((sent.bytes(), sent.push(&[])), (0, 10));
    }
}
