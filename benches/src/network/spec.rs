//! A link as a command line names it: how fast it is, and how far its ends are from each other.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use super::Rate;

/// Farther apart than this is no two places on Earth.
const LONGEST: Duration = Duration::from_secs(2);

/// `100mbit`, `unshaped`, `1gbit+20ms`: a rate, and what is added to the time of a round trip.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct LinkSpec {
    pub(crate) rate: Rate,
    pub(crate) rtt: Duration,
}

impl From<Rate> for LinkSpec {
    fn from(rate: Rate) -> Self {
        Self { rate, rtt: Duration::ZERO }
    }
}

impl FromStr for LinkSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((rate, rtt)) = text.split_once('+') else { return Ok(text.parse::<Rate>()?.into()) };
        let milliseconds = rtt.strip_suffix("ms").and_then(|digits| digits.parse::<u64>().ok());
        let rtt = milliseconds.map(Duration::from_millis).filter(|rtt| *rtt <= LONGEST);
        let rtt = rtt.ok_or_else(|| format!("{text:?} is not a link such as 100mbit or 1gbit+20ms"))?;
        Ok(Self { rate: rate.parse()?, rtt })
    }
}

impl fmt::Display for LinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.rtt.is_zero() { self.rate.fmt(f) } else { write!(f, "{}+{}ms", self.rate, self.rtt.as_millis()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_come_back_as_they_were_written() {
        for text in ["100mbit", "unshaped", "1gbit+20ms", "unshaped+1ms"] {
            assert_eq!(text.parse::<LinkSpec>().unwrap().to_string(), text);
        }
        assert_eq!("1gbit+0ms".parse::<LinkSpec>().unwrap().to_string(), "1gbit");
        for text in ["", "+20ms", "1gbit+", "1gbit+20", "1gbit+20s", "1gbit+9999ms", "1gbit+-1ms"] {
            assert!(text.parse::<LinkSpec>().is_err(), "{text}");
        }
    }
}
