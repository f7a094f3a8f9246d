//! How hard to pack: measured, decided per batch, changed in flight.
//!
//! A byte of payload takes `max((scan + pack) / encoders, ratio * link)`: it is encoded while others are
//! sent, so the slower of the two counts. `scan` and `pack` are the encoders' time per byte, `ratio` what
//! packing leaves of it, `link` the lanes' time per byte sent. The level with the least of that wins: raw
//! where the link outruns the encoders, stronger the slower the link is.
//!
//! The lanes' time per byte says something about the link only while they have no lack of batches: what is
//! sent now and then only fills buffers, on any link. So while the encoders are what everything waits for, the link is
//! taken to be a little faster all the time, until packing less shows how fast it is; each time that was in
//! vain the next attempt comes later. What a level would bring is learned by using it, and by packing a batch
//! now and then at a neighbouring level as well.
//!
//! What the mean says is not true of every batch: here many pages are duplicates and little is left for the
//! link, there nothing shrinks. So a batch is packed less hard, or not at all, if lanes would run out of what was encoded
//! before it is done.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Level;
use crate::config::Compress;

/// The levels that `auto` chooses from, with what is assumed of them until they were measured:
/// nanoseconds per byte, and bytes out relative to level 1. On guest-like pages, one core of a server.
const LADDER: [(Level, f64, f64); 8] = [
    (Level::Raw, 0.0, f64::NAN),
    (Level::Zstd(-5), 1.8, 1.2),
    (Level::Zstd(1), 2.7, 1.0),
    (Level::Zstd(3), 4.5, 0.96),
    (Level::Zstd(6), 12.0, 0.93),
    (Level::Zstd(9), 20.0, 0.92),
    (Level::Zstd(12), 50.0, 0.915),
    (Level::Zstd(15), 100.0, 0.91),
];

/// The rung that others are measured against.
const REFERENCE: usize = 2;

/// Time per byte to scan, and to send, until they were measured.
const SCAN_NS: f64 = 0.2;
const LINK_NS: f64 = 0.5;

/// Weight of a new measurement, for half a megabyte.
const WEIGHT: f64 = 0.25;

/// Lanes that are busy for this share of the time are what the migration waits for.
const SATURATED: f64 = 0.85;

/// Encoding in this share of the time that sending takes is no reason for lanes to lack batches.
const AMPLE: f64 = 0.5;

/// The time, in seconds, over which it is judged whether the lanes are busy.
const WINDOW: f64 = 0.02;

/// So many bytes say something about a link, however soon they were sent. The first ones meet a connection and a
/// destination that have yet to start.
const TELLING_SENT: f64 = 1_048_576.0;

/// Seconds in which an unused link is taken to have become faster by a factor of e: at first, and at most.
const LINK_DRIFT: (f64, f64) = (0.15, 10.0);

/// A link that turns out to be at least this much of what it was before the drift has not changed.
const UNCHANGED: f64 = 0.7;

/// A level must be better by this to replace the present one; and of two that differ by less the
/// cheaper is taken.
const WORTH: f64 = 0.98;

/// Batches between two trials, at least and at most.
const TRIAL_EVERY: (u32, u32) = (12, 192);

/// The most that trials may cost, as a share of the time that batches take anyway: the dearer one is, the rarer.
const TRIAL_SHARE: f64 = 0.01;

/// A trial may take so many times the time that a batch takes anyway.
const TRIAL_COST: f64 = 4.0;

/// A time of more than so often what is known of a level counts as this: a thread that had to wait for a core says little of the level,
/// unless that happens again and again.
const OUTLIER: f64 = 2.0;

/// A level that turns out to take at most this share of what was believed is looked at again soon.
const SURPRISE: f64 = 0.5;

/// The best that packing is hoped to leave of a payload when nothing is known.
const HOPE: f64 = 0.25;

/// Time per byte that it takes to put a page that is sent for the first time into the cache of bases, in memory that the
/// host has to find first (measured, `benches/NOTES.md`).
const ADMISSION_NS: f64 = 1.0;

/// Time per byte sent from which on duplicates are looked for: 8 Gbps. The look into the index is a miss in
/// cache and page tables, some 0.1 ns a byte (`benches/NOTES.md`), and most pages are no duplicates.
const SEEK_NS: f64 = 1.0;

