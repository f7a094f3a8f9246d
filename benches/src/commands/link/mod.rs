//! Whole migrations over a shaped link, ours in turn with others'.

mod summary;

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use self::summary::{Key, Runs};
use super::{gib, size};
use crate::movers::{Memory, Moved, Mover, Ours, Qemu, QemuSetting, Setting, Subject, Task, migrate_program};
use crate::network::{self, Network, Rate};
use crate::outcome::Outcome;
use crate::scratch::Scratch;
use crate::{BenchError, interrupt};

const EXAMPLES: &str = "\
Guests: mix (30 % zero, 10 % duplicate, 40 % text-like, 20 % random pages), random, image=FILE: memory that nobody writes;
idle, few20 (a few bytes a page, 20 MiB/s over 128 MiB), full200 (whole pages, 200 MiB/s over 256 MiB): running guests of that mix.

Examples:
  pageferry-bench link --rate 100mbit,1gbit
  pageferry-bench link --rate 1gbit --guest mix,image=debian.ram --qemu multifd-2-zstd,plain
  pageferry-bench link --guest few20,idle --ours two='--lanes 2' --ours one='--lanes 1' --baseline one

Exit codes: 0 measured, 1 failed, 3 this machine cannot measure it, 130 interrupted";

/// `pageferry-bench link`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LinkOptions {
    /// Links to measure on, such as 50mbit, 1gbit, unshaped
    #[arg(long, value_delimiter = ',', default_value = "1gbit")]
    rate: Vec<Rate>,
    /// Guests to move
    #[arg(long, value_delimiter = ',', default_value = "mix")]
    guest: Vec<Memory>,
    /// Memory of a guest; an image's is its own
    #[arg(long, value_parser = size, default_value = "1G")]
    size: u64,
    /// How often; medians are reported
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// `migrate` with these arguments for `send` (and after ` -- ` for `receive`) under this name; repeat it to compare
    #[arg(long, value_name = "NAME=ARGUMENTS", default_value = "ours", allow_hyphen_values = true)]
    ours: Vec<Setting>,
    /// QEMU in these settings: plain, xbzrle, multifd-CHANNELS, multifd-CHANNELS-zstd (level 1)
    #[arg(long, value_name = "SETTING", value_delimiter = ',')]
    qemu: Vec<QemuSetting>,
    /// The one that the others are divided by; without it, the first
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,
    /// Seconds after which a migration is given up
    #[arg(long, value_name = "SECONDS", default_value = "240")]
    limit: u64,
    /// Length of the iperf3 test in every turn
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = clap::value_parser!(u32).range(1..=600))]
    goodput_seconds: u32,
    /// The `migrate` program; without it, the one beside this program
    #[arg(long, value_name = "FILE")]
    migrate: Option<PathBuf>,
}

/// Everything that a run compares.
#[derive(Debug)]
struct Plan {
    rates: Vec<Rate>,
    subjects: Vec<Subject>,
    movers: Vec<Box<dyn Mover>>,
    turns: u32,
    limit: Duration,
    goodput_seconds: u32,
}

/// `pageferry-bench link`.
pub(crate) fn link(options: &LinkOptions) -> Result<Outcome, BenchError> {
    let plan = Plan::new(options)?;
    plan.check_machine()?;
    interrupt::listen()?;
    let about = format!("migrations of up to {} GiB, {} turn(s)", gib(plan.most_memory()), plan.turns);
    let mut outcome = Outcome::new("link", about);
    let runs = plan.run()?;
    runs.summarise(&mut outcome, options.baseline.as_deref());
    Ok(outcome)
}

impl Plan {
    fn new(options: &LinkOptions) -> Result<Self, BenchError> {
        let program = migrate_program(options.migrate.as_deref());
        let ours = options.ours.iter().map(|setting| boxed(Ours::new(program.clone(), setting.clone())));
        let qemu = options.qemu.iter().map(|setting| boxed(Qemu::new(program.clone(), setting.clone())));
        Ok(Self {
            rates: options.rate.clone(),
            subjects: options.guest.iter().map(|memory| subject(memory, options.size)).collect::<Result<_, _>>()?,
            movers: qemu.chain(ours).collect(),
            turns: options.runs,
            limit: Duration::from_secs(options.limit),
            goodput_seconds: options.goodput_seconds,
        })
    }

    fn most_memory(&self) -> u64 {
        self.subjects.iter().map(|subject| subject.bytes).max().unwrap_or(0)
    }

    fn check_machine(&self) -> Result<(), BenchError> {
        let mut missing = network::missing();
        missing.extend(self.movers.iter().flat_map(|mover| mover.missing(&self.subjects)));
        missing.sort();
        missing.dedup();
        if missing.is_empty() { Ok(()) } else { Err(BenchError::Lacking(missing)) }
    }

    fn run(&self) -> Result<Runs, BenchError> {
        let (scratch, mut runs) = (Scratch::new()?, Runs::default());
        for &rate in &self.rates {
            let network = Network::new(rate)?;
            for turn in 1..=self.turns {
                let goodput = network.goodput(self.goodput_seconds)?;
                eprintln!("{rate}, turn {turn} of {}: iperf3 {:.1} Mbit/s", self.turns, goodput * 8.0 / 1e6);
                runs.add_goodput(rate, goodput);
                for subject in &self.subjects {
                    self.turn(&network, subject, &scratch, &mut runs)?;
                }
            }
        }
        Ok(runs)
    }

    fn turn(&self, network: &Network, subject: &Subject, scratch: &Scratch, runs: &mut Runs) -> Result<(), BenchError> {
        for mover in &self.movers {
            let moved = mover.run(Task { network, subject, scratch, limit: self.limit })?;
            let key = Key::new(network.rate(), &subject.memory, mover.name());
            eprintln!("  {key}: {}", in_words(&moved));
            runs.add(key, moved);
        }
        Ok(())
    }
}

fn boxed(mover: impl Mover + 'static) -> Box<dyn Mover> {
    Box::new(mover)
}

fn in_words(moved: &Moved) -> String {
    let end = if moved.converged { "" } else { ", NOT converged" };
    format!("{:.2} s, {:.1} MiB on the wire{end}", moved.seconds, moved.wire_bytes as f64 / f64::from(1 << 20))
}

/// The guest with its size: an image's is the file's, in whole large pages.
fn subject(memory: &Memory, bytes: u64) -> Result<Subject, BenchError> {
    const LARGE_PAGE: u64 = 2 << 20;
    let bytes = match memory {
        Memory::Image(file) => {
            let held = std::fs::metadata(file)
                .map_err(|error| BenchError::Tool(format!("cannot read {}: {error}", file.display())))?;
            held.len().next_multiple_of(LARGE_PAGE)
        }
        _ => bytes,
    };
    Ok(Subject { memory: memory.clone(), bytes })
}
