//! What changed between two measurements, and whether it is more than noise.

use super::group::{Sample, Standing, chance_apart};

/// The values of one thing.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) unit: String,
    pub(crate) sample: Sample,
    /// Nothing if this program cannot know.
    pub(crate) less_is_better: Option<bool>,
    /// Of the runs behind the values, those that the machine's own host disturbed.
    pub(crate) disturbed: usize,
}

/// What is compared: facts, values, and how runs ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measurement {
    /// The machine's and the programs', by name.
    pub(crate) facts: Vec<(String, String)>,
    pub(crate) series: Vec<Series>,
    pub(crate) standings: Vec<(String, Standing)>,
    /// What was found but could not be read.
    pub(crate) skipped: Vec<String>,
}

/// Whether a change is one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Noise {
    /// The ranges of the runs do not overlap.
    Beyond,
    /// One side has a single run: how much it varies is not known.
    Unknown,
    Within,
}

/// One thing, before and after.
#[derive(Clone, Debug)]
pub(crate) struct Change<'a> {
    pub(crate) name: &'a str,
    pub(crate) unit: &'a str,
    pub(crate) before: &'a Sample,
    pub(crate) after: &'a Sample,
    /// After, divided by before.
    pub(crate) ratio: f64,
    /// The least and the most that the ratio can be, by the ranges of the runs.
    pub(crate) bounds: Option<(f64, f64)>,
    pub(crate) noise: Noise,
    pub(crate) better: Option<bool>,
    /// How many runs of each side the machine's own host disturbed.
    pub(crate) disturbed: [usize; 2],
}

/// Everything that two measurements differ in.
#[derive(Clone, Debug)]
pub(crate) struct Difference<'a> {
    /// Name, before, after.
    pub(crate) facts: Vec<(&'a str, &'a str, &'a str)>,
    /// Name, and how the runs ended before and after.
    pub(crate) endings: Vec<(&'a str, Standing, Standing)>,
    /// What is beyond noise first, and of that what changed most.
    pub(crate) changes: Vec<Change<'a>>,
    pub(crate) only_before: Vec<&'a str>,
    pub(crate) only_after: Vec<&'a str>,
}

impl<'a> Difference<'a> {
    pub(crate) fn new(before: &'a Measurement, after: &'a Measurement) -> Self {
        let found = |series: &Series, of: &'a Measurement| {
            let same = |other: &&Series| (&other.name, &other.unit) == (&series.name, &series.unit);
            of.series.iter().find(same)
        };
        let pairs = before.series.iter().filter_map(|series| Change::new(series, found(series, after)?));
        let mut changes: Vec<Change<'a>> = pairs.collect();
        changes.sort_by(|a, b| a.noise.rank().cmp(&b.noise.rank()).then(b.size().total_cmp(&a.size())));
        let lacking = |here: &'a Measurement, there: &'a Measurement| {
            let names = here.series.iter().filter(|series| found(series, there).is_none());
            names.map(|series| series.name.as_str()).collect()
        };
        Self {
            facts: differing(&before.facts, &after.facts),
            endings: endings(before, after),
            changes,
            only_before: lacking(before, after),
            only_after: lacking(after, before),
        }
    }

    /// How many would be beyond noise by chance if nothing had changed at all.
    pub(crate) fn by_chance(&self) -> f64 {
        let known = self.changes.iter().filter(|change| change.noise != Noise::Unknown);
        known.map(|change| chance_apart(change.before.len(), change.after.len())).sum()
    }

    pub(crate) fn count(&self, noise: Noise) -> usize {
        self.changes.iter().filter(|change| change.noise == noise).count()
    }
}

fn differing<'a>(before: &'a [(String, String)], after: &'a [(String, String)]) -> Vec<(&'a str, &'a str, &'a str)> {
    let of = |name: &str, list: &'a [(String, String)]| {
        list.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    };
    let known = before.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_str(), of(name, after)?)));
    known.filter(|(_, before, after)| before != after).collect()
}

fn endings<'a>(before: &'a Measurement, after: &'a Measurement) -> Vec<(&'a str, Standing, Standing)> {
    let of = |name: &str| after.standings.iter().find(|(found, _)| found == name).map(|(_, standing)| *standing);
    let both = before.standings.iter().filter_map(|(name, standing)| Some((name.as_str(), *standing, of(name)?)));
    both.filter(|(_, before, after)| before.trouble() != after.trouble()).collect()
}

