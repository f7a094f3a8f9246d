//! What travels on a queue pair: messages of one slot each, and the private data with which a connection is made.
//!
//! Every message starts with [`PREFIX`] bytes, little-endian: kind (1 byte), a zero, credits given back (2),
//! and a word (4) that means something for some kinds. A frame travels as fragments. All of it comes from the
//! peer and is checked here; what needs knowledge of the lane is checked where it is used.

use pageferry::memory::RegionId;

/// Bytes in front of every message.
pub(crate) const PREFIX: usize = 8;

/// Bytes of a slot, and so of the longest message: four pages, so that a batch is few messages and a ring of them small.
pub(crate) const SLOT: usize = 16 << 10;

/// Slots at the receiver that no credit stands for: up to two messages that give credits back, one answer, one end.
pub(crate) const RESERVED_SLOTS: u16 = 4;

/// Which version of all this is spoken.
pub(crate) const VERSION: u16 = 1;

const MAGIC: [u8; 4] = *b"PfRd";

/// A message that makes no sense.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// What a message is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Kind {
    /// A part of a frame.
    Fragment {
        /// Bytes of the frame from here on, this part included.
        left: u32,
    },
    /// Nothing but credits.
    Credits,
    /// No more will come, and nothing more is read.
    End,
    /// The source wants to write somewhere.
    Ask(Ask),
    /// The destination's answer.
    Answer(Answer),
}

/// Asks for a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Ask {
    /// A window that is needed no more and that no write is under way to, or 0.
    pub(crate) release: u32,
    /// Where: the window that holds this byte.
    pub(crate) region: RegionId,
    pub(crate) offset: u64,
}

/// What came of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Answer {
    Granted(Grant),
    Refused(Refusal),
}

/// A run of a region that may be written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Grant {
    /// Never 0.
    pub(crate) id: u32,
    pub(crate) key: u32,
    pub(crate) region: RegionId,
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Of its first byte, as the peer's device knows it.
    pub(crate) address: u64,
}

/// Why a window was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// Before it was exposed, or after it was concealed.
    #[error("its memory is not open to writes now")]
    Concealed,
    /// No such region or offset, or a region that does not travel.
    #[error("there is no memory of the guest at that place")]
    OutOfBounds,
    /// More windows than agreed on.
    #[error("all windows that this lane may have are open")]
    TooMany,
    /// The host's limit on locked memory.
    #[error("its limit on locked memory is reached; raise it there (ulimit -l), or give the receiver CAP_IPC_LOCK")]
    LockedMemory,
    /// Any other answer of the host.
    #[error("its host does not let the device reach that memory")]
    Host,
}

const REFUSALS: [Refusal; 5] =
    [Refusal::Concealed, Refusal::OutOfBounds, Refusal::TooMany, Refusal::LockedMemory, Refusal::Host];

const FRAGMENT: u8 = 1;
const CREDITS: u8 = 2;
const END: u8 = 3;
const ASK: u8 = 4;
const GRANTED: u8 = 5;
const REFUSED: u8 = 6;

const ASK_LEN: usize = 12;
const GRANTED_LEN: usize = 32;

/// The longest message that is not a fragment.
pub(crate) const SMALL: usize = PREFIX + GRANTED_LEN;

/// The first bytes of a message, and how many of them count.
pub(crate) fn encode(kind: Kind, credits: u16) -> ([u8; SMALL], usize) {
    let mut bytes = [0; SMALL];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let (code, word, payload) = match kind {
        Kind::Fragment { left } => (FRAGMENT, left, 0),
        Kind::Credits => (CREDITS, 0, 0),
        Kind::End => (END, 0, 0),
        Kind::Ask(Ask { release, region, offset }) => {
            put(PREFIX, &region.0.to_le_bytes());
            put(PREFIX + 4, &offset.to_le_bytes());
            (ASK, release, ASK_LEN)
        }
        Kind::Answer(Answer::Granted(grant)) => {
            put(PREFIX, &grant.key.to_le_bytes());
            put(PREFIX + 4, &grant.region.0.to_le_bytes());
            put(PREFIX + 8, &grant.start.to_le_bytes());
            put(PREFIX + 16, &grant.len.to_le_bytes());
            put(PREFIX + 24, &grant.address.to_le_bytes());
            (GRANTED, grant.id, GRANTED_LEN)
        }
        Kind::Answer(Answer::Refused(refusal)) => {
            let code = REFUSALS.iter().position(|&known| known == refusal).unwrap_or_default();
            (REFUSED, code as u32, 0)
        }
    };
    put(0, &[code, 0]);
    put(2, &credits.to_le_bytes());
    put(4, &word.to_le_bytes());
    (bytes, PREFIX + payload)
}