/// How a batch is to be encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// How hard to pack.
    pub level: Level,
    /// Whether pages that are sent for the first time may enter the cache of delta bases: it costs a
    /// copy, which pays only if the round takes long enough for the guest to write them again.
    pub admits: bool,
    /// Whether duplicates are looked for: on a link as fast as memory, looking takes longer than sending.
    pub seeks: bool,
    /// Whether pages with content are written straight from guest memory, where the transport can. Only where nothing is
    /// packed or tried, and while the guest runs: the last pages go with a copy, which is all of their proof.
    pub direct: bool,
    /// A level to try on the same payload.
    pub trial: Option<Level>,
}

impl Default for Choice {
    /// Everything but packing.
    fn default() -> Self {
        Self { level: Level::Raw, admits: true, seeks: true, direct: false, trial: None }
    }
}

/// What a trial has brought.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// The level tried.
    pub level: Level,
    /// Bytes that came out.
    pub packed: usize,
    /// Time it took.
    pub time: Duration,
}

/// Chooses the level of every batch.
#[derive(Debug)]
pub struct LevelChooser {
    fixed: Option<Level>,
    encoders: f64,
    lanes: f64,
    /// Whether lanes can write pages straight from guest memory.
    direct: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    rung: usize,
    /// Bytes of a batch's payload, lately.
    payload: f64,
    /// Bytes that were encoded and not sent yet.
    backlog: f64,
    scan_ns: f64,
    /// Bytes out per byte in at the reference level.
    ratio: f64,
    pack_ns: [f64; LADDER.len()],
    relative: [f64; LADDER.len()],
    link_ns: f64,
    /// What `link_ns` was when the lanes began to lack batches.
    link_ns_before: Option<f64>,
    drift: f64,
    /// Seconds that lanes sent and waited, and bytes sent, within about a `WINDOW`.
    busy: f64,
    idle: f64,
    sent: f64,
    until_trial: u32,
    trial_every: u32,
    trial_up: bool,
}

impl LevelChooser {
    /// A chooser for so many encoder threads and lanes.
    pub fn new(compress: Compress, encoders: u16, lanes: u16) -> Self {
        let fixed = match compress {
            Compress::Auto => None,
            Compress::Off => Some(Level::Raw),
            Compress::Level(level) => Some(Level::Zstd(level.clamp(super::MIN_LEVEL, super::MAX_LEVEL))),
        };
        let state = State {
            rung: 0,
            payload: 0.0,
            backlog: 0.0,
            scan_ns: SCAN_NS,
            ratio: 0.5,
            pack_ns: LADDER.map(|(_, ns, _)| ns),
            relative: LADDER.map(|(_, _, relative)| relative),
            link_ns: LINK_NS,
            link_ns_before: None,
            drift: LINK_DRIFT.0,
            busy: 0.0,
            idle: 0.0,
            sent: 0.0,
            until_trial: 0,
            trial_every: TRIAL_EVERY.0,
            trial_up: true,
        };
        Self {
            fixed,
            encoders: encoders.max(1).into(),
            lanes: lanes.max(1).into(),
            direct: AtomicBool::new(false),
            state: Mutex::new(state),
        }
    }

    /// Lanes can write pages straight from guest memory.
    pub fn can_write_directly(&self) {
        self.direct.store(true, Ordering::Relaxed);
    }

    /// How the next batch is to be encoded. For an `urgent` one the guest stands still: packing harder than easily
    /// would take longer than the bytes it saves, on any link that is not saturated for long.
    pub fn choose(&self, urgent: bool) -> Choice {
        let mut state = self.lock();
        let easy = if self.fixed == Some(Level::Raw) { 0 } else { REFERENCE };
        let admits = state.can_admit(easy, self.encoders, self.lanes);
        let slow = state.link_ns / self.lanes > SEEK_NS;
        if let Some(level) = self.fixed {
            let seeks = slow || level != Level::Raw;
            return Choice { level, admits, seeks, direct: self.directs(level, urgent), trial: None };
        }
        state.settle(self.encoders, self.lanes);
        let trial = if urgent { None } else { state.trial(self.encoders, self.lanes) };
        // Beside packing, looking is nothing.
        let seeks = slow || state.rung > 0;
        let mut rung = state.rung_for_now(self.encoders, self.lanes);
        if urgent {
            rung = rung.min(REFERENCE);
        }
        let (level, trial) = (LADDER[rung].0, trial.map(|rung| LADDER[rung].0));
        Choice { level, admits, seeks, direct: trial.is_none() && self.directs(level, urgent), trial }
    }

