//! Incompressible memory: a plain copy, and a migration in turn with it.

use std::sync::Arc;

use clap::{Args, ValueEnum};
use pageferry::memory::MappedMemory;

use super::demo::{self, Demo, DemoOptions};
use super::measured::{Cost, Way, check, copy_plainly, migrate};
use super::{gib, gigabytes_per_second, iperf, size};
use crate::outcome::{Outcome, Target, median};
use crate::over::Over;
use crate::peer::Peer;
use crate::{BenchError, guest};

/// Of the reference's throughput, what a migration must reach.
const LEAST_RATIO: f64 = 0.9;

/// CPU-seconds per GiB over both sides that a migration may take.
const MOST_CPU: f64 = 0.45;

/// What both benchmarks here need to know.
#[derive(Args, Debug)]
pub(crate) struct ReferenceOptions {
    /// Memory to copy
    #[arg(long, value_parser = size, default_value = "2G")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "7", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// Bytes per read and write
    #[arg(long, value_parser = size, default_value = "512K")]
    chunk: u64,
}

#[derive(Args, Debug)]
pub(crate) struct ThroughputOptions {
    #[command(flatten)]
    reference: ReferenceOptions,
    /// The guest
    #[arg(long, value_enum, default_value_t)]
    guest: Guest,
    /// Data lanes of the migration
    #[arg(long, default_value = "1", value_parser = clap::value_parser!(u16).range(1..=128))]
    lanes: u16,
    #[command(flatten)]
    demo: DemoOptions,
}

/// State of the guest that is migrated. None of them writes.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Guest {
    /// Paused and idle, one after the other in every turn
    #[default]
    Both,
    /// Plain memory, paused before the migration
    Paused,
    /// Plain memory that counts as running
    Idle,
    /// A real KVM guest that runs idle (`migrate demo`)
    Kvm,
}

impl Guest {
    fn variants(self) -> Vec<(&'static str, bool)> {
        let all = [("paused", false), ("running idle", true)];
        all.into_iter()
            .filter(|(_, running)| match self {
                Self::Both => true,
                Self::Paused => !running,
                Self::Idle => *running,
                Self::Kvm => false,
            })
            .collect()
    }
}

/// Memory on this side, its fingerprint, and the other process with as much.
pub(super) struct Stage {
    memory: Arc<MappedMemory>,
    fingerprint: u64,
    peer: Peer,
}

impl Stage {
    pub(super) fn new(bytes: u64) -> Result<Self, BenchError> {
        let memory = guest::prefaulted(bytes)?;
        guest::fill_random(&memory, 0x5EED)?;
        let fingerprint = guest::fingerprint(&memory)?;
        let mut peer = Peer::start()?;
        peer.hold(bytes)?;
        Ok(Self { memory, fingerprint, peer })
    }

    fn plain(&mut self, options: &ReferenceOptions) -> Result<Cost, BenchError> {
        copy_plainly(&mut self.peer, &self.memory, self.fingerprint, options.chunk as usize)
    }

    pub(super) fn migration(&mut self, way: Way) -> Result<Cost, BenchError> {
        let (cost, _, received) = migrate(&mut self.peer, &self.memory, way)?;
        check("the migrated memory", &received, self.fingerprint)?;
        Ok(cost)
    }
}

/// `pageferry-bench reference`.
pub(crate) fn reference(options: &ReferenceOptions) -> Result<Outcome, BenchError> {
    let mut outcome = Outcome::new("reference", format!("plain copy of {} GiB over TCP", gib(options.size)));
    let mut stage = Stage::new(options.size)?;
    stage.plain(options)?;
    let costs = (0..options.runs).map(|_| stage.plain(options)).collect::<Result<Vec<_>, _>>()?;
    add(&mut outcome, "read/write", options.size, &costs);
    match (0..options.runs).map(|_| iperf::run(options.size)).collect::<Result<Vec<_>, _>>() {
        Ok(costs) => {
            add(&mut outcome, "iperf3", options.size, &costs);
        }
        Err(reason) => outcome.note(format!("skipped: {reason}")),
    }
    Ok(outcome)
}

