//! What the bytes on a lane mean: frames ([`Header`]), the session's messages ([`Message`]) and page
//! batches ([`pages`]). `PROTOCOL.md` beside the crate is the specification. Nothing that is parsed
//! here is trusted: every length is bounded, every number checked, nothing panics (R17).

mod fields;
mod frame;
mod message;
pub mod pages;

pub use frame::{FrameBuffer, HEADER_LEN, Header, Kind};
pub use message::{Finish, Greeting, GreetingRole, Message, Offer, Owner, Prepared, Refusal, SessionId};

/// The lowest protocol version this build speaks.
pub const PROTOCOL_MIN: u16 = 5;

/// The highest protocol version this build speaks.
pub const PROTOCOL_MAX: u16 = 5;

/// Bytes that are no valid frame or message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Not a Pageferry frame at all.
    #[error("not a pageferry frame (it starts with {found:#010x}); is something else on this port?")]
    Magic {
        /// The first four bytes.
        found: u32,
    },
    /// A kind of frame this version does not know.
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    /// A header that was damaged on the way.
    #[error("a frame's header was damaged on the way")]
    Header,
    /// A frame or field that is longer than its limit.
    #[error("{what} of {len} bytes is over the limit of {limit}")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// Its announced length.
        len: u64,
        /// The limit.
        limit: u64,
    },
    /// A message that ends before its last field.
    #[error("the message ends within {0}")]
    Truncated(&'static str),
    /// A message with bytes after its last field.
    #[error("{0} bytes follow the end of the message")]
    Trailing(usize),
    /// A field whose value means nothing.
    #[error("{what} has the impossible value {value}")]
    Value {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The frame was damaged on the way.
    #[error("checksum of {kind:?} frame {sequence} is wrong: announced {announced:016x}, computed {computed:016x}")]
    Checksum {
        /// Kind of frame.
        kind: Kind,
        /// Its number on the lane.
        sequence: u64,
        /// The checksum in its header.
        announced: u64,
        /// The checksum of what arrived.
        computed: u64,
    },
    /// A frame is missing, or came twice.
    #[error("frame {found} arrived where frame {expected} was due")]
    Sequence {
        /// The number that was due.
        expected: u64,
        /// The number in the header.
        found: u64,
    },
    /// Pages that are said to be written where nobody may write.
    #[error("it names pages as written straight into memory, which this transport cannot do")]
    NotExposed,
    /// A payload that cannot be unpacked.
    #[error("the batch's payload cannot be unpacked: {0}")]
    Payload(String),
    /// A delta that is none.
    #[error("the delta of {page} is not valid: {source}")]
    Delta {
        /// Which page.
        page: crate::units::PageNumber,
        /// What is wrong with it.
        source: crate::delta::DeltaError,
    },
    /// A record of pages outside every region.
    #[error("{count} pages from {first:#x} lie outside the guest's memory")]
    Pages {
        /// First page number.
        first: u64,
        /// How many.
        count: u64,
    },
}

impl From<WireError> for std::io::Error {
    fn from(error: WireError) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

/// The wire error inside an I/O error, or the I/O error back.
pub(crate) fn wire_error_of(error: std::io::Error) -> Result<WireError, std::io::Error> {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<WireError>()) {
        Some(wire) => Ok(wire.clone()),
        None => Err(error),
    }
}