    fn directs(&self, level: Level, urgent: bool) -> bool {
        level == Level::Raw && !urgent && self.direct.load(Ordering::Relaxed)
    }

    /// Whether encoding is so little work, beside sending, that who sends a batch had better encode it too.
    pub fn leaves_it_to_lanes(&self) -> bool {
        let state = self.lock();
        let raw = self.fixed.map_or(state.rung == 0, |level| level == Level::Raw);
        raw && state.link_ns / self.lanes <= SEEK_NS
    }

    /// A batch was encoded: its payload, what came out, and what scanning and packing took.
    pub fn encoded(&self, level: Level, raw: usize, packed: usize, scan: Duration, pack: Duration) {
        let mut state = self.lock();
        state.backlog += packed as f64;
        if raw < super::pack::TELLING {
            return;
        }
        let weight = weight(raw);
        blend(&mut state.payload, raw as f64, WEIGHT);
        blend(&mut state.scan_ns, per_byte(scan, raw), weight);
        if let Some(rung) = rung_of(level).filter(|rung| *rung > 0) {
            state.learn_pack(rung, per_byte(pack, raw), weight);
            let relative = state.relative[rung];
            blend(&mut state.ratio, packed as f64 / raw as f64 / relative, weight);
        }
    }

    /// A payload was packed at another level too.
    pub fn tried(&self, level: Level, raw: usize, packed: usize, trial: Trial) {
        let mut state = self.lock();
        let Some(rung) = rung_of(trial.level).filter(|rung| *rung > 0 && raw > 0) else { return };
        let tried = trial.packed as f64 / raw as f64;
        // A trial is rare: it counts for more than one of many batches.
        let (took, believed) = (per_byte(trial.time, raw), state.pack_ns[rung]);
        state.learn_pack(rung, took, 0.5);
        if took < believed * SURPRISE {
            (state.trial_every, state.until_trial) = (TRIAL_EVERY.0, TRIAL_EVERY.0);
        }
        match rung_of(level).filter(|rung| *rung > 0) {
            Some(present) if packed > 0 => {
                let relative = state.relative[present] * trial.packed as f64 / packed as f64;
                blend(&mut state.relative[rung], relative, 0.5);
            }
            _ => {
                let relative = state.relative[rung];
                blend(&mut state.ratio, tried / relative, 0.5);
            }
        }
    }

