//! The frame: a header of 32 bytes, then the body.

use std::io;

use xxhash_rust::xxh3::Xxh3;

use super::WireError;
use super::fields::Reader;
use crate::limits::MAX_FRAME_BODY;

/// Bytes of a frame's header.
pub const HEADER_LEN: usize = 32;

/// "PGFY": the first bytes of every frame.
const MAGIC: u32 = u32::from_le_bytes(*b"PGFY");

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[non_exhaustive]
pub enum Kind {
    /// First frame of every lane: who is there. Its layout never changes between versions.
    Greeting = 1,
    /// Answer to a control greeting: the version to speak.
    Welcome = 2,
    /// Answer to a greeting or an offer: no.
    Refuse = 3,
    /// The guest: layout, configuration, digest key.
    Offer = 4,
    /// Room has been made for the guest.
    Accept = 5,
    /// A batch of pages.
    Pages = 6,
    /// A lane has sent all it has of a step.
    StepEnd = 7,
    /// The destination has placed a whole round.
    RoundAck = 8,
    /// A piece of the machine state.
    State = 9,
    /// Everything has been sent; here is the source's digest.
    Finish = 10,
    /// The destination holds everything and could run.
    Prepared = 11,
    /// The guest is the destination's from here on.
    Commit = 12,
    /// The destination runs the guest.
    Running = 13,
    /// The source knows it.
    Done = 14,
    /// The sender gives up; the guest is the source's.
    Abort = 15,
    /// The sender is alive.
    Heartbeat = 16,
    /// Whose the guest is: the answer to a greeting that asks.
    Settled = 17,
    /// What a transport's two ends say to each other: no transport hands it to the engine.
    Transport = 18,
}

impl Kind {
    pub(super) const ALL: [Self; 18] = [
        Self::Greeting,
        Self::Welcome,
        Self::Refuse,
        Self::Offer,
        Self::Accept,
        Self::Pages,
        Self::StepEnd,
        Self::RoundAck,
        Self::State,
        Self::Finish,
        Self::Prepared,
        Self::Commit,
        Self::Running,
        Self::Done,
        Self::Abort,
        Self::Heartbeat,
        Self::Settled,
        Self::Transport,
    ];

    fn from_byte(byte: u8) -> Result<Self, WireError> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte).ok_or(WireError::Kind(byte))
    }
}

/// A frame's header.
///
/// | bytes | field |
/// |---|---|
/// | 0..4 | magic `PGFY` |
/// | 4 | kind |
/// | 5..8 | header check: 24 bits of xxh3-64 of bytes 0..5 and 8..24, so that no damaged length or step is believed |
/// | 8..12 | bytes of body |
/// | 12..16 | step in `Pages` and `StepEnd` (two steps a round), round in `RoundAck`, 0 elsewhere |
/// | 16..24 | number of the frame on its lane and direction, from 0 |
/// | 24..32 | checksum: xxh3-64 of bytes 0..24 and the body (in `Pages`, of the head and the hashes of what the pages become, instead of the payload) |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the body is.
    pub kind: Kind,
    /// Bytes of body.
    pub body_len: u32,
    /// The step it belongs to, or the round.
    pub step: u32,
    /// Its number on the lane.
    pub sequence: u64,
    /// The checksum.
    pub checksum: u64,
}

