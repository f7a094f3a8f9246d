//! The messages of the session.

use super::fields::{Reader, Writer};
use super::frame::{HEADER_LEN, Header, Kind};
use super::{FrameBuffer, WireError};
use crate::config::Verify;
use crate::digest::{Digest, DigestKey};
use crate::limits::{MAX_CONFIG, MAX_LANES, MAX_REGION_NAME, MAX_REGIONS, MAX_STATE, MAX_TEXT, STATE_CHUNK};
use crate::memory::{Layout, Region, Transfer};

/// The random name of a migration; whoever knows it may open lanes for it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SessionId(pub [u8; 16]);

impl std::fmt::Debug for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SessionId({:02x}{:02x}..)", self.0[0], self.0[1])
    }
}

/// What a lane is opened for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GreetingRole {
    /// The control lane of a new migration.
    Control,
    /// A data lane of a migration that was accepted.
    Data(u16),
    /// A question about a migration whose link broke around Commit.
    Settle,
}

/// The first frame of every lane, sent by the source.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Greeting {
    /// Lowest protocol version the source speaks.
    pub version_min: u16,
    /// Highest protocol version the source speaks.
    pub version_max: u16,
    /// The migration.
    pub session: SessionId,
    /// What the lane is for.
    pub role: GreetingRole,
}

/// The guest on offer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// Key of all page hashes of this migration.
    pub digest_key: DigestKey,
    /// Data lanes the source will open; 0 when pages travel on the control lane.
    pub data_lanes: u16,
    /// Proof wanted before the hand-over.
    pub verify: Verify,
    /// Whether the guest is to run after the hand-over.
    pub run: bool,
    /// Its memory.
    pub layout: Layout,
    /// The VMM's own description.
    pub config: Vec<u8>,
}

/// Why a destination says no.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// No common protocol version.
    Version {
        /// Lowest version the destination speaks.
        min: u16,
        /// Highest version the destination speaks.
        max: u16,
    },
    /// Another migration is under way.
    Busy,
    /// The VMM cannot take this guest.
    Guest(String),
}

/// End of what the source sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Finish {
    /// The last round.
    pub last_round: u32,
    /// Digest of all memory as sent.
    pub digest: Digest,
    /// Bytes of machine state.
    pub state_len: u64,
}

/// The destination's readiness, with the time each part of it took in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Prepared {
    /// Digest of all memory as placed.
    pub digest: Digest,
    /// Digest of all memory as re-read, when a full verification was asked for.
    pub full_digest: Option<Digest>,
    /// Full re-hash.
    pub verify_us: u64,
    /// Loading the machine state.
    pub load_us: u64,
}

/// Who owns a guest, as the destination knows it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Owner {
    /// The source: the destination has given it up for good.
    Source,
    /// The destination: it received Commit.
    Destination,
}

/// Everything that travels on the control lane, and the greeting of the others.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Message {
    /// See [`Greeting`].
    Greeting(Greeting),
    /// The version to speak from here on.
    Welcome {
        /// Chosen by the destination: the highest that both speak.
        version: u16,
    },
    /// See [`Refusal`].
    Refuse(Refusal),
    /// See [`Offer`].
    Offer(Box<Offer>),
    /// Room has been made.
    Accept {
        /// The source may write pages straight into it, if its transport can.
        exposed: bool,
    },
    /// A lane has sent all it has of a step.
    StepEnd {
        /// The step: two per round.
        step: u32,
    },
    /// The destination has placed a whole round.
    RoundAck {
        /// The round.
        round: u32,
    },
    /// A piece of the machine state.
    State(Vec<u8>),
    /// See [`Finish`].
    Finish(Finish),
    /// See [`Prepared`].
    Prepared(Prepared),
    /// The guest is the destination's.
    Commit,
    /// The guest runs.
    Running {
        /// Microseconds the VMM took to start it.
        resume_us: u64,
    },
    /// The source knows that it runs.
    Done,
    /// The sender gives up.
    Abort {
        /// Why, for the operator.
        reason: String,
    },
    /// The sender is alive.
    Heartbeat {
        /// Bytes received from data lanes so far: shows a destination that has stopped taking them.
        received: u64,
    },
    /// See [`Owner`].
    Settled(Owner),
}

