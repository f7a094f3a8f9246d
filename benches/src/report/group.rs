//! The runs of one mover in one cell, and what they say together.

use crate::outcome::median;
use crate::steal::DISTURBING;
use crate::study::{End, Engine, Guest, Link, Mover, Proof, Run, Study};

use super::words;

/// What is measured of a run and compared between movers. Less is better of each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Quantity {
    Time,
    Downtime,
    Stall,
    Bytes,
    Cpu,
}

impl Quantity {
    pub(crate) const ALL: [Self; 5] = [Self::Time, Self::Downtime, Self::Stall, Self::Bytes, Self::Cpu];

    /// As remarks name it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Time => "time",
            Self::Downtime => "downtime",
            Self::Stall => "stall",
            Self::Bytes => "bytes",
            Self::Cpu => "cpu",
        }
    }

    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Time => "total time",
            Self::Downtime => "downtime",
            Self::Stall => "guest's stall",
            Self::Bytes => "bytes on the wire",
            Self::Cpu => "CPU time, both sides",
        }
    }

    /// In seconds or bytes; nothing if the run does not say.
    pub(crate) fn of(self, run: &Run) -> Option<f64> {
        let value = match self {
            Self::Time => Some(run.seconds),
            Self::Downtime => run.downtime_ms.map(|ms| ms / 1e3),
            Self::Stall => run.stalls.during_ms.map(|ms| ms / 1e3),
            Self::Bytes => Some(run.wire_bytes as f64),
            Self::Cpu => Some(run.source.cpu_seconds + run.destination.cpu_seconds),
        };
        value.filter(|value| value.is_finite())
    }

    pub(crate) fn shown(self, value: f64) -> String {
        if self == Self::Bytes { words::bytes(value) } else { words::seconds(value) }
    }

    /// The unit of [`Quantity::of`].
    pub(crate) fn unit(self) -> &'static str {
        if self == Self::Bytes { "B" } else { "s" }
    }
}

/// Values of the same thing from several runs.
#[derive(Clone, Default, PartialEq, Debug)]
pub(crate) struct Sample(Vec<f64>);

impl Sample {
    /// What is no number does not count.
    pub(crate) fn new(values: impl IntoIterator<Item = f64>) -> Self {
        Self(values.into_iter().filter(|value| value.is_finite()).collect())
    }

    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// NaN if there is no value.
    pub(crate) fn median(&self) -> f64 {
        median(&self.0)
    }

    pub(crate) fn least(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::min)
    }

    pub(crate) fn most(&self) -> f64 {
        self.0.iter().copied().fold(f64::NAN, f64::max)
    }

    /// `least to most`; nothing for less than two values.
    pub(crate) fn range(&self, quantity: Quantity) -> Option<String> {
        let ends = (quantity.shown(self.least()), quantity.shown(self.most()));
        (self.len() > 1 && ends.0 != ends.1).then(|| format!("{} to {}", ends.0, ends.1))
    }
}

/// How likely the ranges of so many and so many runs of the same thing do not overlap, in either direction: all of one are
/// below all of the other in 2 of as many orders as there are ways to choose which are whose.
pub(crate) fn chance_apart(runs: usize, others: usize) -> f64 {
    let ways = (1..=others.min(60)).fold(1.0, |ways, count| ways * (runs + count) as f64 / count as f64);
    (2.0 / ways).min(1.0)
}

/// How the runs of a group ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Standing {
    pub(crate) runs: usize,
    pub(crate) completed: usize,
    pub(crate) given_up: usize,
    pub(crate) failed: usize,
    /// Completed, but nothing proves that memory arrived as it was.
    pub(crate) unverified: usize,
}