impl Noise {
    fn rank(self) -> u8 {
        match self {
            Self::Beyond => 0,
            Self::Unknown => 1,
            Self::Within => 2,
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Beyond => "beyond_noise",
            Self::Unknown => "noise_unknown",
            Self::Within => "within_noise",
        }
    }
}

impl<'a> Change<'a> {
    /// Nothing if one of them has no value.
    fn new(before: &'a Series, after: &'a Series) -> Option<Self> {
        let (a, b) = (&before.sample, &after.sample);
        if a.is_empty() || b.is_empty() {
            return None;
        }
        let ratio = quotient(b.median(), a.median());
        let bounds =
            (a.len() > 1 && b.len() > 1).then(|| (quotient(b.least(), a.most()), quotient(b.most(), a.least())));
        let noise = match bounds {
            None => Noise::Unknown,
            Some((least, most)) if least > 1.0 || most < 1.0 => Noise::Beyond,
            Some(_) => Noise::Within,
        };
        let better = before.less_is_better.map(|less| (ratio < 1.0) == less);
        let disturbed = [before.disturbed, after.disturbed];
        let (name, unit) = (before.name.as_str(), before.unit.as_str());
        Some(Self { name, unit, before: a, after: b, ratio, bounds, noise, better, disturbed })
    }

    /// How far from no change, whichever way.
    fn size(&self) -> f64 {
        self.ratio.abs().ln().abs()
    }
}

/// Nothing divided by nothing is no change.
fn quotient(after: f64, before: f64) -> f64 {
    if after == 0.0 && before == 0.0 { 1.0 } else { after / before }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measurement(series: &[(&str, &[f64])]) -> Measurement {
        let series = series.iter().map(|(name, values)| Series {
            name: (*name).to_owned(),
            unit: "s".to_owned(),
            sample: Sample::new(values.iter().copied()),
            less_is_better: Some(true),
            disturbed: 0,
        });
        Measurement { series: series.collect(), ..Measurement::default() }
    }

    #[test]
    fn what_changed_most_beyond_noise_comes_first() {
        let before = measurement(&[
            ("same", &[1.0, 1.1]),
            ("single", &[1.0]),
            ("worse", &[1.0, 1.1]),
            ("better", &[8.0, 9.0]),
            ("gone", &[1.0]),
        ]);
        let after = measurement(&[
            ("same", &[1.05, 1.2]),
            ("single", &[9.0]),
            ("worse", &[1.2, 1.3]),
            ("better", &[2.0, 2.1]),
            ("new", &[1.0]),
        ]);
        let difference = Difference::new(&before, &after);
        let names: Vec<(&str, Noise)> = difference.changes.iter().map(|change| (change.name, change.noise)).collect();
        let expected =
            [("better", Noise::Beyond), ("worse", Noise::Beyond), ("single", Noise::Unknown), ("same", Noise::Within)];
        assert_eq!(names, expected);
        assert_eq!((&difference.only_before[..], &difference.only_after[..]), (&["gone"][..], &["new"][..]));
        assert_eq!(difference.changes[0].better, Some(true));
        assert!((difference.changes[1].ratio - 1.25 / 1.05).abs() < 1e-9);
        let (least, most) = difference.changes[1].bounds.unwrap();
        assert!((least - 1.2 / 1.1).abs() < 1e-9 && (most - 1.3).abs() < 1e-9);
        assert_eq!(difference.changes[2].bounds, None);
    }

    #[test]
    fn a_measurement_does_not_differ_from_itself() {
        let one = measurement(&[("time", &[1.0, 1.1]), ("zero", &[0.0, 0.0])]);
        let difference = Difference::new(&one, &one);
        assert_eq!(difference.count(Noise::Within), 2);
        assert!((difference.by_chance() - 2.0 / 3.0).abs() < 1e-9);
        assert!(difference.facts.is_empty() && difference.endings.is_empty() && difference.only_after.is_empty());
    }

    #[test]
    fn facts_and_endings_that_differ_are_found() {
        let fact = |value: &str| vec![("cpu".to_owned(), value.to_owned()), ("same".to_owned(), "x".to_owned())];
        let standing = |completed| Standing { runs: 3, completed, given_up: 3 - completed, ..Standing::default() };
        let of = |cpu: &str, completed| Measurement {
            facts: fact(cpu),
            standings: vec![("cell".to_owned(), standing(completed))],
            ..Measurement::default()
        };
        let (before, after) = (of("one", 3), of("two", 1));
        let difference = Difference::new(&before, &after);
        assert_eq!(difference.facts, [("cpu", "one", "two")]);
        assert_eq!(difference.endings, [("cell", standing(3), standing(1))]);
    }
}
