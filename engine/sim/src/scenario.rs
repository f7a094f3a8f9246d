//! Everything that a seed decides before the run begins: the guest, the user's choices, the link, the
//! VMs, and what goes wrong.

use std::time::Duration;

use pageferry::config::{Compress, EncodeConfig, OnTimeout, Verify};
use pageferry::limits::{BATCHES_PER_ENCODER, BATCHES_PER_LANE, WORK_FACTOR};
use pageferry::memory::{Layout, Region, Transfer};
use pageferry::transport::LaneRole;
use pageferry::units::PAGE_SIZE;
use pageferry::wire::Kind;
use pageferry::{DestinationConfig, SourceConfig};

use crate::fault::{Call, Cut, Fault, Scope, Trigger, Which};
use crate::guest::Mix;
use crate::network::Link;
use crate::random::Random;

/// How the guest writes its memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pattern {
    /// Time between two steps.
    pub(crate) interval: Duration,
    /// Pages written in a step.
    pub(crate) writes: u64,
    /// Writes go to so many pages from `first`.
    pub(crate) reach: u64,
    pub(crate) first: u64,
    /// It gives pages back to the host, too.
    pub(crate) gives_back: bool,
    pub(crate) mix: Mix,
}

/// How the encoder threads take their time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EncoderPlan {
    /// Longest time from taking a batch to reading memory, and from there to handing it over.
    pub(crate) longest: Duration,
    /// Buffers for batches; the driver has at least three.
    pub(crate) buffers: usize,
}

/// In which words a tracker reports.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Report {
    Words,
    Ranges,
    Addresses,
}

/// What the dirty tracker does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tracking {
    /// A harvest reports without forgetting; arming forgets.
    pub(crate) manual: bool,
    /// Every page counts as written when tracking starts.
    pub(crate) initially_set: bool,
    pub(crate) report: Report,
    /// The canary.
    pub(crate) loses_a_bit: bool,
}

/// How the VMs behave.
#[derive(Clone, Debug)]
pub(crate) struct VmPlan {
    /// Longest time that a call takes.
    pub(crate) longest_call: Duration,
    /// Bytes of machine state.
    pub(crate) state_len: usize,
    /// Pages that saving the state writes.
    pub(crate) save_writes: u64,
    /// Calls that fail, and the how-manieth time.
    pub(crate) failures: Vec<(Call, u32)>,
}

/// A wrong engine that the checkers must find out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Canary {
    /// The dirty tracker never reports one page that was written.
    LostDirtyBit,
    /// The destination starts the guest when it is prepared, without waiting for Commit.
    StartsWithoutCommit,
    /// The destination places pages of a newer step before the older step is complete.
    BarrierOvertaken,
    /// The same, but of copies only: those of a round may overtake its contents.
    CopiesOvertake,
    /// The source copies from pages that are copies themselves in the same step.
    CopiesUnchecked,
    /// Pages of an abandoned round are dirty again, but booked as sent.
    GivenBackBooked,
}

/// Somebody else at the destination's door.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Visit {
    /// Connects and says nothing.
    Silent,
    /// Sends bytes that are no frame.
    Garbage,
    /// Speaks a version from the future.
    Version,
    /// Opens a control lane, offers nothing, and leaves at once.
    Leaves,
    /// Opens a control lane, offers nothing, and stays.
    Waits,
    /// Asks about, or opens a data lane for, a migration that nobody knows.
    Unknown(bool),
}

