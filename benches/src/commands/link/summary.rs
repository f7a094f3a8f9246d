//! What many runs say together: series of every value, and quotients of medians.

use std::fmt;

use crate::movers::{Memory, Moved, QEMU_PREFIX};
use crate::network::Rate;
use crate::outcome::{Outcome, median};
use crate::process::Usage;

const MIB: f64 = (1 << 20) as f64;

const COLUMNS: usize = 7;
const WIDTHS: [usize; COLUMNS] = [14, 16, 14, 10, 8, 6, 8];

/// What was measured: over which link, which guest, moved by whom.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Key {
    pub(super) rate: String,
    pub(super) guest: String,
    pub(super) mover: String,
}

impl Key {
    pub(super) fn new(rate: Rate, guest: &Memory, mover: &str) -> Self {
        Self { rate: rate.to_string(), guest: guest.to_string(), mover: mover.to_owned() }
    }

    fn same_case(&self, other: &Self) -> bool {
        (&self.rate, &self.guest) == (&other.rate, &other.guest)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.rate, self.guest, self.mover)
    }
}

/// Everything measured, in the order in which it first came.
#[derive(Debug, Default)]
pub(super) struct Runs {
    goodputs: Vec<(String, Vec<f64>)>,
    moves: Vec<(Key, Vec<Moved>)>,
}

impl Runs {
    pub(super) fn add_goodput(&mut self, rate: Rate, bytes_per_second: f64) {
        push(&mut self.goodputs, rate.to_string(), bytes_per_second);
    }

    pub(super) fn add(&mut self, key: Key, moved: Moved) {
        push(&mut self.moves, key, moved);
    }

    fn of(&self, key: &Key) -> &[Moved] {
        self.moves.iter().find(|(found, _)| found == key).map_or(&[], |(_, moves)| moves)
    }

    /// Median of one number of all runs of a key; NaN if there was none.
    fn median(&self, key: &Key, part: impl Fn(&Moved) -> f64) -> f64 {
        median(&self.of(key).iter().map(part).collect::<Vec<_>>())
    }

    /// The same, but NaN as well if one of ours did not converge; another's counts as it was when it was given up.
    pub(super) fn converged_median(&self, key: &Key, part: impl Fn(&Moved) -> f64) -> f64 {
        let all = self.of(key).iter().all(|moved| moved.converged);
        if all || key.mover.starts_with(QEMU_PREFIX) { self.median(key, part) } else { f64::NAN }
    }

    /// The most of one number of all runs of a key; NaN if there was none, or one did not say.
    pub(super) fn most(&self, key: &Key, part: impl Fn(&Moved) -> f64) -> f64 {
        self.of(key).iter().map(part).max_by(f64::total_cmp).unwrap_or(f64::NAN)
    }

    /// Bytes per second of a plain copy.
    pub(super) fn goodput(&self, rate: &str) -> f64 {
        self.goodputs.iter().find(|(found, _)| found == rate).map_or(f64::NAN, |(_, values)| median(values))
    }

    /// What the bytes that were sent take at iperf3's speed.
    pub(super) fn wire_seconds(&self, key: &Key) -> f64 {
        self.median(key, wire_bytes) / self.goodput(&key.rate)
    }

    /// Adds all series and all quotients, and a table of them; `baseline` names the mover that others are divided by.
    pub(super) fn summarise(&self, outcome: &mut Outcome, baseline: Option<&str>) {
        for (rate, values) in &self.goodputs {
            let megabits = values.iter().map(|bytes| bytes * 8.0 / 1e6).collect();
            outcome.series(format!("{rate}: iperf3"), "Mbit/s", megabits);
        }
        for (key, moves) in &self.moves {
            add_series(outcome, key, moves);
        }
        outcome.table(self.table(baseline));
        for (key, _) in &self.moves {
            let over = self.median(key, seconds) / self.wire_seconds(key);
            outcome.figure(format!("{key}: time over wire time"), "", over, None);
            if let Some(base) = self.baseline_of(key, baseline) {
                let of = |part: fn(&Moved) -> f64| self.median(key, part) / self.median(base, part);
                outcome.figure(format!("{key}: time, of {}", base.mover), "", of(seconds), None);
                outcome.figure(format!("{key}: wire, of {}", base.mover), "", of(wire_bytes), None);
                outcome.figure(format!("{key}: CPU, of {}", base.mover), "", of(cpu_seconds), None);
            }
        }
    }

