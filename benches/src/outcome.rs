//! What a benchmark found: the values of every run, and the figures that follow from them.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::machine::Machine;

/// The result of one benchmark.
#[derive(Serialize, Debug)]
pub(crate) struct Outcome {
    benchmark: &'static str,
    about: String,
    machine: Machine,
    series: Vec<Series>,
    figures: Vec<Figure>,
    notes: Vec<String>,
    /// Shown to people in place of the series and of figures that nothing was aimed for.
    #[serde(skip)]
    table: Option<String>,
}

/// The same thing, measured several times.
#[derive(Serialize, Debug)]
struct Series {
    name: String,
    unit: &'static str,
    median: f64,
    values: Vec<f64>,
}

/// A number that was aimed for, or that sums up a comparison.
#[derive(Serialize, Debug)]
struct Figure {
    name: String,
    unit: &'static str,
    value: f64,
    target: Option<Target>,
    met: Option<bool>,
}

/// What a figure should be.
#[derive(Serialize, Clone, Copy, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn met(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bound) => value >= bound,
            Self::AtMost(bound) => value <= bound,
        }
    }
}

impl Outcome {
    /// An empty result, made before the measurement: it notes how busy the machine was then.
    pub(crate) fn new(benchmark: &'static str, about: String) -> Self {
        let machine = Machine::here();
        let notes = if machine.optimised_build {
            Vec::new()
        } else {
            vec!["this is a debug build: build with --release before believing a number".to_owned()]
        };
        Self { benchmark, about, machine, series: Vec::new(), figures: Vec::new(), notes, table: None }
    }

    /// Adds the values of all runs and returns their median.
    pub(crate) fn series(&mut self, name: impl Into<String>, unit: &'static str, values: Vec<f64>) -> f64 {
        let median = median(&values);
        self.series.push(Series { name: name.into(), unit, median, values });
        median
    }

    /// Adds a number, and whether it is what it should be.
    pub(crate) fn figure(&mut self, name: impl Into<String>, unit: &'static str, value: f64, target: Option<Target>) {
        let met = target.map(|target| target.met(value));
        self.figures.push(Figure { name: name.into(), unit, value, target, met });
    }

    /// Adds something that a reader must know.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Shows people this in place of the series, and of figures without a target.
    pub(crate) fn table(&mut self, table: String) {
        self.table = Some(table);
    }

    pub(crate) fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"))
    }

    /// Writes the result beside this crate, for the project's records.
    pub(crate) fn record(&self, class: &str) -> std::io::Result<()> {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("results/{}-{class}", self.machine.date));
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(format!("{}.json", self.benchmark)), self.json() + "\n")
    }
}

pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => sorted[len / 2],
        len => f64::midpoint(sorted[len / 2 - 1], sorted[len / 2]),
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let machine = &self.machine;
        writeln!(f, "{}: {}", self.benchmark, self.about)?;
        writeln!(
            f,
            "{} x {}, {} GiB, Linux {}, {}, load {:.2} before",
            machine.cpus,
            machine.cpu,
            machine.memory_gib,
            machine.kernel,
            machine.tcp_congestion_control,
            machine.load_before
        )?;
        match &self.table {
            Some(table) => f.write_str(table)?,
            None => self.series.iter().try_for_each(|series| writeln!(f, "{series}"))?,
        }
        for figure in self.figures.iter().filter(|figure| self.table.is_none() || figure.target.is_some()) {
            writeln!(f, "{figure}")?;
        }
        self.notes.iter().try_for_each(|note| writeln!(f, "  note: {note}"))
    }
}

impl fmt::Display for Series {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:<48} {:>9.3} {:<9}", self.name, self.median, self.unit)?;
        let (least, most) = self.values.iter().fold((f64::MAX, f64::MIN), |(a, b), &v| (a.min(v), b.max(v)));
        if self.values.len() > 1 {
            write!(f, " median of {}, {least:.3} to {most:.3}", self.values.len())?;
        }
        Ok(())
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "  {:<48} {:>9.3} {:<9}", self.name, self.value, self.unit)?;
        let Some(target) = self.target else { return Ok(()) };
        match target {
            Target::AtLeast(bound) => write!(f, " at least {bound}: ")?,
            Target::AtMost(bound) => write!(f, " at most {bound}: ")?,
        }
        f.write_str(if self.met == Some(true) { "met" } else { "NOT MET" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_values() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_missed_target_shows() {
        let mut outcome = Outcome::new("test", "nothing".to_owned());
        outcome.figure("ratio", "", 0.5, Some(Target::AtLeast(0.9)));
        outcome.figure("cost", "s", 0.4, Some(Target::AtMost(0.45)));
        let shown = outcome.to_string();
        assert!(shown.contains("NOT MET") && shown.contains(": met"), "{shown}");
        assert!(outcome.json().contains("\"at_least\": 0.9"));
    }
}