impl Message {
    /// The frame that carries this message.
    pub fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut frame = vec![0; HEADER_LEN];
        let mut step = 0;
        let kind = self.encode_body(&mut Writer(&mut frame), &mut step);
        let mut header = Header { kind, body_len: (frame.len() - HEADER_LEN) as u32, step, sequence, checksum: 0 };
        header.checksum = header.checksum_of(&frame[HEADER_LEN..]);
        frame[..HEADER_LEN].copy_from_slice(&header.encode());
        frame
    }

    fn encode_body(&self, out: &mut Writer<'_>, header_step: &mut u32) -> Kind {
        match self {
            Self::Greeting(greeting) => {
                greeting.encode(out);
                Kind::Greeting
            }
            Self::Welcome { version } => {
                out.u16(*version);
                Kind::Welcome
            }
            Self::Refuse(refusal) => {
                refusal.encode(out);
                Kind::Refuse
            }
            Self::Offer(offer) => {
                offer.encode(out);
                Kind::Offer
            }
            Self::Accept { exposed } => {
                out.u8(u8::from(*exposed));
                Kind::Accept
            }
            Self::StepEnd { step } => {
                *header_step = *step;
                Kind::StepEnd
            }
            Self::RoundAck { round } => {
                *header_step = *round;
                Kind::RoundAck
            }
            Self::State(bytes) => {
                out.bytes(bytes);
                Kind::State
            }
            Self::Finish(finish) => {
                out.u32(finish.last_round);
                out.u128(finish.digest.0);
                out.u64(finish.state_len);
                Kind::Finish
            }
            Self::Prepared(prepared) => {
                prepared.encode(out);
                Kind::Prepared
            }
            Self::Commit => Kind::Commit,
            Self::Running { resume_us } => {
                out.u64(*resume_us);
                Kind::Running
            }
            Self::Done => Kind::Done,
            Self::Abort { reason } => {
                out.text(reason, MAX_TEXT);
                Kind::Abort
            }
            Self::Heartbeat { received } => {
                out.u64(*received);
                Kind::Heartbeat
            }
            Self::Settled(owner) => {
                out.u8(match owner {
                    Owner::Source => 0,
                    Owner::Destination => 1,
                });
                Kind::Settled
            }
        }
    }

    /// Reads the message in a frame and checks its checksum. [`Kind::Pages`] is no message.
    pub fn decode(frame: &FrameBuffer) -> Result<Self, WireError> {
        let header = frame.header()?;
        header.verify(header.checksum_of(frame.body()))?;
        let mut body = Reader::new(frame.body());
        let message = Self::decode_body(&header, &mut body)?;
        body.end()?;
        Ok(message)
    }

    fn decode_body(header: &Header, body: &mut Reader<'_>) -> Result<Self, WireError> {
        let step = header.step;
        Ok(match header.kind {
            Kind::Greeting => Self::Greeting(Greeting::decode(body)?),
            Kind::Welcome => Self::Welcome { version: body.u16("version")? },
            Kind::Refuse => Self::Refuse(Refusal::decode(body)?),
            Kind::Offer => Self::Offer(Box::new(Offer::decode(body)?)),
            Kind::Accept => Self::Accept { exposed: body.flag("exposed")? },
            Kind::StepEnd => Self::StepEnd { step },
            Kind::RoundAck => Self::RoundAck { round: step },
            Kind::State => Self::State(body.bytes("state", STATE_CHUNK)?.to_vec()),
            Kind::Finish => Self::Finish(Finish::decode(body)?),
            Kind::Prepared => Self::Prepared(Prepared::decode(body)?),
            Kind::Commit => Self::Commit,
            Kind::Running => Self::Running { resume_us: body.u64("resume time")? },
            Kind::Done => Self::Done,
            Kind::Abort => Self::Abort { reason: body.text("reason", MAX_TEXT)? },
            Kind::Heartbeat => Self::Heartbeat { received: body.u64("received bytes")? },
            Kind::Settled => Self::Settled(match body.u8("owner")? {
                0 => Owner::Source,
                1 => Owner::Destination,
                value => return Err(WireError::Value { what: "owner", value: value.into() }),
            }),
            kind @ (Kind::Pages | Kind::Transport) => return Err(WireError::Kind(kind as u8)),
        })
    }
}