    /// Medians, and in brackets what they are of the baseline's.
    fn table(&self, baseline: Option<&str>) -> String {
        let megabits = |values: &[f64]| median(values) * 8.0 / 1e6;
        let goodputs =
            self.goodputs.iter().map(|(rate, values)| format!("  {rate}: iperf3 {:.1} Mbit/s", megabits(values)));
        let columns = ["time s", "wire MiB", "CPU s", "/wire time", "down ms", "rounds", "slowed %"];
        let header = line("medians (of the baseline's)", &columns.map(str::to_owned));
        let rows = self.moves.iter().map(|(key, moves)| line(&key.to_string(), &self.cells(key, moves, baseline)));
        goodputs.chain([header]).chain(rows).map(|line| line + "\n").collect()
    }

    fn cells(&self, key: &Key, moves: &[Moved], baseline: Option<&str>) -> [String; COLUMNS] {
        let base = self.baseline_of(key, baseline);
        let cell = |part: fn(&Moved) -> f64, unit: f64| {
            let value = self.median(key, part);
            let of = base.map(|base| format!(" ({:.2})", value / self.median(base, part)));
            format!("{:.2}{:>7}", value / unit, of.unwrap_or_default())
        };
        let downtimes: Vec<f64> = moves.iter().filter_map(|moved| moved.downtime_ms).collect();
        [
            cell(seconds, 1.0),
            cell(wire_bytes, MIB),
            cell(cpu_seconds, 1.0),
            format!("{:.3}", self.median(key, seconds) / self.wire_seconds(key)),
            format!("{:.1}", median(&downtimes)),
            format!("{:.0}", self.median(key, |moved| moved.rounds as f64)),
            format!("{:.0}", self.most(key, |moved| moved.throttle_percent)),
        ]
    }

    /// What a key is compared with; nothing, when it is the baseline itself.
    fn baseline_of(&self, key: &Key, name: Option<&str>) -> Option<&Key> {
        let mut same = self.moves.iter().map(|(found, _)| found).filter(|found| found.same_case(key));
        let base = match name {
            Some(name) => same.find(|found| found.mover == name),
            None => same.next(),
        };
        base.filter(|base| *base != key)
    }
}

fn line(name: &str, cells: &[String; COLUMNS]) -> String {
    let cells = WIDTHS.iter().zip(cells).map(|(width, cell)| format!(" {cell:>width$}"));
    format!("  {name:<40}") + &cells.collect::<String>()
}

fn push<K: PartialEq, V>(list: &mut Vec<(K, Vec<V>)>, key: K, value: V) {
    match list.iter_mut().find(|(found, _)| *found == key) {
        Some((_, values)) => values.push(value),
        None => list.push((key, vec![value])),
    }
}

pub(super) fn seconds(moved: &Moved) -> f64 {
    moved.seconds
}

pub(super) fn wire_bytes(moved: &Moved) -> f64 {
    moved.wire_bytes as f64
}

fn cpu_seconds(moved: &Moved) -> f64 {
    moved.source.cpu_seconds + moved.destination.cpu_seconds
}

/// Memory of a program that is not its guest's; NaN if it did not say.
pub(super) fn beside(usage: &Usage) -> f64 {
    usage.beside_guest_bytes.map_or(f64::NAN, |bytes| bytes as f64)
}

