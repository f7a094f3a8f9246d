//! Questions with one command each: what is run for them, and what the answers are to be.

use std::path::Path;

use clap::ValueEnum;
use pageferry::transport::Capabilities;
use pageferry::{DestinationConfig, SourceConfig};

use super::Plan;
use super::goals::{Goal, Quantity};
use super::summary::Key;
use crate::movers::{Memory, QEMU_PREFIX, Subject};

/// A question.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Preset {
    /// How many bytes are sent, of QEMU's with zstd and of the memory itself
    Bytes,
    /// How fast 1 Gbit/s is used up, and how much sooner a guest has moved than by QEMU
    Gigabit,
    /// Whether a guest that changes a few bytes a page moves as fast as an idle one at 100 Mbit/s
    Fewbytes,
    /// Whether `--compress auto` finds what is best on each link
    Auto,
    /// What the transports make of a link when nothing can be packed
    Transports,
    /// Whether both sides keep to the memory that the engine says it takes beside the guest's (see also `--size`)
    Memory,
}

/// What a question asks for where the command line does not say.
pub(super) struct Defaults {
    pub(super) rates: &'static [&'static str],
    pub(super) guests: &'static [&'static str],
    pub(super) ours: &'static [&'static str],
    pub(super) qemu: &'static [&'static str],
    pub(super) mebibytes: u64,
}

const ZSTD: &[&str] = &["multifd-2-zstd"];
const AUTO: &str = "auto";
const OFF: &str = "off";
const OURS: &str = "ours";

/// Memory of `migrate` beside the guest's and the engine's: itself, its libraries, its own check of the guest.
const PROGRAM: u64 = 32 << 20;

/// Without a question.
pub(super) const PLAIN: Defaults =
    Defaults { rates: &["1gbit"], guests: &["mix"], ours: &["ours"], qemu: &[], mebibytes: 1024 };

impl Preset {
    pub(super) fn defaults(self) -> Defaults {
        match self {
            Self::Bytes => Defaults { rates: &["100mbit"], guests: &["mix", "random"], qemu: ZSTD, ..PLAIN },
            Self::Gigabit => Defaults { qemu: ZSTD, ..PLAIN },
            Self::Fewbytes => Defaults { rates: &["100mbit"], guests: &["idle", "few20"], ..PLAIN },
            Self::Transports => Defaults {
                guests: &["random"],
                ours: &["tcp", "tls=tls://", "quic=quic://", "two-lanes=--lanes 2"],
                ..PLAIN
            },
            Self::Memory => Defaults { guests: &["few20"], ..PLAIN },
            Self::Auto => Defaults {
                rates: &["50mbit", "100mbit", "1gbit", "unshaped"],
                ours: &[
                    "auto=--compress auto",
                    "off=--compress off",
                    "-5=--compress=-5",
                    "1=--compress 1",
                    "3=--compress 3",
                    "9=--compress 9",
                ],
                mebibytes: 512,
                ..PLAIN
            },
        }
    }

    /// What is to be proven of everything that the plan measures.
    pub(super) fn goals(self, plan: &Plan) -> Vec<Goal> {
        plan.cases().flat_map(|case| self.goals_of(&case)).collect()
    }

    fn goals_of(self, case: &Case<'_>) -> Vec<Goal> {
        match self {
            Self::Bytes => case.each_of_ours(|ours| case.bytes(ours)),
            Self::Gigabit => case.each_of_ours(|ours| case.gigabit(ours)),
            Self::Fewbytes => case.each_of_ours(|ours| case.few_bytes(ours)),
            Self::Auto => case.auto(),
            Self::Memory => case.memory(),
            Self::Transports => case.each_of_ours(|ours| case.transports(ours)),
        }
    }

    /// What it cannot say without a file to move.
    pub(super) fn note(self, plan: &Plan) -> Option<&'static str> {
        let has_image = plan.subjects.iter().any(|subject| is_image(&subject.memory));
        (matches!(self, Self::Bytes | Self::Gigabit) && !has_image)
            .then_some("no --image was given: part of the question is open")
    }
}

