//! Options that describe the guest.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::units::{UnitError, rate, show_bytes, show_count, show_rate, size};
use crate::process_guest::Tracking;
use crate::workload::params::{self as workload, Mix, Params, Rate};

const DEFAULT_MEMORY: u64 = 1 << 30;

const DEFAULT_MIX: &str = "zero=30,duplicate=10,text=40,random=20";

/// The guest to start.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Guest")]
pub(crate) struct GuestOptions {
    /// What runs the guest; `auto` takes KVM where the host has it
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub(crate) guest: GuestKind,
    /// Who keeps the record of the pages that a process guest writes; `auto` leaves it to the kernel where it can
    #[arg(long, value_name = "WHO", value_enum, default_value_t)]
    pub(crate) tracker: Tracker,
    /// Memory of the guest; without it, 1G or what the image needs
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) memory: Option<u64>,
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=254), default_value = "2")]
    pub(crate) vcpus: u32,
    /// What fills the memory, in per cent
    #[arg(long, value_name = "KIND=PERCENT,...", value_parser = mix, default_value = DEFAULT_MIX)]
    pub(crate) mix: Mix,
    /// Fill the memory from this flat image of a machine's physical memory; such a guest is a process guest that
    /// writes nothing, and checks its memory by a hash of the file
    #[arg(long, value_name = "FILE", conflicts_with_all = ["mix", "seed", "rate", "writes", "working_set"])]
    pub(crate) image: Option<PathBuf>,
    /// Write the zero pages too, so that they exist; without it they are never touched
    #[arg(long)]
    pub(crate) touch_zero: bool,
    /// Where the content and the order of writes come from; without it, a random one
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,
    /// Memory that the guest goes on writing; without it, an eighth of all
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) working_set: Option<u64>,
    /// How fast it writes, or `max`; a page counts in full even if few of its bytes change
    #[arg(long, value_name = "SIZE/s", value_parser = write_rate, default_value = "20M/s")]
    pub(crate) rate: Rate,
    /// Whether a write changes a few bytes of a page or all of it
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub(crate) writes: Writes,
    /// The guest writes nothing once its memory is filled
    #[arg(long, conflicts_with_all = ["rate", "writes", "working_set"])]
    pub(crate) idle: bool,
    /// What stands behind the guest's memory
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub(crate) backing: Backing,
    /// Start the guest even if the host has less memory than it could touch
    #[arg(long)]
    pub(crate) overcommit: bool,
    /// Boot this kernel (PVH or 64-bit ELF, or bzImage) instead of the built-in guest program
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: Option<PathBuf>,
    /// The kernel's initial RAM disk
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", requires = "kernel")]
    pub(crate) cmdline: Option<String>,
}

impl GuestOptions {
    /// Bytes of memory of a guest that is not made of an image.
    pub(crate) fn memory(&self) -> u64 {
        self.memory.unwrap_or(DEFAULT_MEMORY)
    }

    /// The workload's own words for these choices.
    pub(crate) fn params(&self) -> Params {
        Params {
            mix: self.mix,
            seed: self.seed.unwrap_or_else(random_seed),
            working_set: self.working_set.unwrap_or(self.memory() / 8).min(self.memory()),
            rate: if self.idle || self.image.is_some() { Rate::BytesPerSecond(0) } else { self.rate },
            writes: self.writes.into(),
            touch_zero: self.touch_zero,
            used_ram: false,
            vcpus: self.vcpus,
            ..Params::default()
        }
    }

    /// The guest in words.
    pub(crate) fn describe(&self, params: &Params) -> String {
        let (memory, working_set) = (show_bytes(self.memory()), show_bytes(params.working_set));
        let writes = match params.rate {
            Rate::BytesPerSecond(0) => "writes nothing".to_owned(),
            Rate::BytesPerSecond(rate) => format!("writes {} over {working_set}", show_rate(rate as f64)),
            Rate::Max => format!("writes as fast as it can over {working_set}"),
        };
        let whole = if params.writes == workload::Writes::Full { "whole pages" } else { "a few bytes a page" };
        format!("{memory}, {}, {writes} ({whole}), seed {}", show_count(self.vcpus, "vCPU"), params.seed)
    }
}