    /// A lane has sent so many bytes, in the time `busy`, after it had waited for them for `idle`.
    pub fn sent(&self, bytes: u64, busy: Duration, idle: Duration) {
        let mut state = self.lock();
        state.backlog = (state.backlog - bytes as f64).max(0.0);
        let (busy, idle) = (busy.as_secs_f64(), idle.as_secs_f64());
        let fade = (-(busy + idle) / (WINDOW * self.lanes)).exp();
        state.busy = state.busy * fade + busy;
        state.idle = state.idle * fade + idle;
        state.sent = state.sent * fade + bytes as f64;
        if bytes >= 4096 {
            state.learn_link(busy * 1e9 / bytes as f64, busy + idle);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_saturated(&self) -> bool {
        let telling = self.sent > TELLING_SENT || self.busy > WINDOW / 2.0;
        telling && self.busy > SATURATED * (self.busy + self.idle)
    }

    /// The last bytes took so many nanoseconds each; `seconds` have passed since others were sent.
    fn learn_link(&mut self, ns: f64, seconds: f64) {
        if self.is_saturated() {
            // One send says little: it finds a buffer empty, or its thread has to wait for a core.
            self.link_ns = self.busy * 1e9 / self.sent;
            if self.link_ns_before.is_some_and(|before| self.link_ns > before * UNCHANGED) {
                self.link_ns_before = None;
                self.drift = (self.drift * 2.0).min(LINK_DRIFT.1);
            }
        } else {
            self.link_ns_before.get_or_insert(self.link_ns);
            let faster = self.link_ns * (-seconds / self.drift).exp();
            self.link_ns = faster.max(ns.min(self.link_ns));
        }
    }

    /// Packing at this level took so many nanoseconds per byte.
    fn learn_pack(&mut self, rung: usize, ns: f64, weight: f64) {
        let known = self.pack_ns[rung];
        blend(&mut self.pack_ns[rung], ns.min(known * OUTLIER), weight);
    }

    /// Whether encoders have the time to keep pages that are sent for the first time, at an `easy` level. What
    /// the guest writes again meanwhile is few, mostly; where encoders have no time to lose it costs more than it saves.
    fn can_admit(&self, easy: usize, encoders: f64, lanes: f64) -> bool {
        let sending = self.ratio_at(easy) * self.link_ns / lanes;
        self.encode_time(easy, encoders) + ADMISSION_NS / encoders < sending * AMPLE
    }

    fn ratio_at(&self, rung: usize) -> f64 {
        if rung == 0 { 1.0 } else { (self.ratio * self.relative[rung]).min(1.0) }
    }

    fn encode_time(&self, rung: usize, encoders: f64) -> f64 {
        (self.scan_ns + self.pack_ns[rung]) / encoders
    }

    fn time(&self, rung: usize, encoders: f64, lanes: f64) -> f64 {
        self.encode_time(rung, encoders).max(self.ratio_at(rung) * self.link_ns / lanes)
    }

    /// Goes to the rung that takes the least time, the cheapest of those that hardly differ.
    fn settle(&mut self, encoders: f64, lanes: f64) {
        let times: [f64; LADDER.len()] = std::array::from_fn(|rung| self.time(rung, encoders, lanes));
        let least = times.iter().copied().fold(f64::INFINITY, f64::min);
        let present = times[self.rung];
        if least < present * WORTH || self.rung > 0 {
            let best = times.iter().position(|&time| time * WORTH <= least).unwrap_or(self.rung);
            // Downwards at once: it costs nothing. Upwards only for a gain.
            if best != self.rung && (best < self.rung || times[best] < present * WORTH) {
                self.rung = best;
                self.trial_every = TRIAL_EVERY.0;
                self.until_trial = self.until_trial.min(TRIAL_EVERY.0);
            }
        }
    }

    /// The rung for one batch: an easier one if lanes would run out of batches before it is encoded. Two levels in turn keep
    /// both link and encoders busy where each alone would leave one idle.
    fn rung_for_now(&self, encoders: f64, lanes: f64) -> usize {
        let until_dry = self.backlog * self.link_ns / lanes;
        let eases = |rung: usize| {
            let encoding = self.encode_time(rung, encoders);
            let sending = self.ratio_at(rung) * self.link_ns / lanes;
            encoding * self.payload > until_dry && encoding > sending * AMPLE
        };
        (1..=self.rung).rev().find(|&rung| !eases(rung)).unwrap_or(0)
    }

    /// A neighbouring rung, if it is time to look at one and it could be better.
    fn trial(&mut self, encoders: f64, lanes: f64) -> Option<usize> {
        self.until_trial = self.until_trial.saturating_sub(1);
        if self.until_trial > 0 {
            return None;
        }
        self.until_trial = self.trial_every;
        self.trial_up = !self.trial_up;
        let rung = match self.rung {
            0 => REFERENCE,
            rung if self.trial_up => rung + 1,
            rung => rung - 1,
        };
        if rung == 0 || rung == LADDER.len() {
            return None;
        }
        let (present, cost) = (self.time(self.rung, encoders, lanes), self.encode_time(rung, encoders));
        let dear = (cost / (present * TRIAL_SHARE)).clamp(TRIAL_EVERY.0.into(), TRIAL_EVERY.1.into());
        self.trial_every = (self.trial_every * 2).min(dear as u32);
        // What was measured while threads waited for a core must not keep a level from being looked at ever again.
        let hoped = (self.scan_ns + self.pack_ns[rung].min(LADDER[rung].1)) / encoders;
        let could_win = hoped.max(HOPE * self.link_ns / lanes) < present;
        (cost < present * TRIAL_COST && could_win).then_some(rung)
    }
}

fn rung_of(level: Level) -> Option<usize> {
    LADDER.iter().position(|(rung, _, _)| *rung == level)
}

fn per_byte(time: Duration, bytes: usize) -> f64 {
    time.as_nanos() as f64 / bytes as f64
}

/// Small batches say less.
fn weight(bytes: usize) -> f64 {
    WEIGHT * (bytes as f64 / f64::from(512 << 10)).min(1.0)
}

fn blend(value: &mut f64, new: f64, weight: f64) {
    *value += (new - *value) * weight;
}

#[cfg(test)]
mod tests;