fn add_series(outcome: &mut Outcome, key: &Key, moves: &[Moved]) {
    let mut add = |name: &str, unit: &'static str, part: &dyn Fn(&Moved) -> f64| {
        outcome.series(format!("{key}: {name}"), unit, moves.iter().map(part).collect());
    };
    add("time", "s", &seconds);
    add("wire", "MiB", &|moved| wire_bytes(moved) / MIB);
    add("CPU, source", "s", &|moved| moved.source.cpu_seconds);
    add("CPU, destination", "s", &|moved| moved.destination.cpu_seconds);
    add("peak memory, source", "MiB", &|moved| moved.source.peak_rss_bytes as f64 / MIB);
    if moves.iter().all(|moved| moved.source.beside_guest_bytes.is_some()) {
        add("memory beside the guest's, source", "MiB", &|moved| beside(&moved.source) / MIB);
        add("memory beside the guest's, destination", "MiB", &|moved| beside(&moved.destination) / MIB);
    }
    add("rounds", "", &|moved| moved.rounds as f64);
    add("strongest throttle", "%", &|moved| moved.throttle_percent);
    let downtimes: Vec<f64> = moves.iter().filter_map(|moved| moved.downtime_ms).collect();
    if !downtimes.is_empty() {
        outcome.series(format!("{key}: downtime by its own account"), "ms", downtimes);
    }
    let lost = moves.iter().filter(|moved| !moved.converged).count();
    if lost > 0 {
        outcome.note(format!("{key}: {lost} of {} did not converge and were given up at that time", moves.len()));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::study::Stalls;

    pub(in super::super) fn key(guest: &str, mover: &str) -> Key {
        Key { rate: "1gbit".to_owned(), guest: guest.to_owned(), mover: mover.to_owned() }
    }

    pub(in super::super) fn moved(seconds: f64, wire_bytes: u64, converged: bool) -> Moved {
        let usage = Usage { cpu_seconds: seconds / 2.0, peak_rss_bytes: 3 << 20, beside_guest_bytes: Some(1 << 20) };
        let (source, destination) = (usage, usage);
        let downtime_ms = converged.then_some(5.0);
        Moved {
            seconds,
            downtime_ms,
            stalls: Stalls::default(),
            remaining: Vec::new(),
            wire_bytes,
            source,
            destination,
            rounds: 2,
            throttle_percent: 0.0,
            guest_bytes_per_second: None,
            in_postcopy: false,
            verified: Vec::new(),
            stages: Vec::new(),
            converged,
        }
    }

    fn runs() -> Runs {
        let mut runs = Runs::default();
        runs.add_goodput(Rate::BitsPerSecond(1_000_000_000), 100.0);
        for (mover, seconds, bytes) in [("slow", 8.0, 600), ("fast", 2.0, 100), ("fast", 4.0, 300), ("fast", 3.0, 200)]
        {
            runs.add(key("mix", mover), moved(seconds, bytes, true));
        }
        runs
    }

    fn figure(outcome: &Outcome, name: &str) -> f64 {
        let found: serde_json::Value = serde_json::from_str(&outcome.json()).unwrap();
        let figures = found["figures"].as_array().unwrap();
        let figure = figures.iter().find(|figure| figure["name"] == name);
        figure.unwrap_or_else(|| panic!("no {name} in {figures:?}"))["value"].as_f64().unwrap()
    }

    #[test]
    fn quotients_are_of_medians_and_the_first_is_the_baseline() {
        let mut outcome = Outcome::new("test", String::new());
        runs().summarise(&mut outcome, None);
        assert!((figure(&outcome, "1gbit mix fast: time, of slow") - 3.0 / 8.0).abs() < 1e-9);
        assert!((figure(&outcome, "1gbit mix fast: wire, of slow") - 200.0 / 600.0).abs() < 1e-9);
        assert!((figure(&outcome, "1gbit mix fast: time over wire time") - 3.0 / (200.0 / 100.0)).abs() < 1e-9);
        assert!(!outcome.json().contains("of fast"));
    }

    #[test]
    fn the_most_is_not_known_while_one_run_did_not_say() {
        let (mut runs, key) = (runs(), key("mix", "fast"));
        assert!((runs.most(&key, |moved| beside(&moved.source)) - f64::from(1 << 20)).abs() < 1e-9);
        let mut silent = moved(2.0, 100, true);
        silent.source.beside_guest_bytes = None;
        runs.add(key.clone(), silent);
        assert!(runs.most(&key, |moved| beside(&moved.source)).is_nan());
    }

    #[test]
    fn a_baseline_can_be_named() {
        let mut outcome = Outcome::new("test", String::new());
        runs().summarise(&mut outcome, Some("fast"));
        assert!((figure(&outcome, "1gbit mix slow: CPU, of fast") - 8.0 / 3.0).abs() < 1e-9);
        assert!(!outcome.json().contains("of slow"));
    }

    #[test]
    fn guests_are_not_compared_with_each_other_and_what_was_given_up_is_said() {
        let mut runs = runs();
        runs.add(key("few20", "fast"), moved(240.0, 9, false));
        let mut outcome = Outcome::new("test", String::new());
        runs.summarise(&mut outcome, None);
        let shown = outcome.to_string();
        assert!(shown.contains("1gbit few20 fast: 1 of 1 did not converge"), "{shown}");
        assert!(!shown.contains("few20 fast: time, of") && !shown.contains("few20 fast: downtime"), "{shown}");
    }
}
