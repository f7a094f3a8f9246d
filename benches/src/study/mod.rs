//! What one call of the harness has measured, as it is kept: every run of every cell, and the facts without which
//! they mean nothing. Reports, tables and comparisons are drawn from this alone.
//!
//! A *cell* is a guest on a link; a *mover* is an engine with its settings; a *run* is one migration.

pub(crate) mod file;
pub(crate) mod model;

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// The version of this form; another one is not read.
pub(crate) const FORMAT: u32 = 1;

/// A whole measurement.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Study {
    pub(crate) format: u32,
    /// `quick`, `paper`, `tiny`, or `custom`.
    pub(crate) preset: String,
    /// The command that repeats it.
    pub(crate) command: String,
    pub(crate) machine: Machine,
    pub(crate) links: Vec<Link>,
    pub(crate) guests: Vec<Guest>,
    pub(crate) movers: Vec<Mover>,
    /// In the order in which they were made.
    pub(crate) runs: Vec<Run>,
    /// Plain copies of as many bytes as an incompressible guest has.
    #[serde(default)]
    pub(crate) copies: Vec<PlainCopy>,
    /// Why ours is behind another in a cell, as a person who looked into it has written.
    #[serde(default)]
    pub(crate) remarks: Vec<Remark>,
    /// What a reader must know.
    pub(crate) notes: Vec<String>,
    /// Whether the matrix was ended early.
    pub(crate) interrupted: bool,
}

/// A link between two hosts.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Link {
    /// Unique: `100mbit`, `1gbit`, `unshaped`, `100mbit-rtt20ms`.
    pub(crate) name: String,
    /// What it is shaped to, on the wire; nothing if it is not.
    pub(crate) bits_per_second: Option<u64>,
    /// What a relay adds to the time of a round trip.
    pub(crate) rtt_ms: f64,
    pub(crate) shaper: Shaper,
    /// Bytes of payload per second that a plain copy got, once per turn.
    pub(crate) goodputs: Vec<f64>,
}

/// What makes a link as slow as it is.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Shaper {
    /// Two network namespaces joined by veth, with the kernel's token bucket.
    TokenBucket,
    /// Two network namespaces joined by veth, as fast as the machine can.
    Nothing,
    /// A program between two sockets of loopback: no rights are needed, and it costs CPU time of its own.
    Relay,
}

/// A guest.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Guest {
    /// Unique: `idle`, `few20`, `full60`, `random-idle`.
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// What memory holds at the start, in words.
    pub(crate) content: String,
    pub(crate) writes: Writes,
    /// Bytes of pages that it touches per second; 0 if it is idle.
    pub(crate) dirty_bytes_per_second: u64,
    /// Over how many bytes the writes go.
    pub(crate) working_set: u64,
    /// Whether a virtual CPU runs in it; otherwise it is memory that stands still.
    pub(crate) runs: bool,
}

/// How a guest writes.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Writes {
    Idle,
    /// A few bytes of each page.
    FewBytes,
    /// Every byte of each page, with what no codec can pack.
    WholePages,
}

/// An engine with its settings.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Mover {
    /// Unique: `ours`, `qemu-multifd-2-zstd`.
    pub(crate) name: String,
    pub(crate) engine: Engine,
    /// Its version, as the program tells it.
    pub(crate) version: String,
    /// In words.
    pub(crate) settings: String,
}

#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Engine {
    Pageferry,
    Qemu,
}

/// One migration.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Run {
    pub(crate) link: String,
    pub(crate) guest: String,
    pub(crate) mover: String,
    /// From 1.
    pub(crate) turn: u32,
    pub(crate) end: End,
    /// From the order to migrate until the source says that it is done, or until it was given up.
    pub(crate) seconds: f64,
    /// The guest's standstill as the engine tells it.
    pub(crate) downtime_ms: Option<f64>,
    pub(crate) stalls: Stalls,
    /// Passes over the memory.
    pub(crate) rounds: u64,
    /// What was still to be sent, over time; the first is all of the memory.
    pub(crate) remaining: Vec<Remaining>,
    /// Bytes that left the source's interface, headers included.
    pub(crate) wire_bytes: u64,
    pub(crate) source: Cost,
    pub(crate) destination: Cost,
    /// The strongest throttle of the guest.
    pub(crate) throttle_percent: f64,
    /// Bytes of pages that the guest wrote per second while it was moved, standstill included, by its own count; nothing for
    /// a guest that does not tell, or a migration too short for that.
    #[serde(default)]
    pub(crate) guest_bytes_per_second: Option<f64>,
    /// Whether the guest ran at the destination before all of its memory was there; nothing in studies that did not note it.
    #[serde(default)]
    pub(crate) in_postcopy: Option<bool>,
    /// Of the CPU time that this machine asked for while the run was prepared, made and checked, how much its own host gave to
    /// others, from 0 to 1; nothing where nobody knows.
    #[serde(default)]
    pub(crate) stolen_share: Option<f64>,
    /// What proved that memory arrived as it was; nothing if that was not possible.
    pub(crate) verified: Vec<Proof>,
    /// Where the bytes of the guest went; empty if the engine does not say.
    pub(crate) stages: Vec<Stage>,
}