/// The variant of `benches/images/make.sh` by this name. Other images are measured without a bound: how much can be left out
/// is the image's own matter.
fn is_duplicates(file: &Path) -> bool {
    file.file_stem().is_some_and(|name| name.to_string_lossy().contains("duplicates"))
}

fn is_image(memory: &Memory) -> bool {
    matches!(memory, Memory::Image(_))
}

/// What others are compared with unless another is asked for.
pub(super) fn is_compressing_qemu(mover: &str) -> bool {
    mover.starts_with(QEMU_PREFIX) && mover.ends_with("zstd")
}

/// One guest over one link, and all that move it.
pub(super) struct Case<'a> {
    pub(super) rate: String,
    pub(super) subject: &'a Subject,
    pub(super) movers: Vec<&'a str>,
}

impl Case<'_> {
    fn key(&self, mover: &str) -> Key {
        Key { rate: self.rate.clone(), guest: self.subject.memory.to_string(), mover: mover.to_owned() }
    }

    fn each_of_ours(&self, goals: impl Fn(&str) -> Vec<Goal>) -> Vec<Goal> {
        self.movers.iter().filter(|mover| !mover.starts_with(QEMU_PREFIX)).flat_map(|ours| goals(ours)).collect()
    }

    /// The QEMU that ours are compared with: the first that compresses.
    fn qemu(&self) -> Option<Key> {
        self.movers.iter().find(|mover| is_compressing_qemu(mover)).map(|mover| self.key(mover))
    }

    fn bytes(&self, ours: &str) -> Vec<Goal> {
        let key = self.key(ours);
        if self.subject.memory == Memory::RANDOM {
            let memory = Quantity::Known(self.subject.bytes as f64);
            return vec![Goal::at_most(format!("{key}: wire, of the memory"), Quantity::Wire(key), memory, 1.005)];
        }
        let bound = match &self.subject.memory {
            memory if *memory == Memory::MIX => 0.85,
            Memory::Image(file) if is_duplicates(file) => 0.60,
            _ => return Vec::new(),
        };
        let goal = |qemu: Key| {
            let name = format!("{key}: wire, of {}", qemu.mover);
            Goal::at_most(name, Quantity::Wire(key.clone()), Quantity::Wire(qemu), bound)
        };
        self.qemu().map(goal).into_iter().collect()
    }

    fn gigabit(&self, ours: &str) -> Vec<Goal> {
        let key = self.key(ours);
        let wire = Quantity::WireSeconds(key.clone());
        let mut goals =
            vec![Goal::at_most(format!("{key}: time over wire time"), Quantity::Seconds(key.clone()), wire, 1.07)];
        if let Some(qemu) = self.qemu().filter(|_| is_image(&self.subject.memory)) {
            let name = format!("{key}: faster than {}", qemu.mover);
            goals.push(Goal::at_least(name, Quantity::Seconds(qemu), Quantity::Seconds(key), 2.0));
        }
        goals
    }

    /// A link carries at least 0.93 of what a plain copy gets through it.
    fn transports(&self, ours: &str) -> Vec<Goal> {
        if self.subject.memory != Memory::RANDOM {
            return Vec::new();
        }
        let (key, copy) = (self.key(ours), Quantity::CopySeconds(self.rate.clone(), self.subject.bytes));
        vec![Goal::at_least(format!("{key}: of the plain copy's speed"), copy, Quantity::Seconds(key), 0.93)]
    }

    fn few_bytes(&self, ours: &str) -> Vec<Goal> {
        if self.subject.memory != Memory::FEW20 {
            return Vec::new();
        }
        let key = self.key(ours);
        let idle = Quantity::Seconds(Key { guest: Memory::IDLE.to_string(), ..key.clone() });
        vec![
            Goal::at_most(format!("{key}: time, of the idle guest's"), Quantity::Seconds(key.clone()), idle, 1.15),
            Goal::at_most(format!("{key}: strongest throttle"), Quantity::Throttle(key), Quantity::Known(1.0), 0.0),
        ]
    }

    /// The bounds are those of the default settings.
    fn memory(&self) -> Vec<Goal> {
        if !self.movers.contains(&OURS) {
            return Vec::new();
        }
        let (key, pages) = (self.key(OURS), self.subject.bytes / 4096);
        let config = SourceConfig::default();
        let bound = |engine: u64| Quantity::Known((engine + PROGRAM) as f64);
        let source = bound(config.memory_bound(pages, &Capabilities::default()));
        let destination =
            bound(DestinationConfig::default().memory_bound(pages, config.lanes, &Capabilities::default()));
        vec![
            Goal::at_most(
                format!("{key}: memory of the source, of its bound"),
                Quantity::SourceMemory(key.clone()),
                source,
                1.0,
            ),
            Goal::at_most(
                format!("{key}: memory of the destination, of its bound"),
                Quantity::DestinationMemory(key),
                destination,
                1.0,
            ),
        ]
    }

    fn auto(&self) -> Vec<Goal> {
        let key = self.key(AUTO);
        let fixed = self.movers.iter().filter(|mover| **mover != AUTO && !mover.starts_with(QEMU_PREFIX));
        let best = Quantity::LeastSeconds(fixed.map(|mover| self.key(mover)).collect());
        let (auto, off) = (Quantity::Seconds(key.clone()), Quantity::Seconds(self.key(OFF)));
        vec![
            Goal::at_most(format!("{key}: time, of the best setting's"), auto.clone(), best, 1.08),
            Goal::at_most(format!("{key}: time, of {OFF}"), auto, off, 1.03),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case<'a>(subject: &'a Subject, movers: &[&'a str]) -> Case<'a> {
        Case { rate: "1gbit".to_owned(), subject, movers: movers.to_vec() }
    }

    fn names(preset: Preset, memory: Memory, movers: &[&str]) -> String {
        let subject = Subject { memory, bytes: 1 << 30 };
        let goals = preset.goals_of(&case(&subject, movers));
        goals.iter().map(|goal| format!("{goal:?}")).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn each_question_asks_only_what_its_guest_can_answer() {
        let movers = ["qemu-plain", "qemu-multifd-2-zstd", "ours"];
        let image = || Memory::Image("/tmp/duplicates.img".into());
        assert!(names(Preset::Bytes, Memory::MIX, &movers).contains("AtMost(0.85)"));
        assert!(names(Preset::Bytes, image(), &movers).contains("AtMost(0.6)"));
        assert_eq!(names(Preset::Bytes, Memory::Image("/tmp/plain.img".into()), &movers), "");
        assert!(names(Preset::Bytes, Memory::RANDOM, &movers).contains("Known(1073741824.0)"));
        assert_eq!(names(Preset::Bytes, Memory::MIX, &["ours"]), "");
        assert!(names(Preset::Gigabit, image(), &movers).contains("AtLeast(2.0)"));
        assert!(!names(Preset::Gigabit, Memory::MIX, &movers).contains("AtLeast"));
        assert_eq!(names(Preset::Fewbytes, Memory::IDLE, &movers), "");
        assert!(names(Preset::Fewbytes, Memory::FEW20, &movers).contains("Throttle"));
        assert!(names(Preset::Memory, Memory::FEW20, &movers).contains("DestinationMemory"));
        assert_eq!(names(Preset::Memory, Memory::FEW20, &["auto"]), "");
    }

    #[test]
    fn the_adaptive_setting_is_held_against_the_fixed_ones_only() {
        let found = names(Preset::Auto, Memory::MIX, &["qemu-plain", "auto", "off", "1"]);
        let best = found.lines().next().unwrap();
        assert!(best.contains("LeastSeconds") && best.contains("AtMost(1.08)"), "{best}");
        assert_eq!(best.matches("\"auto\"").count(), 1, "{best}");
        assert!(!best.contains("qemu"), "{best}");
    }
}