/// One run, as planned.
#[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Clone, Debug)]
pub(crate) struct Scenario {
    pub(crate) name: String,
    /// Where chance begins: delays, splits, the guest's content.
    pub(crate) seed: u64,
    pub(crate) layout: Layout,
    /// Pages of the guest that hold something, in per cent.
    pub(crate) filled: u64,
    pub(crate) runs: bool,
    pub(crate) pattern: Pattern,
    pub(crate) tracking: Tracking,
    /// Pages are torn while they are read, through a memory that has no window.
    pub(crate) tears: bool,
    pub(crate) knows_populated: bool,
    /// Which ends of the transport can write pages straight into the destination's memory: the source's, the destination's.
    pub(crate) one_sided: (bool, bool),
    pub(crate) config: SourceConfig,
    pub(crate) encoding: EncoderPlan,
    pub(crate) destination_config: DestinationConfig,
    /// Decisions of the convergence policy come from the seed.
    pub(crate) random_policy: bool,
    /// Rounds after which the policy wants the switch-over whatever it costs.
    pub(crate) patience: u64,
    pub(crate) link: Link,
    pub(crate) vm: VmPlan,
    pub(crate) faults: Vec<(Trigger, Fault)>,
    pub(crate) visits: Vec<(Duration, Visit)>,
    pub(crate) canary: Option<Canary>,
}

impl Scenario {
    /// The run that a seed stands for.
    pub(crate) fn of_seed(seed: u64) -> Self {
        let mut random = Random::new(seed);
        // Rounds take so long that the dirty bits are looked at in the middle of them.
        let long = random.fork(9).chance(8);
        let layout = layout(&mut random.fork(1), long);
        let pages: u64 = layout.regions().iter().map(Region::page_count).sum();
        let mut config = source_config(&mut random.fork(2));
        config.encode = encode_config(&mut random.fork(7));
        let mut encoding = encoder_plan(&mut random.fork(8), &config);
        let destination_config = destination_config(&mut random.fork(3), &config);
        let mut link = link(&mut random.fork(4), &config);
        let mut vm = vm_plan(&mut random.fork(5));
        let mut dice = random.fork(6);
        let faults = if dice.chance(15) { Vec::new() } else { faults(&mut dice, &config) };
        if dice.chance(15) {
            vm.failures = vec![(dice.pick(&CALLS), dice.below(2) as u32)];
        }
        if long {
            link.bandwidth.fill(random.fork(10).log_within(400_000..=1_000_000));
            encoding.buffers = 1;
        }
        let visits = if dice.chance(10) { vec![(dice.micros(1..=50_000), visit(&mut dice))] } else { Vec::new() };
        Self {
            name: format!("seed {seed}"),
            seed,
            filled: if long { 100 } else { dice.pick(&[0, 10, 60, 100]) },
            runs: !dice.chance(5),
            pattern: if long { hot_pattern(&mut dice, pages) } else { pattern(&mut dice, pages) },
            tracking: tracking(&mut dice),
            tears: dice.chance(50),
            knows_populated: dice.chance(80),
            one_sided: one_sided(&mut random.fork(11)),
            random_policy: dice.chance(30),
            // Now and then so many that the session has to put an end to it.
            patience: if dice.chance(4) { u64::MAX } else { dice.log_within(3..=300) },
            layout,
            config,
            encoding,
            destination_config,
            link,
            vm,
            faults,
            visits,
            canary: None,
        }
    }

    /// A small migration without haste in which nothing goes wrong: for whoever wants one thing to.
    pub(crate) fn calm(name: &str, layout: Layout) -> Self {
        let mut config = SourceConfig::default();
        config.lanes = 0;
        config.encode = EncodeConfig::default();
        config.encode.threads = 2;
        config.encode.delta_cache = 1 << 20;
        config.peer_timeout = Duration::from_secs(2);
        config.settle_window = Duration::from_secs(3);
        let mut destination_config = DestinationConfig::default();
        destination_config.peer_timeout = config.peer_timeout;
        destination_config.settle_window = config.settle_window;
        let latency = Duration::from_micros(200);
        Self {
            name: name.to_owned(),
            seed: 1,
            layout,
            filled: 40,
            runs: true,
            pattern: Pattern {
                interval: Duration::from_millis(2),
                writes: 1,
                reach: 2,
                first: 5,
                gives_back: false,
                mix: Mix::All,
            },
            tracking: Tracking { manual: false, initially_set: false, report: Report::Words, loses_a_bit: false },
            tears: false,
            knows_populated: true,
            one_sided: (false, false),
            config,
            encoding: EncoderPlan { longest: Duration::from_micros(200), buffers: 4 },
            destination_config,
            random_policy: false,
            patience: u64::MAX,
            link: Link {
                latency: vec![latency],
                bandwidth: vec![1_000_000_000],
                jitter: Duration::from_micros(50),
                capacity: 1 << 20,
            },
            vm: VmPlan { longest_call: Duration::from_millis(1), state_len: 40, save_writes: 1, failures: Vec::new() },
            faults: Vec::new(),
            visits: Vec::new(),
            canary: None,
        }
    }