impl Standing {
    pub(crate) fn of<'a>(runs: impl IntoIterator<Item = &'a Run>) -> Self {
        let mut standing = Self::default();
        for run in runs {
            standing.runs += 1;
            match run.end {
                End::Completed => standing.completed += 1,
                End::GivenUp => standing.given_up += 1,
                End::Failed(_) => standing.failed += 1,
            }
            standing.unverified += usize::from(run.end == End::Completed && !is_verified(run));
        }
        standing
    }

    /// Whether there is a run, and every one completed.
    pub(crate) fn finished(self) -> bool {
        self.runs > 0 && self.completed == self.runs
    }

    /// What a reader must know; nothing if all went well.
    pub(crate) fn trouble(self) -> Option<String> {
        let of = |count: usize, words: &str| match (count, self.runs) {
            (0, _) => None,
            (count, runs) if count == runs => Some(words.to_owned()),
            (count, runs) => Some(format!("{count} of {runs} {words}")),
        };
        let parts = [of(self.failed, "failed"), of(self.given_up, "given up"), of(self.unverified, "not verified")];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        (!parts.is_empty()).then(|| parts.join(", "))
    }
}

/// Whether something proved that the guest's memory arrived as it was. A beating heart says nothing about memory.
pub(crate) fn is_verified(run: &Run) -> bool {
    run.verified.iter().any(|proof| *proof != Proof::Alive)
}

/// Whether the machine's own host took so much CPU time during a run that its numbers may say more about that.
pub(crate) fn is_disturbed(run: &Run) -> bool {
    run.stolen_share.is_some_and(|share| share > DISTURBING)
}

/// How much of what it was to write the guest wrote in a run, from 0 to 1. One that has fallen behind catches up, so
/// more than all counts as all.
pub(crate) fn worked(guest: &Guest, run: &Run) -> f64 {
    let wanted = guest.dirty_bytes_per_second;
    if wanted == 0 {
        return f64::NAN;
    }
    run.guest_bytes_per_second.map_or(f64::NAN, |wrote| (wrote / wanted as f64).min(1.0))
}

/// All runs of a mover in a cell; at least one.
#[derive(Clone, Debug)]
pub(crate) struct Group<'a> {
    pub(crate) link: &'a Link,
    pub(crate) guest: &'a Guest,
    pub(crate) mover: &'a Mover,
    pub(crate) runs: Vec<&'a Run>,
    pub(crate) standing: Standing,
}

impl<'a> Group<'a> {
    /// Nothing if this mover was not run there.
    pub(crate) fn of(study: &'a Study, link: &'a Link, guest: &'a Guest, mover: &'a Mover) -> Option<Self> {
        let runs: Vec<&Run> = study.runs_of(&link.name, &guest.name, &mover.name).collect();
        let standing = Standing::of(runs.iter().copied());
        (!runs.is_empty()).then_some(Self { link, guest, mover, runs, standing })
    }

    pub(crate) fn is_ours(&self) -> bool {
        self.mover.engine == Engine::Pageferry
    }

    pub(crate) fn finished(&self) -> bool {
        self.standing.finished()
    }

    /// The values of the runs that completed; of all, as they were when they ended, if none did.
    pub(crate) fn sample(&self, quantity: Quantity) -> Sample {
        Sample::new(self.counted().filter_map(|run| quantity.of(run)))
    }

    pub(crate) fn median_of(&self, part: impl Fn(&Run) -> f64) -> f64 {
        Sample::new(self.counted().map(part)).median()
    }

    /// How much of what it was to write the guest wrote while it was moved, from 0 to 1; NaN for an idle guest, and where
    /// nobody knows.
    pub(crate) fn worked(&self) -> f64 {
        self.median_of(|run| worked(self.guest, run))
    }

    /// Of the runs whose values count, those that the machine's own host disturbed.
    pub(crate) fn disturbed(&self) -> usize {
        self.counted().filter(|run| is_disturbed(run)).count()
    }