impl Greeting {
    fn encode(&self, out: &mut Writer<'_>) {
        out.u16(self.version_min);
        out.u16(self.version_max);
        out.0.extend_from_slice(&self.session.0);
        let (role, index) = match self.role {
            GreetingRole::Control => (0, 0),
            GreetingRole::Data(index) => (1, index),
            GreetingRole::Settle => (2, 0),
        };
        out.u8(role);
        out.u16(index);
    }

    fn decode(body: &mut Reader<'_>) -> Result<Self, WireError> {
        let version_min = body.u16("version")?;
        let version_max = body.u16("version")?;
        let session = SessionId(body.array("session")?);
        let role = body.u8("lane role")?;
        let index = body.u16("lane index")?;
        let role = match role {
            0 => GreetingRole::Control,
            1 if index < MAX_LANES => GreetingRole::Data(index),
            2 => GreetingRole::Settle,
            value => return Err(WireError::Value { what: "lane role", value: value.into() }),
        };
        Ok(Self { version_min, version_max, session, role })
    }
}

impl Refusal {
    fn encode(&self, out: &mut Writer<'_>) {
        let (code, min, max, text) = match self {
            Self::Version { min, max } => (0, *min, *max, ""),
            Self::Busy => (1, 0, 0, ""),
            Self::Guest(reason) => (2, 0, 0, reason.as_str()),
        };
        out.u8(code);
        out.u16(min);
        out.u16(max);
        out.text(text, MAX_TEXT);
    }

    fn decode(body: &mut Reader<'_>) -> Result<Self, WireError> {
        let code = body.u8("refusal")?;
        let (min, max) = (body.u16("version")?, body.u16("version")?);
        let text = body.text("reason", MAX_TEXT)?;
        match code {
            0 => Ok(Self::Version { min, max }),
            1 => Ok(Self::Busy),
            2 => Ok(Self::Guest(text)),
            value => Err(WireError::Value { what: "refusal", value: value.into() }),
        }
    }
}

impl Offer {
    fn encode(&self, out: &mut Writer<'_>) {
        out.0.extend_from_slice(&self.digest_key.0);
        out.u16(self.data_lanes);
        out.u8(u8::from(self.verify == Verify::Full));
        out.u8(u8::from(self.run));
        out.u16(self.layout.regions().len() as u16);
        for region in self.layout.regions() {
            out.text(&region.name, MAX_REGION_NAME);
            out.u64(region.guest_address);
            out.u64(region.len);
            out.u64(region.backing_page);
            out.u8(match region.transfer {
                Transfer::Copy => 0,
                Transfer::Skip => 1,
                Transfer::Shared => 2,
            });
        }
        out.bytes(&self.config);
    }

    fn decode(body: &mut Reader<'_>) -> Result<Self, WireError> {
        let digest_key = DigestKey(body.array("digest key")?);
        let data_lanes = body.u16("data lanes")?;
        if data_lanes > MAX_LANES {
            return Err(WireError::Value { what: "data lanes", value: data_lanes.into() });
        }
        let verify = if body.flag("verify")? { Verify::Full } else { Verify::Digest };
        let run = body.flag("run")?;
        let count = body.u16("region count")?;
        if usize::from(count) > MAX_REGIONS {
            return Err(WireError::Value { what: "region count", value: count.into() });
        }
        let regions = (0..count).map(|_| decode_region(body)).collect::<Result<_, _>>()?;
        let layout =
            Layout::new(regions).map_err(|_| WireError::Value { what: "memory layout", value: count.into() })?;
        let config = body.bytes("configuration", MAX_CONFIG)?.to_vec();
        Ok(Self { digest_key, data_lanes, verify, run, layout, config })
    }
}

fn decode_region(body: &mut Reader<'_>) -> Result<Region, WireError> {
    let name = body.text("region name", MAX_REGION_NAME)?;
    let mut region = Region::ram(name, body.u64("region address")?, body.u64("region length")?);
    region.backing_page = body.u64("region page size")?;
    region.transfer = match body.u8("region transfer")? {
        0 => Transfer::Copy,
        1 => Transfer::Skip,
        2 => Transfer::Shared,
        value => return Err(WireError::Value { what: "region transfer", value: value.into() }),
    };
    Ok(region)
}

impl Finish {
    fn decode(body: &mut Reader<'_>) -> Result<Self, WireError> {
        let last_round = body.u32("last round")?;
        let digest = Digest(body.u128("digest")?);
        let state_len = body.u64("state length")?;
        if state_len > MAX_STATE {
            let limit = MAX_STATE;
            return Err(WireError::TooLong { what: "machine state", len: state_len, limit });
        }
        Ok(Self { last_round, digest, state_len })
    }
}

