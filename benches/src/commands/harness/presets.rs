//! What is run where the command line does not say.

use clap::ValueEnum;

/// A matrix.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Preset {
    /// Small guests over 100 Mbit/s and 1 Gbit/s: minutes
    Quick,
    /// The table of the README: 1 GiB, every setting of QEMU that may help: an hour or two
    Paper,
    /// Seconds: whether everything works
    Tiny,
}

/// The parts of a matrix.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) name: &'static str,
    pub(super) links: Vec<LinkPart>,
    pub(super) guests: &'static [&'static str],
    /// Guests that only ours moves, for how much of a link it uses.
    pub(super) ours_alone: &'static [&'static str],
    pub(super) mebibytes: u64,
    pub(super) qemu: &'static [&'static str],
}

/// A link, how often, and how long at most.
#[derive(Debug)]
pub(super) struct LinkPart {
    pub(super) link: &'static str,
    pub(super) turns: u32,
    pub(super) limit_seconds: u64,
}

fn link(link: &'static str, turns: u32, limit_seconds: u64) -> LinkPart {
    LinkPart { link, turns, limit_seconds }
}

impl Preset {
    pub(super) fn parts(self) -> Parts {
        match self {
            Self::Quick => Parts {
                name: "quick",
                links: vec![link("100mbit", 1, 30), link("1gbit", 1, 15)],
                guests: &["idle", "few20", "full60", "full200"],
                ours_alone: &["random-idle"],
                mebibytes: 256,
                qemu: &["plain", "multifd-2-zstd", "postcopy"],
            },
            Self::Paper => Parts {
                name: "paper",
                links: vec![link("1gbit", 3, 60), link("100mbit", 1, 100)],
                guests: &["idle", "few20", "full60", "full200"],
                ours_alone: &["random-idle"],
                mebibytes: 1024,
                qemu: &["plain", "multifd-2", "multifd-2-zstd", "xbzrle", "auto-converge", "postcopy"],
            },
            Self::Tiny => Parts {
                name: "tiny",
                links: vec![link("500mbit", 1, 60)],
                guests: &["idle", "few20"],
                ours_alone: &[],
                mebibytes: 32,
                qemu: &["plain"],
            },
        }
    }
}