/// `pageferry-bench throughput`.
pub(crate) fn throughput(options: &ThroughputOptions) -> Result<Outcome, BenchError> {
    if options.guest == Guest::Kvm {
        return throughput_of_kvm(options);
    }
    let bytes = options.reference.size;
    let about = format!("{} GiB incompressible, {} lane(s), in turn with a plain copy", gib(bytes), options.lanes);
    let mut outcome = Outcome::new("throughput", about);
    let mut stage = Stage::new(bytes)?;
    let variants = options.guest.variants();
    let mut plain = Vec::new();
    let mut migrations = vec![Vec::new(); variants.len()];
    // The first turn only warms up.
    for turn in 0..=options.reference.runs {
        let cost = stage.plain(&options.reference)?;
        plain.extend((turn > 0).then_some(cost));
        for ((_, running), costs) in variants.iter().zip(&mut migrations) {
            let cost = stage.migration(Way { running: *running, lanes: options.lanes, over: Over::Tcp })?;
            costs.extend((turn > 0).then_some(cost));
        }
    }
    let reference = add(&mut outcome, "plain copy", bytes, &plain);
    for ((name, _), costs) in variants.iter().zip(&migrations) {
        let (speed, cpu) = add(&mut outcome, &format!("guest {name}"), bytes, costs);
        outcome.figure(
            format!("guest {name}: of the plain copy"),
            "",
            speed / reference.0,
            Some(Target::AtLeast(LEAST_RATIO)),
        );
        outcome.figure(format!("guest {name}: CPU, both sides"), "s/GiB", cpu, Some(Target::AtMost(MOST_CPU)));
        outcome.figure(format!("guest {name}: CPU over the plain copy's"), "s/GiB", cpu - reference.1, None);
    }
    Ok(outcome)
}

/// The same with a real guest. Its time is that of the rounds: the whole call also contains the
/// pre-faulting of the destination's memory, which happens once the source has said how much it needs.
fn throughput_of_kvm(options: &ThroughputOptions) -> Result<Outcome, BenchError> {
    let bytes = options.reference.size;
    let demo = Demo::new(&options.demo, bytes, Some("zero=0,duplicate=0,text=0,random=100"))?;
    let about = format!("idle KVM guest of {} GiB, incompressible, in turn with a plain copy", gib(bytes));
    let mut outcome = Outcome::new("throughput-kvm", about);
    let mut stage = Stage::new(bytes)?;
    stage.plain(&options.reference)?;
    let (mut plain, mut speeds, mut cpu) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..options.reference.runs {
        plain.push(stage.plain(&options.reference)?);
        let report = demo.run()?;
        speeds.push(gigabytes_per_second(bytes, demo::round_seconds(&report)?));
        cpu.push(demo::number(&report, "/cpu_seconds/source")? / gib(bytes));
    }
    let reference = add(&mut outcome, "plain copy", bytes, &plain);
    let speed = outcome.series("KVM guest: throughput of its rounds", "GB/s", speeds);
    outcome.series("KVM guest: CPU, source", "s/GiB", cpu);
    outcome.figure("KVM guest: of the plain copy", "", speed / reference.0, Some(Target::AtLeast(LEAST_RATIO)));
    outcome.note("the destination's CPU time contains the pre-faulting of its memory: see `throughput` for it");
    Ok(outcome)
}

/// Adds the series of one way to copy; returns the medians of speed and CPU time.
pub(super) fn add(outcome: &mut Outcome, name: &str, bytes: u64, costs: &[Cost]) -> (f64, f64) {
    let all = |part: &dyn Fn(&Cost) -> f64| costs.iter().map(part).collect::<Vec<_>>();
    let speed = outcome.series(format!("{name}: throughput"), "GB/s", all(&|cost| cost.speed(bytes)));
    outcome.series(format!("{name}: CPU, source"), "s/GiB", all(&|cost| cost.source_cpu / gib(bytes)));
    outcome.series(format!("{name}: CPU, destination"), "s/GiB", all(&|cost| cost.destination_cpu / gib(bytes)));
    (speed, median(&all(&|cost| cost.cpu_per_gib(bytes))))
}