impl Header {
    /// The header as bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[8..12].copy_from_slice(&self.body_len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.step.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.checksum.to_le_bytes());
        let check = header_check(&bytes);
        bytes[5..8].copy_from_slice(&check);
        bytes
    }

    /// Reads a header; checks magic, kind, header check and the body's length limit.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32("header")?;
        if magic != MAGIC {
            return Err(WireError::Magic { found: magic });
        }
        let kind = Kind::from_byte(reader.u8("header")?)?;
        let check = reader.array::<3>("header")?;
        if bytes.first_chunk().map(header_check) != Some(check) {
            return Err(WireError::Header);
        }
        let body_len = reader.u32("header")?;
        if body_len as usize > MAX_FRAME_BODY {
            let (len, limit) = (body_len.into(), MAX_FRAME_BODY as u64);
            return Err(WireError::TooLong { what: "frame body", len, limit });
        }
        Ok(Self {
            kind,
            body_len,
            step: reader.u32("header")?,
            sequence: reader.u64("header")?,
            checksum: reader.u64("header")?,
        })
    }

    /// The checksum of a frame of this header and body, unless it is of kind `Pages`.
    pub fn checksum_of(&self, body: &[u8]) -> u64 {
        self.checksum_with(body, |_| ())
    }

    /// The checksum of this header and a checked part of the body, plus what the caller adds to `rest`.
    pub(crate) fn checksum_with(&self, checked: &[u8], rest: impl FnOnce(&mut Xxh3)) -> u64 {
        let mut hasher = Xxh3::new();
        hasher.update(&self.encode()[..24]);
        hasher.update(checked);
        rest(&mut hasher);
        hasher.digest()
    }

    /// Compares the announced checksum with the one computed.
    pub(crate) fn verify(&self, computed: u64) -> Result<(), WireError> {
        if computed == self.checksum {
            return Ok(());
        }
        Err(WireError::Checksum { kind: self.kind, sequence: self.sequence, announced: self.checksum, computed })
    }
}

fn header_check(bytes: &[u8; HEADER_LEN]) -> [u8; 3] {
    let mut checked = [0; 21];
    checked[..5].copy_from_slice(&bytes[..5]);
    checked[5..].copy_from_slice(&bytes[8..24]);
    let [a, b, c, ..] = xxhash_rust::xxh3::xxh3_64(&checked).to_le_bytes();
    [a, b, c]
}

/// A reusable buffer that holds one received frame. Never grows past the largest frame.
#[derive(Debug)]
pub struct FrameBuffer {
    bytes: Vec<u8>,
    len: usize,
    limit: usize,
}

impl Default for FrameBuffer {
    fn default() -> Self {
        Self::with_limit(HEADER_LEN + MAX_FRAME_BODY)
    }
}

impl FrameBuffer {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// A buffer that takes no frame longer than `limit` bytes, header included.
    pub fn with_limit(limit: usize) -> Self {
        Self { bytes: Vec::new(), len: 0, limit }
    }

    /// Empties the buffer and gives out its first `len` bytes to be filled.
    pub fn prepare(&mut self, len: usize) -> io::Result<&mut [u8]> {
        self.len = 0;
        self.extend(len)
    }

    /// Gives out the next `len` bytes to be filled.
    pub fn extend(&mut self, len: usize) -> io::Result<&mut [u8]> {
        let end = self.len + len;
        if end > self.limit {
            let (len, limit) = (end as u64, self.limit as u64);
            return Err(WireError::TooLong { what: "frame", len, limit }.into());
        }
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        let start = std::mem::replace(&mut self.len, end);
        Ok(&mut self.bytes[start..end])
    }

    /// The length of the body that the header announces, once the header has been filled in.
    pub fn announced_body(&self) -> io::Result<usize> {
        Ok(Header::decode(self.bytes())?.body_len as usize)
    }

    /// Takes over a whole frame, for transports that receive messages.
    pub fn fill(&mut self, frame: &[u8]) -> io::Result<()> {
        self.prepare(frame.len())?.copy_from_slice(frame);
        let announced = self.announced_body()?;
        if frame.len() != HEADER_LEN + announced {
            return Err(WireError::Truncated("frame").into());
        }
        Ok(())
    }

    /// The whole frame.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// The header.
    pub fn header(&self) -> Result<Header, WireError> {
        Header::decode(self.bytes())
    }

    /// What follows the header.
    pub fn body(&self) -> &[u8] {
        self.bytes().get(HEADER_LEN..).unwrap_or_default()
    }
}