/// A message of `len` bytes by its first ones, and the credits it gives back. A fragment's own bytes follow at [`PREFIX`].
pub(crate) fn decode(bytes: &[u8; SMALL], len: usize) -> Result<(Kind, u16), Malformed> {
    let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let long = |at: usize| u64::from(field(at)) | u64::from(field(at + 4)) << 32;
    if !(PREFIX..=SLOT).contains(&len) || bytes[1] != 0 {
        return Err(Malformed("a message without a sound beginning"));
    }
    let (word, payload) = (field(4), len - PREFIX);
    let (kind, expected) = match bytes[0] {
        FRAGMENT if payload > 0 && payload as u64 <= u64::from(word) => (Kind::Fragment { left: word }, payload),
        CREDITS => (Kind::Credits, 0),
        END => (Kind::End, 0),
        ASK => (Kind::Ask(Ask { release: word, region: RegionId(field(8)), offset: long(12) }), ASK_LEN),
        GRANTED if word != 0 => {
            let (key, region) = (field(8), RegionId(field(12)));
            let (start, len, address) = (long(16), long(24), long(32));
            (Kind::Answer(Answer::Granted(Grant { id: word, key, region, start, len, address })), GRANTED_LEN)
        }
        REFUSED => {
            let refusal = REFUSALS.get(word as usize).copied().unwrap_or(Refusal::Host);
            (Kind::Answer(Answer::Refused(refusal)), 0)
        }
        _ => return Err(Malformed("a message of no known kind")),
    };
    if payload != expected {
        return Err(Malformed("a message of the wrong length"));
    }
    Ok((kind, u16::from_le_bytes([bytes[2], bytes[3]])))
}

/// What each side says of itself while the connection is made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Hello {
    /// Most of what travels, travels towards the acceptor.
    pub(crate) one_way: bool,
    /// Slots that stand ready for the peer's messages, without the reserved ones.
    pub(crate) credits: u16,
    /// Windows that the lane may have open at once; 0 if nothing can be written directly.
    pub(crate) windows: u16,
}

/// Why a caller is not let in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Rejection {
    /// The version that is spoken here is another.
    Version(u16),
    /// The limit on locked memory.
    LockedMemory,
    /// The host of the acceptor could not.
    Host,
}

/// Bytes of a hello; Linux lets a caller send 56.
pub(crate) const HELLO_LEN: usize = 12;

impl Hello {
    pub(crate) fn encode(self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&u16::from(self.one_way).to_le_bytes());
        bytes[8..10].copy_from_slice(&self.credits.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.windows.to_le_bytes());
        bytes
    }

    /// From private data, which arrives with zeros behind it. `Err` with the version of a peer that speaks another.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Option<u16>> {
        let (magic, version) = stamp(bytes).ok_or(None)?;
        let &[_, _, one_way, 0, c0, c1, w0, w1, ..] = &bytes[4..] else { return Err(None) };
        let (credits, windows) = (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([w0, w1]));
        match (magic == MAGIC, version == VERSION) {
            (true, true) if one_way <= 1 && credits > 0 => Ok(Self { one_way: one_way == 1, credits, windows }),
            (true, false) => Err(Some(version)),
            _ => Err(None),
        }
    }
}