    /// Nothing goes wrong, nothing is tight: it has to succeed.
    pub(crate) fn must_succeed(&self) -> bool {
        let roomy = Duration::from_secs(2);
        // Around the pause five calls follow each other, and the destination sees nothing of it.
        let patient = self.destination_config.peer_timeout * WORK_FACTOR;
        self.faults.is_empty()
            && self.vm.failures.is_empty()
            && self.visits.is_empty()
            && self.config.peer_timeout >= roomy
            && self.destination_config.peer_timeout >= roomy
            && self.config.timeout >= Duration::from_secs(600)
            && self.config.on_timeout == OnTimeout::SwitchOver
            && self.vm.longest_call * 5 <= patient
            && self.canary.is_none()
    }
}

const CALLS: [Call; 12] = [
    Call::Begin,
    Call::StartTracking,
    Call::Harvest,
    Call::Rearm,
    Call::Throttle,
    Call::Pause,
    Call::Save,
    Call::BeforeHandover,
    Call::Resume,
    Call::Prepare,
    Call::Load,
    Call::Commit,
];

fn layout(random: &mut Random, large: bool) -> Layout {
    let mut regions = Vec::new();
    let mut address = 0;
    let counts: &[u64] = if large { &[2, 3] } else { &[0, 1, 1, 1, 2, 3, 5] };
    let sizes: &[u64] = if large { &[300, 384] } else { &[0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 300] };
    for index in 0..random.pick(counts) {
        let pages = random.pick(sizes);
        let mut region = Region::ram(format!("r{index}"), address, pages * PAGE_SIZE as u64);
        if random.chance(15) {
            region.transfer = Transfer::Skip;
        }
        address += region.len + random.pick(&[0, 4096, 1 << 20, 1 << 32]);
        regions.push(region);
    }
    if random.chance(30) {
        regions.reverse();
    }
    Layout::new(regions).unwrap_or_default()
}

fn one_sided(random: &mut Random) -> (bool, bool) {
    match random.below(100) {
        0..=29 => (true, true),
        30..=32 => (true, false),
        33..=35 => (false, true),
        _ => (false, false),
    }
}

fn pattern(random: &mut Random, pages: u64) -> Pattern {
    let reach = random.pick(&[1, 4, 20, pages]);
    Pattern {
        interval: random.micros(50..=20_000),
        writes: random.pick(&[0, 1, 1, 3, 10, 50]),
        reach,
        first: random.below(pages.max(1)),
        gives_back: random.chance(40),
        mix: random.pick(&[Mix::New, Mix::Moves, Mix::Moves, Mix::Flips, Mix::Touches, Mix::All, Mix::All]),
    }
}

/// A few pages that are written all the time.
fn hot_pattern(random: &mut Random, pages: u64) -> Pattern {
    let pattern = pattern(random, pages);
    Pattern { interval: random.micros(500..=5_000), writes: 3, reach: random.pick(&[4, 20]), ..pattern }
}

fn tracking(random: &mut Random) -> Tracking {
    Tracking {
        manual: random.chance(60),
        initially_set: random.chance(20),
        report: random.pick(&[Report::Words, Report::Words, Report::Ranges, Report::Addresses]),
        loses_a_bit: false,
    }
}