/// A copy of memory over one TCP connection, with nothing but `write` and `read`: what no engine can beat if it cannot
/// pack.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct PlainCopy {
    pub(crate) link: String,
    pub(crate) guest: String,
    /// From 1.
    pub(crate) turn: u32,
    pub(crate) seconds: f64,
}

/// How a migration ended.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum End {
    Completed,
    /// It was cancelled at the limit.
    GivenUp,
    /// It failed by itself, with these words.
    Failed(String),
}

/// The longest time between two beats of the guest's heart, by its own clock. Nothing for a guest that does not run.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug, Default)]
#[expect(clippy::struct_field_names, reason = "names end in units")]
pub(crate) struct Stalls {
    /// Before the migration: what this machine does to a guest anyway.
    pub(crate) before_ms: Option<f64>,
    /// While the migration ran, standstill included.
    pub(crate) during_ms: Option<f64>,
    /// At the destination, after the first beat there.
    pub(crate) after_ms: Option<f64>,
}

/// Bytes of guest memory that were still to be sent.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
pub(crate) struct Remaining {
    /// Since the order to migrate.
    pub(crate) seconds: f64,
    pub(crate) bytes: u64,
    /// Which pass this is of, from 0.
    pub(crate) round: u64,
}

/// What one side's process took.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Cost {
    /// User and system, without virtual CPUs.
    pub(crate) cpu_seconds: f64,
    /// The most memory it ever held, the guest's included.
    pub(crate) peak_rss_bytes: u64,
    /// The part that is not the guest's, if the engine says so.
    pub(crate) beside_guest_bytes: Option<u64>,
}

/// What proves that a guest arrived as it was.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Proof {
    /// Both sides' digests of all pages are equal.
    Digest,
    /// The guest looked at every byte of its memory.
    GuestCheck,
    /// A file with the destination's memory was compared with what it should hold.
    Memory,
    /// The guest's heart beats at the destination; nothing is said about its memory.
    Alive,
}

/// What a stage of the encoder did.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct Stage {
    /// `zero`, `unchanged`, `pattern`, `delta`, `duplicate`, `packing`, `sent`. In this order they add up to all bytes of
    /// pages that the engine took up: each was saved by one stage, or sent.
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// Why ours is behind.
#[derive(Serialize, Deserialize, Clone, PartialEq, Eq, Debug)]
pub(crate) struct Remark {
    pub(crate) link: String,
    pub(crate) guest: String,
    /// `time`, `downtime`, `stall`, `bytes` or `cpu`.
    pub(crate) quantity: String,
    /// The mover that the text is about; a loss to another is not explained by it. Nothing if it holds against all.
    #[serde(default)]
    pub(crate) against: Option<String>,
    pub(crate) text: String,
}

impl Study {
    /// All runs of a mover in a cell.
    pub(crate) fn runs_of<'a>(
        &'a self,
        link: &'a str,
        guest: &'a str,
        mover: &'a str,
    ) -> impl Iterator<Item = &'a Run> {
        self.runs.iter().filter(move |run| run.link == link && run.guest == guest && run.mover == mover)
    }
}

impl Link {
    /// Bytes of payload per second that a migration can have: what a plain copy got, or else the rate.
    pub(crate) fn payload_rate(&self) -> f64 {
        let median = crate::outcome::median(&self.goodputs);
        if median.is_nan() { self.bits_per_second.map_or(f64::NAN, |bits| bits as f64 / 8.0) } else { median }
    }
}
