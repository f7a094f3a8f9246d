//! Whole migrations over a shaped link, ours in turn with others'.

mod goals;
mod presets;
mod summary;

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;

use self::goals::Goal;
use self::presets::{Case, PLAIN, Preset, is_compressing_qemu};
use self::summary::{Key, Runs};
use super::{gib, size};
use crate::movers::{Memory, Moved, Mover, Ours, Qemu, QemuSetting, Setting, Subject, Task, migrate_program};
use crate::network::{self, Network, Rate};
use crate::outcome::Outcome;
use crate::scratch::Scratch;
use crate::{BenchError, interrupt};

const EXAMPLES: &str = "\
Guests: mix (30 % zero, 10 % duplicate, 40 % text-like, 20 % random pages) and random are memory that nobody writes, like every
--image; idle, few20 (a few bytes a page, 20 MiB/s over 128 MiB), full200 (whole pages, 200 MiB/s over 256 MiB) run.

Examples:
  pageferry-bench link --preset bytes --image plain.img --image duplicates.img   (benches/images makes these)
  pageferry-bench link --rate 1gbit --guest mix,idle --qemu multifd-2-zstd,plain
  pageferry-bench link --guest few20 --ours two='--lanes 2' --ours one='--lanes 1' --baseline one

Exit codes: 0 measured, 1 failed, 3 this machine cannot measure it, 130 interrupted";

/// `pageferry-bench link`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct LinkOptions {
    /// A question with its links, guests and movers, and the answers that are wanted; options change its parts
    #[arg(long, value_enum)]
    preset: Option<Preset>,
    /// Links to measure on, such as 50mbit, 1gbit, unshaped [default: 1gbit]
    #[arg(long, value_delimiter = ',')]
    rate: Vec<Rate>,
    /// Guests to move [default: mix, if there is no --image]
    #[arg(long, value_delimiter = ',')]
    guest: Vec<Memory>,
    /// A guest whose memory is this file, from address 0
    #[arg(long, value_name = "FILE")]
    image: Vec<PathBuf>,
    /// Memory of a guest; an image's is its own [default: 1G]
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// How often; medians are reported
    #[arg(long, default_value = "3", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// `migrate` with these arguments for `send` (and after ` -- ` for `receive`) under this name; repeat it to compare
    #[arg(long, value_name = "NAME=ARGUMENTS")]
    ours: Vec<Setting>,
    /// QEMU in these settings: plain, xbzrle, multifd-CHANNELS, multifd-CHANNELS-zstd (level 1)
    #[arg(long, value_name = "SETTING", value_delimiter = ',')]
    qemu: Vec<QemuSetting>,
    /// The one that the others are divided by; without it, the first QEMU with zstd, or else the first of all
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
    preset: Option<Preset>,
    baseline: Option<String>,
    rates: Vec<Rate>,
    subjects: Vec<Subject>,
    movers: Vec<Box<dyn Mover>>,
    turns: u32,
    limit: Duration,
    goodput_seconds: u32,
}

/// `pageferry-bench link`.
pub(crate) fn link(options: &LinkOptions) -> Result<Outcome, BenchError> {
    interrupt::listen()?;
    let plan = Plan::new(options)?;
    plan.check_machine()?;
    let about = format!("migrations of up to {} GiB, {} turn(s)", gib(plan.most_memory()), plan.turns);
    let mut outcome = Outcome::new(plan.name(), about);
    let runs = plan.run()?;
    runs.summarise(&mut outcome, plan.baseline());
    plan.goals().iter().for_each(|goal| goal.judge(&runs, &mut outcome));
    if let Some(note) = plan.preset.and_then(|preset| preset.note(&plan)) {
        outcome.note(note);
    }
    Ok(outcome)
}

impl Plan {
    fn new(options: &LinkOptions) -> Result<Self, BenchError> {
        let defaults = options.preset.map_or(PLAIN, Preset::defaults);
        let program = migrate_program(options.migrate.as_deref());
        let ours = chosen(&options.ours, defaults.ours)?;
        let qemu = chosen(&options.qemu, defaults.qemu)?;
        let ours = ours.into_iter().map(|setting| boxed(Ours::new(program.clone(), setting)));
        let qemu = qemu.into_iter().map(|setting| boxed(Qemu::new(program.clone(), setting)));
        let bytes = options.size.unwrap_or(defaults.mebibytes << 20);
        let plan = Self {
            preset: options.preset,
            baseline: options.baseline.clone(),
            rates: chosen(&options.rate, defaults.rates)?,
            subjects: subjects(options, defaults.guests, bytes)?,
            movers: qemu.chain(ours).collect(),
            turns: options.runs,
            limit: Duration::from_secs(options.limit),
            goodput_seconds: options.goodput_seconds,
        };
        plan.check_names()?;
        Ok(plan)
    }

    /// What is told apart by name must have different names.
    fn check_names(&self) -> Result<(), BenchError> {
        let movers: Vec<&str> = self.movers.iter().map(|mover| mover.name()).collect();
        let guests: Vec<String> = self.subjects.iter().map(|subject| subject.memory.to_string()).collect();
        let names = movers.iter().map(|name| (*name).to_owned());
        if let Some(name) = first_repeated(names).or_else(|| first_repeated(guests)) {
            return Err(BenchError::Tool(format!("two of what is compared are called {name:?}")));
        }
        match &self.baseline {
            Some(name) if !movers.contains(&name.as_str()) => {
                Err(BenchError::Tool(format!("the baseline {name:?} is none of {}", movers.join(", "))))
            }
            _ => Ok(()),
        }
    }