fn source_config(random: &mut Random) -> SourceConfig {
    let mut config = SourceConfig::default();
    config.lanes = random.pick(&[0, 0, 1, 1, 2, 3, 4, 8]);
    config.downtime_limit = random.micros(100..=3_000_000);
    config.timeout =
        Duration::from_millis(random.pick(&[50, 2_000, 20_000, 600_000, 600_000, 600_000, 3_600_000, 3_600_000]));
    config.on_timeout = random.pick(&[OnTimeout::Cancel, OnTimeout::SwitchOver]);
    config.bandwidth = random.chance(15).then(|| random.log_within(1_000_000..=1_000_000_000));
    config.max_throttle = random.pick(&[0, 50, 99]);
    config.verify = random.pick(&[Verify::Digest, Verify::Full]);
    // 500 ms is the period of the signs of life: the deadline and the sign come together.
    config.peer_timeout = Duration::from_millis(random.pick(&[500, 700, 2_000, 5_000, 5_000, 10_000, 10_000]));
    config.settle_window = Duration::from_millis(random.pick(&[400, 3_000, 10_000, 30_000]));
    config
}

/// Small caches throw pages out; the smallest holds one set of 8 pages for every 128 of the guest.
fn encode_config(random: &mut Random) -> EncodeConfig {
    let mut config = EncodeConfig::default();
    config.threads = random.pick(&[1, 1, 2, 3, 4, 6]);
    config.compress = random.pick(&[Compress::Auto, Compress::Auto, Compress::Auto, Compress::Off, Compress::Level(1)]);
    config.duplicates = random.chance(85);
    config.delta_cache = random.pick(&[0, 1 << 20, 1 << 20, 3 << 20, 256 << 20]);
    config
}

/// As many buffers as the driver makes, or fewer, so that a small guest is short of them too.
fn encoder_plan(random: &mut Random, config: &SourceConfig) -> EncoderPlan {
    let encoders = usize::from(config.encode.threads) * BATCHES_PER_ENCODER;
    let all = encoders + usize::from(config.lanes.max(1)) * BATCHES_PER_LANE;
    EncoderPlan { longest: random.micros(1..=5_000), buffers: random.pick(&[1, 2, all, all]) }
}

fn destination_config(random: &mut Random, source: &SourceConfig) -> DestinationConfig {
    let mut config = DestinationConfig::default();
    let same = random.chance(70);
    config.peer_timeout =
        if same { source.peer_timeout } else { Duration::from_millis(random.pick(&[500, 2_000, 10_000, 30_000])) };
    config.settle_window =
        if same { source.settle_window } else { Duration::from_millis(random.pick(&[400, 10_000, 30_000])) };
    config
}

fn link(random: &mut Random, config: &SourceConfig) -> Link {
    let lanes = 1 + u64::from(config.lanes);
    let alike = random.chance(50);
    let (latency, bandwidth) = (random.micros(10..=80_000), random.log_within(1_000_000..=2_000_000_000));
    let each = |random: &mut Random| {
        if alike {
            (latency, bandwidth)
        } else {
            (random.micros(10..=80_000), random.log_within(1_000_000..=2_000_000_000))
        }
    };
    let (latency, bandwidth) = (0..lanes).map(|_| each(random)).unzip();
    Link { latency, bandwidth, jitter: random.micros(1..=5_000), capacity: random.log_within(4_096..=4 << 20) }
}

fn vm_plan(random: &mut Random) -> VmPlan {
    VmPlan {
        // Some take longer than the peer may be silent.
        longest_call: if random.chance(8) { random.micros(500_000..=8_000_000) } else { random.micros(1..=100_000) },
        state_len: random.pick(&[0, 1, 100, 5_000, 300_000, 600_000]),
        save_writes: random.pick(&[0, 0, 1, 3, 20]),
        failures: Vec::new(),
    }
}

fn faults(random: &mut Random, config: &SourceConfig) -> Vec<(Trigger, Fault)> {
    (0..random.pick(&[1, 1, 2, 2, 3])).map(|_| fault(random, config)).collect()
}