impl Rejection {
    pub(crate) fn encode(self) -> [u8; HELLO_LEN] {
        let mut bytes = [0; HELLO_LEN];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6] = match self {
            Self::Version(_) => 1,
            Self::LockedMemory => 2,
            Self::Host => 3,
        };
        bytes
    }

    /// `None` if it was not our kind of acceptor that rejected.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (magic, version) = stamp(bytes)?;
        match bytes.get(6) {
            _ if magic != MAGIC => None,
            Some(1) => Some(Self::Version(version)),
            Some(2) => Some(Self::LockedMemory),
            Some(3) => Some(Self::Host),
            _ => None,
        }
    }
}

fn stamp(bytes: &[u8]) -> Option<([u8; 4], u16)> {
    let &[a, b, c, d, v0, v1, ..] = bytes else { return None };
    Some(([a, b, c, d], u16::from_le_bytes([v0, v1])))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kinds() -> Vec<(Kind, usize)> {
        let grant = Grant {
            id: 7,
            key: 0xDEAD_BEEF,
            region: RegionId(3),
            start: 1 << 40,
            len: 2 << 20,
            address: 0x7fff_1234_5000,
        };
        let mut kinds = vec![
            (Kind::Fragment { left: 100 }, PREFIX + 60),
            (Kind::Credits, PREFIX),
            (Kind::End, PREFIX),
            (Kind::Ask(Ask { release: 9, region: RegionId(2), offset: (5 << 32) + 4096 }), PREFIX + ASK_LEN),
            (Kind::Answer(Answer::Granted(grant)), SMALL),
        ];
        kinds.extend(REFUSALS.map(|refusal| (Kind::Answer(Answer::Refused(refusal)), PREFIX)));
        kinds
    }

    #[test]
    fn every_message_comes_back_as_it_was() {
        for (kind, len) in kinds() {
            let (bytes, own) = encode(kind, 513);
            assert!(own == len || matches!(kind, Kind::Fragment { .. }));
            assert_eq!(decode(&bytes, len), Ok((kind, 513)));
        }
    }

    #[test]
    fn lengths_that_do_not_fit_are_refused() {
        for (kind, len) in kinds() {
            let (bytes, _) = encode(kind, 0);
            for wrong in [0, PREFIX - 1, len + 1, SLOT + 1, usize::MAX] {
                let accepted = decode(&bytes, wrong).is_ok();
                let fragment = matches!(kind, Kind::Fragment { .. }) && wrong == len + 1;
                assert_eq!(accepted, fragment, "{kind:?} with {wrong} bytes");
            }
        }
        let (fragment, _) = encode(Kind::Fragment { left: 10 }, 0);
        assert!(decode(&fragment, PREFIX).is_err(), "an empty part");
        assert!(decode(&fragment, PREFIX + 11).is_err(), "a part longer than its frame");
    }

    #[test]
    fn bytes_at_random_never_panic() {
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let mut sound = 0;
        for _ in 0..100_000 {
            let mut bytes = [0; SMALL];
            bytes.fill_with(|| next() as u8);
            (bytes[0], bytes[1]) = ((next() % 8) as u8, 0);
            sound += usize::from(decode(&bytes, next() as usize % 60).is_ok());
            let _ = (Hello::decode(&bytes[..next() as usize % SMALL]), Rejection::decode(&bytes));
        }
        assert!(sound > 0);
    }

    #[test]
    fn hellos_of_strangers_and_of_other_versions_are_told_apart() {
        let hello = Hello { one_way: true, credits: 20, windows: 3 };
        let mut padded = [hello.encode().as_slice(), &[0; 100]].concat();
        assert_eq!(Hello::decode(&padded), Ok(hello));
        assert_eq!(Hello::decode(b"GET / HTTP/1.1"), Err(None));
        assert_eq!(Hello::decode(&[]), Err(None));
        padded[4] = 9;
        assert_eq!(Hello::decode(&padded), Err(Some(9)));
        for rejection in [Rejection::Version(VERSION), Rejection::LockedMemory, Rejection::Host] {
            assert_eq!(Rejection::decode(&rejection.encode()), Some(rejection));
        }
        assert_eq!(Rejection::decode(&[0; 148]), None);
    }
}