    fn counted(&self) -> impl Iterator<Item = &'a Run> {
        let none = self.standing.completed == 0;
        self.runs.iter().copied().filter(move |run| none || run.end == End::Completed)
    }

    /// The one that took the median time, the shorter of two.
    pub(crate) fn typical(&self) -> Option<&'a Run> {
        let mut runs: Vec<&Run> = self.counted().collect();
        runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
        runs.get(runs.len().saturating_sub(1) / 2).copied()
    }

    /// The total time with how it came about: `8.61 s`, `given up after 240 s`.
    pub(crate) fn time_in_words(&self) -> String {
        let time = words::seconds(self.sample(Quantity::Time).median());
        match self.standing {
            standing if standing.finished() => time,
            standing if standing.completed > 0 => {
                format!("{time} ({} of {} completed)", standing.completed, standing.runs)
            }
            standing if standing.given_up > 0 => format!("given up after {time}"),
            _ => format!("failed after {time}"),
        }
    }
}

/// The groups of a cell, in the order of the movers.
pub(crate) fn cell<'a>(study: &'a Study, link: &'a Link, guest: &'a Guest) -> Vec<Group<'a>> {
    study.movers.iter().filter_map(|mover| Group::of(study, link, guest, mover)).collect()
}

/// Links with guests that were measured on them.
pub(crate) fn cells(study: &Study) -> impl Iterator<Item = (&Link, &Guest)> {
    let pairs = study.links.iter().flat_map(|link| study.guests.iter().map(move |guest| (link, guest)));
    pairs.filter(|(link, guest)| study.runs.iter().any(|run| run.link == link.name && run.guest == guest.name))
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn medians_are_of_the_runs_that_completed() {
        let mut study = example::small(&[3.0, 1.0, 2.0]);
        study.runs[0].end = End::GivenUp;
        let (link, guest, mover) = (&study.links[0], &study.guests[0], &study.movers[0]);
        let group = Group::of(&study, link, guest, mover).unwrap();
        assert!((group.sample(Quantity::Time).median() - 1.5).abs() < 1e-9);
        assert!((group.typical().unwrap().seconds - 1.0).abs() < 1e-9 && !group.finished());
        assert_eq!(group.time_in_words(), "1.50 s (2 of 3 completed)");
        assert_eq!(group.standing.trouble().unwrap(), "1 of 3 given up");
    }

    #[test]
    fn a_heart_that_beats_verifies_no_memory() {
        let mut study = example::small(&[1.0]);
        assert!(is_verified(&study.runs[0]));
        study.runs[0].verified = vec![Proof::Alive];
        assert!(!is_verified(&study.runs[0]));
        assert_eq!(Standing::of(&study.runs).trouble().unwrap(), "not verified");
    }

    #[test]
    fn work_is_a_share_of_what_was_asked() {
        let mut study = example::full();
        let guest = study.guests.iter().find(|guest| guest.name == "full60").unwrap().clone();
        let run = &mut study.runs[0];
        run.guest_bytes_per_second = Some(f64::from(15 << 20));
        assert!((worked(&guest, run) - 0.25).abs() < 1e-9);
        run.guest_bytes_per_second = Some(f64::from(61 << 20));
        assert!((worked(&guest, run) - 1.0).abs() < 1e-9);
        run.guest_bytes_per_second = None;
        assert!(worked(&guest, run).is_nan() && worked(&study.guests[0], &study.runs[0]).is_nan());
    }

    #[test]
    fn few_runs_are_apart_by_chance() {
        let near = |found: f64, expected: f64| (found - expected).abs() < 1e-9;
        assert!(near(chance_apart(2, 2), 1.0 / 3.0) && near(chance_apart(3, 3), 0.1) && near(chance_apart(1, 1), 1.0));
        assert!(near(chance_apart(2, 3), chance_apart(3, 2)) && chance_apart(5, 5) < 0.01);
    }

    #[test]
    fn samples_leave_out_what_is_no_number() {
        let sample = Sample::new([2.0, f64::NAN, 1.0]);
        assert!(sample.len() == 2 && (sample.least() - 1.0).abs() < 1e-9 && (sample.most() - 2.0).abs() < 1e-9);
        assert!(Sample::default().median().is_nan() && Sample::default().least().is_nan());
        assert_eq!(sample.range(Quantity::Time).unwrap(), "1.00 s to 2.00 s");
    }
}
