//! The lines that a guest prints on its serial port: written by the guest, read by the host.
//!
//! A line is a keyword and `name=number` fields, such as `hb 12 tsc=3f2a99 stall_us=1043 writes=5120`.
//! Numbers are decimal, but time stamps, addresses and content are hexadecimal. Lines of another
//! form (a Linux guest's) parse to nothing.

use core::fmt;

use super::page::Mismatch;

/// One line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Line<'a> {
    /// The guest started: pages of RAM, and how many of them are filled, written and checked as data (the
    /// others hold the guest itself).
    Boot {
        /// All pages.
        ram_pages: u64,
        /// Pages with content.
        data_pages: u64,
    },
    /// Memory is filled and the writing begins.
    Ready {
        /// How long filling took.
        ms: u64,
    },
    /// The guest runs.
    Heartbeat {
        /// Counts the heartbeat lines, from 1.
        number: u64,
        /// The guest's clock.
        tsc: u64,
        /// The longest gap between two looks at the clock since the last heartbeat line.
        stall_us: u64,
        /// Pages written since the start, by all vCPUs.
        writes: u64,
    },
    /// Writing has stopped.
    Stopped {
        /// Pages written since the start.
        writes: u64,
    },
    /// Writing goes on.
    Resumed,
    /// Answers the question for the longest stall.
    Stall {
        /// The longest gap between two looks at the clock since the last reset.
        longest_us: u64,
    },
    /// Every byte checked is right.
    CheckOk {
        /// How many pages were checked.
        pages: u64,
        /// How long checking took.
        ms: u64,
    },
    /// Some bytes are wrong.
    CheckFailed(WrongPage),
    /// The guest cannot go on.
    Panic(&'a str),
}

/// What a failed check found first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WrongPage {
    /// Guest physical address of the page.
    pub(crate) address: u64,
    /// The word that is wrong. For a page of the guest itself, hashes of the whole page, at offset 0.
    pub(crate) mismatch: Mismatch,
    /// How many pages are wrong in all.
    pub(crate) wrong_pages: u64,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Boot { ram_pages, data_pages } => write!(to, "boot ram={ram_pages} data={data_pages}"),
            Self::Ready { ms } => write!(to, "ready ms={ms}"),
            Self::Heartbeat { number, tsc, stall_us, writes } => {
                write!(to, "hb n={number} tsc={tsc:x} stall_us={stall_us} writes={writes}")
            }
            Self::Stopped { writes } => write!(to, "stopped writes={writes}"),
            Self::Resumed => write!(to, "resumed"),
            Self::Stall { longest_us } => write!(to, "stall longest_us={longest_us}"),
            Self::CheckOk { pages, ms } => write!(to, "check ok pages={pages} ms={ms}"),
            Self::CheckFailed(wrong) => write!(to, "check FAILED {wrong}"),
            Self::Panic(text) => write!(to, "panic {text}"),
        }
    }
}

impl fmt::Display for WrongPage {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { address, mismatch: Mismatch { offset, expected, found }, wrong_pages } = self;
        write!(to, "page={address:x} offset={offset} expected={expected:x} found={found:x} wrong={wrong_pages}")
    }
}

impl<'a> Line<'a> {
    /// Reads a line, without its line end.
    pub(crate) fn parse(line: &'a str) -> Option<Self> {
        let line = line.trim();
        let (word, fields) = line.split_once(' ').unwrap_or((line, ""));
        match word {
            "boot" => Some(Self::Boot { ram_pages: decimal(fields, "ram=")?, data_pages: decimal(fields, "data=")? }),
            "ready" => Some(Self::Ready { ms: decimal(fields, "ms=")? }),
            "hb" => parse_heartbeat(fields),
            "stopped" => Some(Self::Stopped { writes: decimal(fields, "writes=")? }),
            "resumed" => Some(Self::Resumed),
            "stall" => Some(Self::Stall { longest_us: decimal(fields, "longest_us=")? }),
            "check" => parse_check(fields),
            "panic" => Some(Self::Panic(fields)),
            _ => None,
        }
    }
}

fn parse_heartbeat(fields: &str) -> Option<Line<'static>> {
    Some(Line::Heartbeat {
        number: decimal(fields, "n=")?,
        tsc: hexadecimal(fields, "tsc=")?,
        stall_us: decimal(fields, "stall_us=")?,
        writes: decimal(fields, "writes=")?,
    })
}

fn parse_check(fields: &str) -> Option<Line<'static>> {
    if fields.starts_with("ok ") {
        return Some(Line::CheckOk { pages: decimal(fields, "pages=")?, ms: decimal(fields, "ms=")? });
    }
    let mismatch = Mismatch {
        offset: usize::try_from(decimal(fields, "offset=")?).ok()?,
        expected: hexadecimal(fields, "expected=")?,
        found: hexadecimal(fields, "found=")?,
    };
    let wrong = WrongPage { address: hexadecimal(fields, "page=")?, mismatch, wrong_pages: decimal(fields, "wrong=")? };
    fields.starts_with("FAILED ").then_some(Line::CheckFailed(wrong))
}

fn decimal(fields: &str, name: &str) -> Option<u64> {
    field(fields, name)?.parse().ok()
}

fn hexadecimal(fields: &str, name: &str) -> Option<u64> {
    u64::from_str_radix(field(fields, name)?, 16).ok()
}

fn field<'a>(fields: &'a str, name: &str) -> Option<&'a str> {
    fields.split(' ').find_map(|field| field.strip_prefix(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_comes_back_as_it_was_printed() {
        let mismatch = Mismatch { offset: 4088, expected: 0, found: u64::MAX };
        for line in [
            Line::Boot { ram_pages: 262_144, data_pages: 262_000 },
            Line::Ready { ms: 812 },
            Line::Heartbeat { number: 3, tsc: 0xabc_def0, stall_us: 1040, writes: 99 },
            Line::Stopped { writes: 0 },
            Line::Resumed,
            Line::Stall { longest_us: 123_456 },
            Line::CheckOk { pages: 5, ms: 6 },
            Line::CheckFailed(WrongPage { address: 0x1_0000_3000, mismatch, wrong_pages: 2 }),
            Line::Panic("bad parameter: colour=red"),
        ] {
            assert_eq!(Line::parse(&format!("{line}\r\n")), Some(line), "{line}");
        }
    }

    #[test]
    fn other_text_is_no_line() {
        for text in
            ["", "[    0.000000] Linux version 6.1", "hb n=1", "check ok", "check FAILED page=1000", "ready ms=soon"]
        {
            assert_eq!(Line::parse(text), None, "{text}");
        }
    }
}
