//! The facts about a machine without which a number means nothing.

use std::fs;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Deserializer, Serialize};

/// Where and when a result was made.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct Machine {
    pub(crate) date: String,
    pub(crate) cpu: String,
    pub(crate) cpus: usize,
    pub(crate) memory_gib: f64,
    pub(crate) kernel: String,
    pub(crate) tcp_congestion_control: String,
    pub(crate) transparent_huge_pages: String,
    /// Runnable tasks over the last minute before the measurement: whether the machine was quiet.
    #[serde(deserialize_with = "number_or_nothing")]
    pub(crate) load_before: f64,
    pub(crate) optimised_build: bool,
    /// Whether there is a `/dev/kvm`: without it, guests are threads of a process. Nothing where nobody noted it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kvm: Option<bool>,
}

impl Machine {
    pub(crate) fn here() -> Self {
        Self {
            date: today(),
            cpu: field("/proc/cpuinfo", "model name").unwrap_or_else(unknown),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: (kib("MemTotal") as f64 / f64::from(1 << 20) * 10.0).round() / 10.0,
            kernel: first_word("/proc/sys/kernel/osrelease"),
            tcp_congestion_control: first_word("/proc/sys/net/ipv4/tcp_congestion_control"),
            transparent_huge_pages: chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
            load_before: first_word("/proc/loadavg").parse().unwrap_or(f64::NAN),
            optimised_build: !cfg!(debug_assertions),
            kvm: Some(Path::new("/dev/kvm").exists()),
        }
    }
}

/// Bytes of memory that could be taken now without hurting anybody.
pub(crate) fn available_bytes() -> u64 {
    kib("MemAvailable") << 10
}

/// Bytes of memory this process has resident.
pub(crate) fn resident_bytes() -> u64 {
    let text = field("/proc/self/status", "VmRSS").unwrap_or_default();
    leading_number(&text) << 10
}

fn kib(name: &str) -> u64 {
    leading_number(&field("/proc/meminfo", name).unwrap_or_default())
}

fn leading_number(text: &str) -> u64 {
    text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// The value of the first `name: value` line.
fn field(path: &str, name: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

fn first_word(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_whitespace().next().map_or_else(unknown, str::to_owned)
}

/// The word in brackets: how sysfs shows a choice.
fn chosen(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or_else(unknown, |(word, _)| word.to_owned())
}

/// JSON has no NaN: what is not known is written as nothing.
fn number_or_nothing<'a, D: Deserializer<'a>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

fn unknown() -> String {
    "unknown".to_owned()
}

fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02}")
}

/// The calendar date of a day counted from 1 January 1970.
fn civil(days: u64) -> (u64, u64, u64) {
    let (mut year, mut left) = (1970, days);
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let lengths = [31, 28 + u64::from(leap(year)), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    let mut month = 1;
    for length in lengths {
        if left < length {
            break;
        }
        left -= length;
        month += 1;
    }
    (year, month, left + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_follow_the_calendar() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_453), (2025, 12, 31));
        assert_eq!(civil(20_454), (2026, 1, 1));
    }

    #[test]
    fn this_machine_has_a_name_and_memory() {
        let machine = Machine::here();
        assert!(machine.memory_gib > 0.0 && machine.kernel != "unknown" && resident_bytes() > 0, "{machine:?}");
        assert!(available_bytes() > 0);
    }
}
