//! What a guest is asked to do, as its command line says it.
//!
//! `migrate` builds the line with [`Display`](core::fmt::Display), the guest reads it with
//! [`Params::parse`]: `mix=30,10,40,20 seed=7 ws=128M rate=20M writes=few heartbeat=1 report=250 vcpus=2`.

use core::fmt;
use core::str::FromStr;

use super::content::Content;
use super::page::PAGE_BYTES;

/// Per cent of each kind of page; they add up to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mix {
    /// All zero.
    pub(crate) zero: u8,
    /// One of a few pages that occur again and again.
    pub(crate) duplicate: u8,
    /// Text-like, compresses about three to one.
    pub(crate) text: u8,
    /// Incompressible.
    pub(crate) random: u8,
}

/// What a write changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Writes {
    /// A few bytes of the page.
    Few,
    /// The whole page.
    Full,
}

/// How fast the working set is written. A page counts whole, however little of it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rate {
    /// All writers together; 0 is an idle guest.
    BytesPerSecond(u64),
    /// As fast as the vCPUs can.
    Max,
}

/// Everything a guest is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Params {
    /// What memory is filled with.
    pub(crate) mix: Mix,
    /// The content is derived from it.
    pub(crate) seed: u64,
    /// Bytes of memory that are written again and again; more than there is means all there is.
    pub(crate) working_set: u64,
    /// How fast.
    pub(crate) rate: Rate,
    /// What a write changes.
    pub(crate) writes: Writes,
    /// Whether zero pages are written once (with zeros), or never touched.
    pub(crate) touch_zero: bool,
    /// Whether firmware has used the memory: zero pages are looked at, and cleared where they are not zero.
    pub(crate) used_ram: bool,
    /// Time between two looks at the clock by vCPU 0, and two beats, when it has nothing better to do.
    pub(crate) heartbeat_ms: u32,
    /// Time between two heartbeat lines on the serial port; 0 for none.
    pub(crate) report_ms: u32,
    /// vCPUs the machine has.
    pub(crate) vcpus: u32,
    /// Frequency of the time stamp counter; 0 if the guest must ask CPUID.
    pub(crate) tsc_khz: u32,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            mix: Mix { zero: 30, duplicate: 10, text: 40, random: 20 },
            seed: 1,
            working_set: 128 << 20,
            rate: Rate::BytesPerSecond(20 << 20),
            writes: Writes::Few,
            touch_zero: false,
            used_ram: false,
            heartbeat_ms: 1,
            report_ms: 250,
            vcpus: 1,
            tsc_khz: 0,
        }
    }
}

/// A word of the command line that means nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadParameter<'a>(pub(crate) &'a str);