fn fault(random: &mut Random, config: &SourceConfig) -> (Trigger, Fault) {
    let fault = match random.below(100) {
        0..=9 => Fault::Flip { offset: random.next(), mask: 1 << random.below(8) },
        10..=19 => Fault::Truncate { bytes: random.next(), cut: cut(random, config) },
        20..=49 => Fault::Cut(cut(random, config)),
        50..=67 => stall(random, config),
        68..=77 => Fault::Kill { restart: random.chance(50) },
        78..=85 => Fault::CancelSource,
        86..=89 => Fault::CancelDestination,
        90..=95 => Fault::SwitchOver,
        _ => Fault::DowntimeLimit(random.micros(100..=3_000_000)),
    };
    let trigger = match random.below(10) {
        // A round is abandoned in its middle.
        0..=5 if fault == Fault::SwitchOver => Trigger::Sent(Which::Kind(Kind::Pages, random.below(20))),
        0 if !fault.damages_frame() => Trigger::At(random.micros(10..=3_000_000)),
        1..=4 if !fault.damages_frame() => Trigger::Arrived(which(random, config)),
        _ => Trigger::Sent(which(random, config)),
    };
    (trigger, fault)
}

/// Most faults strike at the hand-over, where the owner changes.
fn which(random: &mut Random, config: &SourceConfig) -> Which {
    const HANDOVER: [Kind; 10] = [
        Kind::State,
        Kind::Finish,
        Kind::Prepared,
        Kind::Commit,
        Kind::Commit,
        Kind::Commit,
        Kind::Running,
        Kind::Running,
        Kind::Done,
        Kind::Settled,
    ];
    const OTHERS: [Kind; 11] = [
        Kind::Greeting,
        Kind::Welcome,
        Kind::Offer,
        Kind::Accept,
        Kind::Pages,
        Kind::Pages,
        Kind::StepEnd,
        Kind::RoundAck,
        Kind::Heartbeat,
        Kind::Abort,
        Kind::Refuse,
    ];
    match random.below(10) {
        0 => Which::Number(random.below(60)),
        1..=2 => Which::Kind(random.pick(&OTHERS), random.pick(&[0, 0, 1, 2, 5])),
        // The greetings after those of the first lanes ask who owns the guest.
        3 => Which::Kind(Kind::Greeting, u64::from(config.lanes) + random.within(1..=2)),
        _ => Which::Kind(random.pick(&HANDOVER), 0),
    }
}

fn role(random: &mut Random, config: &SourceConfig) -> LaneRole {
    match random.below(u64::from(config.lanes) + 1) {
        0 => LaneRole::Control,
        lane => LaneRole::Data(lane as u16 - 1),
    }
}

fn scope(random: &mut Random, config: &SourceConfig) -> Scope {
    match random.below(4) {
        0 => Scope::Lane,
        1 => Scope::Role(role(random, config)),
        _ => Scope::Link,
    }
}

fn cut(random: &mut Random, config: &SourceConfig) -> Cut {
    let notices = |random: &mut Random| match random.below(4) {
        0 => None,
        1 => Some(random.micros(1..=2_000_000)),
        _ => Some(Duration::ZERO),
    };
    Cut {
        scope: scope(random, config),
        source_notices: notices(random),
        destination_notices: notices(random),
        heals_after: random.chance(70).then(|| random.micros(1..=20_000_000)),
    }
}

fn stall(random: &mut Random, config: &SourceConfig) -> Fault {
    let (out, back) = random.pick(&[(true, true), (true, false), (false, true)]);
    let lasts = random.chance(70).then(|| random.micros(1_000..=40_000_000));
    Fault::Stall { scope: scope(random, config), out, back, lasts }
}

fn visit(random: &mut Random) -> Visit {
    random.pick(&[
        Visit::Silent,
        Visit::Garbage,
        Visit::Version,
        Visit::Leaves,
        Visit::Waits,
        Visit::Unknown(true),
        Visit::Unknown(false),
    ])
}