    /// The mover that others are divided by.
    fn baseline(&self) -> Option<&str> {
        let mut movers = self.movers.iter().map(|mover| mover.name());
        self.baseline.as_deref().or_else(|| movers.find(|name| is_compressing_qemu(name)))
    }

    /// What its record is called.
    fn name(&self) -> &'static str {
        match self.preset {
            None => "link",
            Some(Preset::Bytes) => "link-bytes",
            Some(Preset::Gigabit) => "link-gigabit",
            Some(Preset::Fewbytes) => "link-fewbytes",
            Some(Preset::Auto) => "link-auto",
            Some(Preset::Memory) => "link-memory",
            Some(Preset::Transports) => "link-transports",
        }
    }

    /// Every guest over every link.
    fn cases(&self) -> impl Iterator<Item = Case<'_>> {
        let movers: Vec<&str> = self.movers.iter().map(|mover| mover.name()).collect();
        let pairs = self.rates.iter().flat_map(|rate| self.subjects.iter().map(move |subject| (rate, subject)));
        pairs.map(move |(rate, subject)| Case { rate: rate.to_string(), subject, movers: movers.clone() })
    }

    fn goals(&self) -> Vec<Goal> {
        self.preset.map(|preset| preset.goals(self)).unwrap_or_default()
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

fn first_repeated(names: impl IntoIterator<Item = String>) -> Option<String> {
    let mut seen = std::collections::HashSet::new();
    names.into_iter().find(|name| !seen.insert(name.clone()))
}

/// What the command line says, or else the default.
fn chosen<T: FromStr<Err = String> + Clone>(given: &[T], default: &[&str]) -> Result<Vec<T>, BenchError> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    default.iter().map(|text| text.parse()).collect::<Result<_, _>>().map_err(BenchError::Tool)
}

/// The guests with their sizes: an image's is the file's, in whole large pages.
fn subjects(options: &LinkOptions, default: &[&str], bytes: u64) -> Result<Vec<Subject>, BenchError> {
    const LARGE_PAGE: u64 = 2 << 20;
    let default = if options.preset.is_none() && !options.image.is_empty() { &[] } else { default };
    let named = chosen(&options.guest, default)?.into_iter().map(|memory| Ok(Subject { memory, bytes }));
    let images = options.image.iter().map(|file| {
        let held = std::fs::metadata(file)
            .map_err(|error| BenchError::Tool(format!("cannot read {}: {error}", file.display())))?;
        Ok(Subject { memory: Memory::Image(file.clone()), bytes: held.len().next_multiple_of(LARGE_PAGE) })
    });
    named.chain(images).collect()
}

#[cfg(test)]
mod tests {
    use clap::{Parser, ValueEnum};

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: LinkOptions,
    }

    fn try_plan(arguments: &str) -> Result<Plan, BenchError> {
        let line = Line::parse_from(std::iter::once("link").chain(arguments.split_whitespace()));
        Plan::new(&line.options)
    }

    fn plan(arguments: &str) -> Plan {
        try_plan(arguments).unwrap()
    }

    #[test]
    fn the_baseline_is_a_qemu_that_compresses_or_what_was_asked_for() {
        assert_eq!(plan("--qemu plain,multifd-4-zstd").baseline(), Some("qemu-multifd-4-zstd"));
        assert_eq!(plan("--qemu multifd-4-zstd --baseline ours").baseline(), Some("ours"));
        assert_eq!(plan("--ours a --ours b").baseline(), None);
        for wrong in ["--baseline theirs", "--ours a --ours a", "--guest mix,mix", "--qemu plain,plain"] {
            assert!(try_plan(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn presets_fill_in_what_the_command_line_leaves_open() {
        let all = [Preset::Bytes, Preset::Gigabit, Preset::Fewbytes, Preset::Auto];
        for name in all.map(|preset| preset.to_possible_value().unwrap().get_name().to_owned()) {
            let plan = plan(&format!("--preset {name}"));
            assert!(!plan.goals().is_empty(), "{name}");
        }
        let plan = plan("--preset auto --rate 1gbit --size 64M");
        assert_eq!((plan.rates.len(), plan.most_memory(), plan.movers.len()), (1, 64 << 20, 6));
        assert_eq!(plan.goals().len(), 2);
    }

    #[test]
    fn an_image_stands_alone_unless_a_preset_or_guests_are_asked_for() {
        let image = std::env::current_exe().unwrap();
        let guests = |arguments: &str| plan(&format!("{arguments} --image {}", image.display())).subjects.len();
        assert_eq!((guests(""), guests("--guest mix,idle"), guests("--preset bytes")), (1, 3, 3));
        let plan = plan(&format!("--image {}", image.display()));
        let held = std::fs::metadata(&image).unwrap().len();
        assert!(plan.most_memory() >= held && plan.most_memory().is_multiple_of(2 << 20));
    }
}