impl Params {
    /// Reads a command line; what it does not mention keeps its default.
    pub(crate) fn parse(line: &str) -> Result<Self, BadParameter<'_>> {
        let mut params = Self::default();
        for word in line.split_ascii_whitespace() {
            params.set(word).ok_or(BadParameter(word))?;
        }
        Ok(params)
    }

    /// What the pages of this guest hold.
    pub(crate) const fn content(&self) -> Content {
        Content {
            seed: self.seed,
            mix: self.mix,
            writes: self.writes,
            touch_zero: self.touch_zero,
            used_ram: self.used_ram,
        }
    }

    /// Whether the guest writes nothing once it is filled.
    pub(crate) fn is_idle(&self) -> bool {
        self.rate == Rate::BytesPerSecond(0) || self.working_set < PAGE_BYTES as u64
    }

    fn set(&mut self, word: &str) -> Option<()> {
        let (key, value) = word.split_once('=').unwrap_or((word, ""));
        match key {
            "mix" => self.mix = value.parse().ok()?,
            "seed" => self.seed = value.parse().ok()?,
            "ws" => self.working_set = parse_size(value)?,
            "rate" => self.rate = value.parse().ok()?,
            "idle" => self.rate = Rate::BytesPerSecond(0),
            "writes" => self.writes = value.parse().ok()?,
            "touch-zero" => self.touch_zero = true,
            "used-ram" => self.used_ram = true,
            "heartbeat" => self.heartbeat_ms = at_least_one(value)?,
            "report" => self.report_ms = value.parse().ok()?,
            "vcpus" => self.vcpus = at_least_one(value)?,
            "tsc_khz" => self.tsc_khz = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

impl fmt::Display for Params {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mix { zero, duplicate, text, random } = self.mix;
        write!(to, "mix={zero},{duplicate},{text},{random} seed={} ws={}", self.seed, Size(self.working_set))?;
        match self.rate {
            Rate::Max => write!(to, " rate=max")?,
            Rate::BytesPerSecond(rate) => write!(to, " rate={}", Size(rate))?,
        }
        let writes = if self.writes == Writes::Few { "few" } else { "full" };
        write!(to, " writes={writes} heartbeat={} report={}", self.heartbeat_ms, self.report_ms)?;
        write!(to, " vcpus={} tsc_khz={}", self.vcpus, self.tsc_khz)?;
        let flags = [(self.touch_zero, " touch-zero"), (self.used_ram, " used-ram")];
        flags.iter().filter(|(set, _)| *set).try_for_each(|(_, word)| to.write_str(word))
    }
}

/// A number that is not what the parameter takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BadValue;

impl FromStr for Mix {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        let mut shares = text.split(',').map(|share| share.trim().parse::<u8>().map_err(|_| BadValue));
        let mut next = || shares.next().ok_or(BadValue)?;
        let mix = Self { zero: next()?, duplicate: next()?, text: next()?, random: next()? };
        let sum = [mix.zero, mix.duplicate, mix.text, mix.random].map(u32::from).iter().sum::<u32>();
        if sum == 100 && shares.next().is_none() { Ok(mix) } else { Err(BadValue) }
    }
}

impl FromStr for Writes {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        match text {
            "few" => Ok(Self::Few),
            "full" => Ok(Self::Full),
            _ => Err(BadValue),
        }
    }
}

impl FromStr for Rate {
    type Err = BadValue;

    fn from_str(text: &str) -> Result<Self, BadValue> {
        if text == "max" {
            return Ok(Self::Max);
        }
        parse_size(text).map(Self::BytesPerSecond).ok_or(BadValue)
    }
}

/// Bytes, with the largest binary suffix that loses nothing.
struct Size(u64);

impl fmt::Display for Size {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(30, 'G'), (20, 'M'), (10, 'K')] {
            if self.0 > 0 && self.0.trailing_zeros() >= shift {
                return write!(to, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(to, "{}", self.0)
    }
}

fn parse_size(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'K' => (&text[..text.len() - 1], 1 << 10),
        b'M' => (&text[..text.len() - 1], 1 << 20),
        b'G' => (&text[..text.len() - 1], 1 << 30),
        _ => (text, 1),
    };
    digits.parse::<u64>().ok()?.checked_mul(unit)
}

fn at_least_one(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&number| number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_comes_back_as_it_was() {
        let params = Params {
            mix: Mix { zero: 0, duplicate: 1, text: 2, random: 97 },
            seed: u64::MAX,
            working_set: 3 << 30,
            rate: Rate::Max,
            writes: Writes::Full,
            touch_zero: true,
            used_ram: true,
            heartbeat_ms: 10,
            report_ms: 0,
            vcpus: 3,
            tsc_khz: 2_100_000,
        };
        for params in [params, Params::default(), Params { rate: Rate::BytesPerSecond(4097), ..params }] {
            assert_eq!(Params::parse(&params.to_string()), Ok(params));
        }
    }

    #[test]
    fn idle_means_no_writes() {
        assert_eq!(Params::parse("idle").unwrap().rate, Rate::BytesPerSecond(0));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        for word in
            ["mix=30,30,30,30", "mix=1,2", "mix=10,20,30,40,0", "ws=12X", "ws=", "rate=fast", "vcpus=0", "colour=red"]
        {
            assert_eq!(Params::parse(&format!("seed=3 {word}")), Err(BadParameter(word)));
        }
    }
}
