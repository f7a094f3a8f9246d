//! Options that describe the guest.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::units::{rate, size};

/// The guest to start.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Guest")]
pub(crate) struct GuestOptions {
    /// What runs the guest; `auto` takes KVM where the host has it
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub(crate) guest: GuestKind,
    /// Memory of the guest
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "1G")]
    pub(crate) memory: u64,
    /// Virtual CPUs
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=255), default_value = "2")]
    pub(crate) vcpus: u16,
    /// What fills the memory, in per cent
    #[arg(long, value_name = "KIND=PERCENT,...", value_parser = mix, default_value_t)]
    pub(crate) mix: Mix,
    /// Where the content and the order of writes come from; without it, a random one
    #[arg(long, value_name = "NUMBER")]
    pub(crate) seed: Option<u64>,
    /// Memory that the guest goes on writing; without it, an eighth of all
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub(crate) working_set: Option<u64>,
    /// How fast it writes; a page counts in full even if few of its bytes change
    #[arg(long, value_name = "SIZE/s", value_parser = rate, default_value = "20M/s")]
    pub(crate) rate: u64,
    /// Whether a write changes a few bytes of a page or all of it
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub(crate) writes: Writes,
    /// The guest writes nothing once its memory is filled
    #[arg(long, conflicts_with_all = ["rate", "writes", "working_set"])]
    pub(crate) idle: bool,
    /// What stands behind the guest's memory
    #[arg(long, value_name = "KIND", value_enum, default_value_t)]
    pub(crate) backing: Backing,
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
    /// Bytes of memory that the guest goes on writing.
    pub(crate) fn working_set(&self) -> u64 {
        self.working_set.unwrap_or(self.memory / 8).min(self.memory)
    }
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

/// What the guest's writes change.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Writes {
    /// A few bytes of a page
    #[default]
    Few,
    /// Every byte of a page
    Full,
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

impl From<Backing> for pageferry::memory::Backing {
    fn from(backing: Backing) -> Self {
        match backing {
            Backing::Anon => Self::Anonymous,
            Backing::Memfd => Self::Memfd,
            Backing::Huge => Self::HugePages2M,
        }
    }
}

/// Kinds of content in per cent; together 100.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mix {
    pub(crate) zero: u8,
    pub(crate) duplicate: u8,
    pub(crate) text: u8,
    pub(crate) random: u8,
}

impl Default for Mix {
    fn default() -> Self {
        Self { zero: 30, duplicate: 10, text: 40, random: 20 }
    }
}

impl std::fmt::Display for Mix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { zero, duplicate, text, random } = self;
        write!(f, "zero={zero},duplicate={duplicate},text={text},random={random}")
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
    fn a_mix_is_written_the_way_it_is_shown() {
        assert_eq!(mix(&Mix::default().to_string()), Ok(Mix::default()));
        assert_eq!(mix("random=100"), Ok(Mix { zero: 0, duplicate: 0, text: 0, random: 100 }));
        assert_eq!(mix("zero=25%,random=75%").map(|mix| mix.zero), Ok(25));
    }

    #[test]
    fn a_mix_adds_up_to_100_and_names_known_kinds() {
        assert_eq!(mix("zero=200,random=100"), Err(MixError::Sum(300)));
        assert!(matches!(mix("sand=100"), Err(MixError::Part(part)) if part == "sand=100"));
        assert!(mix("").is_err());
    }
}
