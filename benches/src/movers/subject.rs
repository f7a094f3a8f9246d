//! What is migrated: memory that stands still, or a machine that goes on writing.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use crate::report::words::INCOMPRESSIBLE;
use crate::study::{Guest, Writes};

/// The device that runs guests.
const KVM: &str = "/dev/kvm";

/// The seed of all content, so that every mover moves the same bytes.
const SEED: &str = "1";

/// What guests that change a few bytes a page do it to.
const FEW_SET: u64 = 128 << 20;

/// What guests that rewrite whole pages do it to.
const FULL_SET: u64 = 256 << 20;

/// No more of a small guest is written than this part of it.
const LARGEST_PART: u64 = 4;

/// A guest, and how much memory it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Subject {
    pub(crate) memory: Memory,
    pub(crate) bytes: u64,
}

/// What is in a guest's memory and what becomes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Memory {
    /// Never written.
    Still(Content),
    /// Never written, from a file.
    Image(PathBuf),
    /// A running guest.
    Running(Content, Load),
}

/// What memory holds at first.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Content {
    /// Contents of real guests differ; this mix is between a fresh server and a busy one.
    Mix,
    /// Incompressible.
    Random,
}

impl Content {
    /// What `migrate --mix` calls it.
    pub(crate) fn mix(self) -> &'static str {
        match self {
            Self::Mix => "zero=30,duplicate=10,text=40,random=20",
            Self::Random => "random=100",
        }
    }
}

/// What a running guest does; rates in MiB of pages per second.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Load {
    Idle,
    /// Changes a few bytes a page.
    Few(u32),
    /// Rewrites whole pages.
    Full(u32),
}

impl Load {
    fn rate(self) -> u64 {
        match self {
            Self::Idle => 0,
            Self::Few(mebibytes) | Self::Full(mebibytes) => u64::from(mebibytes) << 20,
        }
    }
}

impl Memory {
    pub(crate) const MIX: Self = Self::Still(Content::Mix);
    pub(crate) const RANDOM: Self = Self::Still(Content::Random);
    pub(crate) const IDLE: Self = Self::Running(Content::Mix, Load::Idle);
    pub(crate) const FEW20: Self = Self::Running(Content::Mix, Load::Few(20));

    /// Whether a machine runs in it.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self, Self::Running(..))
    }

    /// What it holds; a file's content is its own.
    pub(crate) fn content(&self) -> Option<Content> {
        match self {
            Self::Still(content) | Self::Running(content, _) => Some(*content),
            Self::Image(_) => None,
        }
    }

    /// Whether nothing of it can be packed, and nothing has to be sent twice.
    pub(crate) fn is_incompressible(&self) -> bool {
        self.content() == Some(Content::Random) && self.load() == Load::Idle
    }

    fn load(&self) -> Load {
        if let Self::Running(_, load) = self { *load } else { Load::Idle }
    }
}

/// Why this user may not start a running guest, although this machine has KVM; without KVM a process guest takes its place.
pub(crate) fn forbidden_kvm() -> Option<String> {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(KVM);
    let refused = opened.err().filter(|error| error.kind() != std::io::ErrorKind::NotFound)?;
    Some(format!("access to {KVM} ({refused}; its group is `kvm`: usermod -aG kvm USER)"))
}

