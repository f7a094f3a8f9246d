//! What both ends tell each other about a lane, in frames of the kind that the engine leaves to transports.
//!
//! | first byte | message | then |
//! |---|---|---|
//! | 0 | this connection begins a lane, or is to: nothing was heard of an earlier one | its name, 16 bytes; number of the connection, u32 |
//! | 1 | this connection goes on with a lane | its name; number of the connection, u32; frames received, u64 |
//! | 2 | the answer to both | frames received, u64 |
//! | 3 | frames received so far | u64 |
//! | 4 | the lane has ended | nothing |
//! | 5 | there is no such lane (any more) | nothing |
//!
//! Each connection of a lane has a higher number than those before. One with a number that is not the highest so far was given up by
//! whoever dialled it, and came late: it is closed.

use pageferry::wire::{FrameBuffer, HEADER_LEN, Header, Kind};

use crate::PathFailure;

/// The random name of a lane: whoever knows it may go on with it. It is as secret as the path that it is said on.
pub(crate) type LaneId = [u8; 16];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum PathMessage {
    Begin { lane: LaneId, attempt: u32 },
    GoOn { lane: LaneId, attempt: u32, received: u64 },
    GoesOn { received: u64 },
    Received(u64),
    End,
    Gone,
}

impl PathMessage {
    /// The frame that carries it.
    pub(crate) fn encode(self) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        match self {
            Self::Begin { lane, attempt } => {
                frame.push(0);
                frame.extend(lane);
                frame.extend(attempt.to_le_bytes());
            }
            Self::GoOn { lane, attempt, received } => {
                frame.push(1);
                frame.extend(lane);
                frame.extend(attempt.to_le_bytes());
                frame.extend(received.to_le_bytes());
            }
            Self::GoesOn { received } => {
                frame.push(2);
                frame.extend(received.to_le_bytes());
            }
            Self::Received(received) => {
                frame.push(3);
                frame.extend(received.to_le_bytes());
            }
            Self::End => frame.push(4),
            Self::Gone => frame.push(5),
        }
        let body_len = (frame.len() - HEADER_LEN) as u32;
        let mut header = Header { kind: Kind::Transport, body_len, step: 0, sequence: 0, checksum: 0 };
        header.checksum = header.checksum_of(&frame[HEADER_LEN..]);
        frame[..HEADER_LEN].copy_from_slice(&header.encode());
        frame
    }

    /// The message in a frame; `None` if it is the engine's.
    pub(crate) fn decode(frame: &FrameBuffer) -> Result<Option<Self>, PathFailure> {
        let header = frame.header().map_err(|_| PathFailure::Misbehaved("it sent a damaged frame"))?;
        if header.kind != Kind::Transport {
            return Ok(None);
        }
        if header.checksum != header.checksum_of(frame.body()) {
            return Err(PathFailure::Misbehaved("it sent a damaged message"));
        }
        let unknown = PathFailure::Misbehaved("it sent a message that means nothing");
        let (&code, rest) = frame.body().split_first().ok_or(unknown.clone())?;
        let number = |bytes: &[u8]| bytes.try_into().map(u64::from_le_bytes).map_err(|_| unknown.clone());
        let names = || {
            let (lane, rest) = rest.split_first_chunk::<16>()?;
            let (attempt, rest) = rest.split_first_chunk::<4>()?;
            Some((*lane, u32::from_le_bytes(*attempt), rest))
        };
        Ok(Some(match (code, names()) {
            (0, Some((lane, attempt, []))) => Self::Begin { lane, attempt },
            (1, Some((lane, attempt, received))) => Self::GoOn { lane, attempt, received: number(received)? },
            (2, _) => Self::GoesOn { received: number(rest)? },
            (3, _) => Self::Received(number(rest)?),
            (4, _) if rest.is_empty() => Self::End,
            (5, _) if rest.is_empty() => Self::Gone,
            _ => return Err(unknown),
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(bytes: &[u8]) -> FrameBuffer {
        let mut frame = FrameBuffer::new();
        frame.fill(bytes).unwrap();
        frame
    }

    #[test]
    fn messages_are_read_as_they_were_written_and_nothing_else_is() {
        let messages = [
            PathMessage::Begin { lane: [7; 16], attempt: 3 },
            PathMessage::GoOn { lane: [1; 16], attempt: 1 << 20, received: 1 << 40 },
            PathMessage::GoesOn { received: 5 },
            PathMessage::Received(u64::MAX),
            PathMessage::End,
            PathMessage::Gone,
        ];
        for message in messages {
            let bytes = message.encode();
            assert_eq!(PathMessage::decode(&frame(&bytes)).unwrap(), Some(message));
            let mut damaged = bytes.clone();
            *damaged.last_mut().unwrap() ^= 1;
            assert!(PathMessage::decode(&frame(&damaged)).is_err());
            for body in [&bytes[HEADER_LEN..bytes.len() - 1], &[&bytes[HEADER_LEN..], &[0]].concat()] {
                let mut header =
                    Header { kind: Kind::Transport, body_len: body.len() as u32, step: 0, sequence: 0, checksum: 0 };
                header.checksum = header.checksum_of(body);
                let whole = [&header.encode(), body].concat();
                assert!(PathMessage::decode(&frame(&whole)).is_err(), "{body:?}");
            }
        }
    }

    #[test]
    fn the_engines_frames_are_left_alone() {
        let header = Header { kind: Kind::State, body_len: 0, step: 0, sequence: 0, checksum: 0 };
        assert_eq!(PathMessage::decode(&frame(&header.encode())).unwrap(), None);
    }
}