impl Prepared {
    fn encode(&self, out: &mut Writer<'_>) {
        out.u128(self.digest.0);
        out.u8(u8::from(self.full_digest.is_some()));
        out.u128(self.full_digest.unwrap_or_default().0);
        out.u64(self.verify_us);
        out.u64(self.load_us);
    }

    fn decode(body: &mut Reader<'_>) -> Result<Self, WireError> {
        let digest = Digest(body.u128("digest")?);
        let has_full = body.flag("full digest")?;
        let full = Digest(body.u128("full digest")?);
        Ok(Self {
            digest,
            full_digest: has_full.then_some(full),
            verify_us: body.u64("verify time")?,
            load_us: body.u64("load time")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn examples() -> Vec<Message> {
        let mut regions =
            vec![Region::ram("low", 0, 0x8000), Region::ram("high", 1 << 32, 4096), Region::ram("rom", 1 << 33, 4096)];
        (regions[1].transfer, regions[2].transfer) = (Transfer::Shared, Transfer::Skip);
        let layout = Layout::new(regions).unwrap();
        let greeting =
            |role| Message::Greeting(Greeting { version_min: 1, version_max: 7, session: SessionId([9; 16]), role });
        vec![
            greeting(GreetingRole::Control),
            greeting(GreetingRole::Data(127)),
            greeting(GreetingRole::Settle),
            Message::Welcome { version: 1 },
            Message::Refuse(Refusal::Version { min: 2, max: 3 }),
            Message::Refuse(Refusal::Busy),
            Message::Refuse(Refusal::Guest("no room".into())),
            Message::Offer(Box::new(Offer {
                digest_key: DigestKey([3; 32]),
                data_lanes: 4,
                verify: Verify::Full,
                run: true,
                layout,
                config: vec![1, 2, 3],
            })),
            Message::Accept { exposed: true },
            Message::Accept { exposed: false },
            Message::StepEnd { step: 5 },
            Message::RoundAck { round: u32::MAX },
            Message::State(vec![0xFE; 1000]),
            Message::Finish(Finish { last_round: 9, digest: Digest(u128::MAX - 5), state_len: 12 }),
            Message::Prepared(Prepared { digest: Digest(1), full_digest: Some(Digest(2)), verify_us: 3, load_us: 4 }),
            Message::Commit,
            Message::Running { resume_us: 77 },
            Message::Done,
            Message::Abort { reason: "operator".into() },
            Message::Heartbeat { received: 1 << 40 },
            Message::Settled(Owner::Destination),
        ]
    }

    fn received(frame: &[u8]) -> FrameBuffer {
        let mut buffer = FrameBuffer::new();
        buffer.prepare(frame.len()).unwrap().copy_from_slice(frame);
        buffer
    }

    #[test]
    fn every_message_round_trips() {
        for message in examples() {
            let frame = message.encode(42);
            let buffer = received(&frame);
            assert_eq!(buffer.header().unwrap().sequence, 42);
            assert_eq!(Message::decode(&buffer).unwrap(), message);
        }
    }

    #[test]
    fn any_flipped_bit_and_any_cut_is_an_error() {
        for message in examples() {
            let frame = message.encode(3);
            for bit in 0..frame.len() * 8 {
                let mut damaged = frame.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                assert!(Message::decode(&received(&damaged)).is_err(), "{message:?} bit {bit}");
            }
            for len in 0..frame.len() {
                assert!(Message::decode(&received(&frame[..len])).is_err(), "{message:?} cut at {len}");
            }
        }
    }

    #[test]
    fn bodies_with_valid_checksums_and_random_content_never_panic() {
        let mut state = 1u64;
        for kind in Kind::ALL {
            for len in 0..200usize {
                let body: Vec<u8> = (0..len)
                    .map(|_| {
                        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        (state >> 60) as u8
                    })
                    .collect();
                let mut header = Header { kind, body_len: len as u32, step: 0, sequence: 0, checksum: 0 };
                header.checksum = header.checksum_of(&body);
                let mut frame = header.encode().to_vec();
                frame.extend_from_slice(&body);
                let _ = Message::decode(&received(&frame));
            }
        }
    }
}