/// Random enough to be another one in every run; printed, so that a run can be repeated.
fn random_seed() -> u64 {
    RandomState::new().build_hasher().finish() >> 16
}

/// What runs the guest.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum GuestKind {
    /// KVM, or a process guest where the host has no /dev/kvm
    #[default]
    Auto,
    /// A real virtual machine
    Kvm,
    /// Threads of this program that write a memory mapping
    Process,
}

/// Who keeps the record of the pages written.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Tracker {
    /// The kernel, or this program where the kernel is older than Linux 6.7
    #[default]
    Auto,
    /// The kernel
    Kernel,
    /// This program: the first write to a page is a fault that it handles (Linux 5.19)
    Faults,
}

impl Tracker {
    /// The choice on this host.
    pub(crate) fn tracking(self) -> Tracking {
        match self {
            Self::Auto => Tracking::of_this_host(),
            Self::Kernel => Tracking::Kernel,
            Self::Faults => Tracking::Faults,
        }
    }
}

/// What the guest's writes change.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Writes {
    /// A few bytes of a page
    #[default]
    Few,
    /// Every byte of a page
    Full,
}

impl From<Writes> for workload::Writes {
    fn from(writes: Writes) -> Self {
        match writes {
            Writes::Few => Self::Few,
            Writes::Full => Self::Full,
        }
    }
}

/// What stands behind guest memory.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Backing {
    /// Private anonymous memory
    #[default]
    Anon,
    /// A memfd, mapped shared
    Memfd,
    /// Huge pages of 2 MiB from the host's reserved pool
    Huge,
}

impl Backing {
    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Anon => "anon",
            Self::Memfd => "memfd",
            Self::Huge => "huge",
        }
    }
}

impl From<Backing> for pageferry::memory::Backing {
    fn from(backing: Backing) -> Self {
        match backing {
            Backing::Anon => Self::Anonymous,
            Backing::Memfd => Self::Memfd,
            Backing::Huge => Self::HugePages2M,
        }
    }
}

/// Why a mix could not be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum MixError {
    #[error("{0:?} is not KIND=PERCENT; kinds are zero, duplicate, text and random")]
    Part(String),
    #[error("the parts add up to {0} per cent, not 100")]
    Sum(u32),
}

fn write_rate(text: &str) -> Result<Rate, UnitError> {
    if text == "max" { Ok(Rate::Max) } else { rate(text).map(Rate::BytesPerSecond) }
}

fn mix(text: &str) -> Result<Mix, MixError> {
    let mut mix = Mix { zero: 0, duplicate: 0, text: 0, random: 0 };
    for part in text.split(',') {
        let unknown = || MixError::Part(part.to_owned());
        let (kind, percent) = part.split_once('=').ok_or_else(unknown)?;
        let percent = percent.trim_end_matches('%').parse().map_err(|_| unknown())?;
        *match kind.trim() {
            "zero" => &mut mix.zero,
            "duplicate" | "dup" => &mut mix.duplicate,
            "text" => &mut mix.text,
            "random" => &mut mix.random,
            _ => return Err(unknown()),
        } = percent;
    }
    let sum = [mix.zero, mix.duplicate, mix.text, mix.random].into_iter().map(u32::from).sum();
    if sum == 100 { Ok(mix) } else { Err(MixError::Sum(sum)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mix_names_its_kinds() {
        assert_eq!(mix(DEFAULT_MIX), Ok(Params::default().mix));
        assert_eq!(mix("random=100"), Ok(Mix { zero: 0, duplicate: 0, text: 0, random: 100 }));
        assert_eq!(mix("zero=25%,dup=75").map(|mix| (mix.zero, mix.duplicate)), Ok((25, 75)));
    }

    #[test]
    fn the_fastest_rate_has_a_name() {
        assert_eq!(write_rate("max"), Ok(Rate::Max));
        assert_eq!(write_rate("1M/s"), Ok(Rate::BytesPerSecond(1 << 20)));
    }

    #[test]
    fn a_mix_adds_up_to_100_and_names_known_kinds() {
        assert_eq!(mix("zero=200,random=100"), Err(MixError::Sum(300)));
        assert!(matches!(mix("sand=100"), Err(MixError::Part(part)) if part == "sand=100"));
        assert!(mix("").is_err());
    }
}
