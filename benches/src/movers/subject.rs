//! What is migrated: memory that stands still, or a machine that goes on writing.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// The seed of all content, so that every mover moves the same bytes.
const SEED: &str = "1";

/// Contents of real guests differ; this mix is between a fresh server and a busy one.
const MIXED: &str = "zero=30,duplicate=10,text=40,random=20";
const RANDOM: &str = "random=100";

/// A guest, and how much memory it has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Subject {
    pub(crate) memory: Memory,
    pub(crate) bytes: u64,
}

/// What is in a guest's memory and what becomes of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Memory {
    /// Never written, of mixed contents.
    Mix,
    /// Never written, incompressible.
    Random,
    /// Never written, from a file.
    Image(PathBuf),
    /// A running guest of mixed contents that writes nothing.
    Idle,
    /// A running guest that changes a few bytes a page, 20 MiB/s over 128 MiB.
    Few20,
    /// A running guest that rewrites whole pages, 200 MiB/s over 256 MiB.
    Full200,
}

impl Memory {
    /// Whether a machine runs in it.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self, Self::Idle | Self::Few20 | Self::Full200)
    }

    /// What `migrate` calls the contents; a file has none.
    pub(crate) fn mix(&self) -> &'static str {
        if *self == Self::Random { RANDOM } else { MIXED }
    }
}

impl Subject {
    /// How `migrate send` is asked for this guest.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let bytes = self.bytes;
        if let Memory::Image(file) = &self.memory {
            return vec!["--guest".into(), "process".into(), "--image".into(), file.to_string_lossy().into_owned()];
        }
        let mut text = format!("--memory {bytes} --mix {} --seed {SEED}", self.memory.mix());
        text += if self.memory.is_running() { " --guest auto --vcpus 1" } else { " --guest process" };
        text += match self.memory {
            Memory::Few20 => " --rate 20M/s --writes few --working-set 128M",
            Memory::Full200 => " --rate 200M/s --writes full --working-set 256M",
            _ => " --idle",
        };
        text.split(' ').map(str::to_owned).collect()
    }
}

impl FromStr for Memory {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "mix" => Self::Mix,
            "random" => Self::Random,
            "idle" => Self::Idle,
            "few20" => Self::Few20,
            "full200" => Self::Full200,
            _ => return Err(format!("{text:?} is none of mix, random, idle, few20, full200")),
        })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mix => "mix",
            Self::Random => "random",
            Self::Idle => "idle",
            Self::Few20 => "few20",
            Self::Full200 => "full200",
            Self::Image(file) => return write!(f, "{}", file.file_name().unwrap_or_default().display()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_have_names() {
        for name in ["mix", "random", "idle", "few20", "full200"] {
            assert_eq!(name.parse::<Memory>().unwrap().to_string(), name);
        }
        let image = Memory::Image("/tmp/debian.ram".into());
        assert_eq!((image.to_string().as_str(), image.is_running()), ("debian.ram", false));
        assert!("blue".parse::<Memory>().is_err());
    }

    #[test]
    fn only_running_guests_write() {
        let arguments = |memory| Subject { memory, bytes: 1 << 30 }.arguments().join(" ");
        assert!(arguments(Memory::Few20).ends_with("--rate 20M/s --writes few --working-set 128M"));
        for memory in [Memory::Mix, Memory::Random, Memory::Idle] {
            assert!(arguments(memory).ends_with("--idle"));
        }
        assert!(arguments(Memory::Random).contains("--mix random=100 "));
        assert!(arguments(Memory::Image("a b".into())).ends_with("--image a b"));
    }
}