impl Subject {
    /// How `migrate send` is asked for this guest.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let bytes = self.bytes;
        let content = match &self.memory {
            Memory::Image(file) => {
                return vec!["--guest".into(), "process".into(), "--image".into(), file.to_string_lossy().into_owned()];
            }
            Memory::Still(content) | Memory::Running(content, _) => content.mix(),
        };
        let machine = if self.memory.is_running() { "auto --vcpus 1" } else { "process" };
        let writes = match self.memory.load() {
            Load::Idle => "--idle".to_owned(),
            Load::Few(rate) => format!("--rate {rate}M/s --writes few --working-set {}", self.working_set()),
            Load::Full(rate) => format!("--rate {rate}M/s --writes full --working-set {}", self.working_set()),
        };
        let text = format!("--memory {bytes} --mix {content} --seed {SEED} --guest {machine} {writes}");
        text.split(' ').map(str::to_owned).collect()
    }

    /// Over how many bytes the writes go.
    fn working_set(&self) -> u64 {
        let whole = match self.memory.load() {
            Load::Idle => 0,
            Load::Few(_) => FEW_SET,
            Load::Full(_) => FULL_SET,
        };
        whole.min(self.bytes / LARGEST_PART)
    }

    /// What a record says of it.
    pub(crate) fn facts(&self) -> Guest {
        let content = match self.memory.content() {
            Some(Content::Mix) => "30 % zero pages, 10 % duplicates, 40 % text-like, 20 % incompressible",
            Some(Content::Random) => INCOMPRESSIBLE,
            None => "a memory image",
        };
        let load = self.memory.load();
        Guest {
            name: self.memory.to_string(),
            bytes: self.bytes,
            content: content.to_owned(),
            writes: match load {
                Load::Idle => Writes::Idle,
                Load::Few(_) => Writes::FewBytes,
                Load::Full(_) => Writes::WholePages,
            },
            dirty_bytes_per_second: load.rate(),
            working_set: self.working_set(),
            runs: self.memory.is_running(),
        }
    }
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is none of mix, random (still), idle, few20, full200 (running, MiB/s), or random-idle ..."
            )
        };
        match text {
            "mix" => return Ok(Self::Still(Content::Mix)),
            "random" => return Ok(Self::Still(Content::Random)),
            _ => {}
        }
        let (content, load) = match text.strip_prefix("random-") {
            Some(load) => (Content::Random, load),
            None => (Content::Mix, text),
        };
        let rate = |digits: &str| digits.parse::<u32>().ok().filter(|rate| *rate > 0).ok_or_else(wrong);
        let load = match (load.strip_prefix("few"), load.strip_prefix("full")) {
            _ if load == "idle" => Load::Idle,
            (Some(digits), _) => Load::Few(rate(digits)?),
            (_, Some(digits)) => Load::Full(rate(digits)?),
            _ => return Err(wrong()),
        };
        Ok(Self::Running(content, load))
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (content, load) = match self {
            Self::Still(Content::Mix) => return f.write_str("mix"),
            Self::Still(Content::Random) => return f.write_str("random"),
            Self::Image(file) => return write!(f, "{}", file.file_name().unwrap_or_default().display()),
            Self::Running(content, load) => (content, load),
        };
        if *content == Content::Random {
            f.write_str("random-")?;
        }
        match load {
            Load::Idle => f.write_str("idle"),
            Load::Few(rate) => write!(f, "few{rate}"),
            Load::Full(rate) => write!(f, "full{rate}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subject(name: &str, bytes: u64) -> Subject {
        Subject { memory: name.parse().unwrap(), bytes }
    }

    #[test]
    fn guests_have_names() {
        for name in ["mix", "random", "idle", "few20", "full200", "full60", "random-idle", "random-few5"] {
            assert_eq!(name.parse::<Memory>().unwrap().to_string(), name);
        }
        let image = Memory::Image("/tmp/debian.ram".into());
        assert_eq!((image.to_string().as_str(), image.is_running()), ("debian.ram", false));
        for wrong in ["blue", "few", "full0", "few-1", "random-", "random-mix", "idle20", "few99999999999"] {
            assert!(wrong.parse::<Memory>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn only_running_guests_write_and_not_all_of_their_memory() {
        let arguments = |name, bytes| subject(name, bytes).arguments().join(" ");
        assert!(arguments("few20", 1 << 30).ends_with("--rate 20M/s --writes few --working-set 134217728"));
        assert!(arguments("full60", 1 << 30).ends_with("--rate 60M/s --writes full --working-set 268435456"));
        assert!(arguments("full60", 64 << 20).ends_with("--working-set 16777216"));
        for name in ["mix", "random", "idle"] {
            assert!(arguments(name, 1 << 30).ends_with("--idle"));
        }
        assert!(arguments("random", 1 << 30).contains("--mix random=100 "));
        let image = Subject { memory: Memory::Image("a b".into()), bytes: 1 << 30 };
        assert!(image.arguments().join(" ").ends_with("--image a b"));
    }

    #[test]
    fn facts_say_what_the_guest_is_told() {
        let facts = subject("random-full200", 1 << 30).facts();
        assert_eq!((facts.dirty_bytes_per_second, facts.working_set), (200 << 20, 256 << 20));
        assert!(facts.runs && facts.writes == Writes::WholePages && facts.content == "incompressible");
        assert!(!subject("mix", 1 << 30).facts().runs);
    }
}
