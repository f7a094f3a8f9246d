//! Two measurements side by side: what changed, and whether that is more than noise.

use std::fmt;
use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use crate::BenchError;
use crate::report::difference::{Change, Difference, Measurement, Noise};
use crate::report::group::{Sample, Standing};
use crate::report::{kept, words};
use crate::shown::Shown;

const EXAMPLES: &str = "\
Examples:
  pageferry-bench compare before.json after.json
  pageferry-bench compare benches/results/2026-11-22-2cpu-xeon benches/results/2026-12-01-2cpu-xeon

A change is beyond noise if the ranges of the runs before and after do not overlap; of a single run nobody knows. Behind a
change stands how many of its runs the machine's own host disturbed, if any: measure those again before you believe it.";

/// `pageferry-bench compare`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CompareOptions {
    /// A study, a record of another benchmark, or a folder of them
    before: PathBuf,
    /// The same, of a later day or another machine
    after: PathBuf,
    /// List what is within noise too
    #[arg(long)]
    all: bool,
}

/// Both, read.
#[derive(Debug)]
pub(crate) struct Comparison {
    names: [String; 2],
    before: Measurement,
    after: Measurement,
    all: bool,
}

/// `pageferry-bench compare`.
pub(crate) fn compare(options: &CompareOptions) -> Result<Comparison, BenchError> {
    let (before, after) = (kept::measurement(&options.before)?, kept::measurement(&options.after)?);
    let names = [&options.before, &options.after].map(|path| path.display().to_string());
    let comparison = Comparison { names, before, after, all: options.all };
    let difference = comparison.difference();
    if difference.changes.is_empty() && difference.endings.is_empty() {
        return Err(BenchError::Tool(format!(
            "{} and {} have nothing in common",
            comparison.names[0], comparison.names[1]
        )));
    }
    Ok(comparison)
}

impl Comparison {
    fn difference(&self) -> Difference<'_> {
        Difference::new(&self.before, &self.after)
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let difference = self.difference();
        writeln!(f, "A: {}\nB: {}", self.names[0], self.names[1])?;
        if difference.facts.is_empty() {
            writeln!(f, "the same machine, programs and guests, as far as was noted")?;
        } else {
            writeln!(f, "\nNOT the same in both:")?;
            difference.facts.iter().try_for_each(|(name, a, b)| writeln!(f, "  {name}: A {a}, B {b}"))?;
        }
        if !difference.endings.is_empty() {
            writeln!(f, "\nhow runs ended:")?;
            let all = difference.endings.iter();
            all.into_iter().try_for_each(|(name, a, b)| writeln!(f, "  {name}: A {}, B {}", ended(*a), ended(*b)))?;
        }
        self.changes(f, &difference)?;
        for (which, names) in [("A", &difference.only_before), ("B", &difference.only_after)] {
            if !names.is_empty() {
                writeln!(f, "\nonly in {which}: {} of what was measured, such as {}", names.len(), names[0])?;
            }
        }
        let skipped = self.before.skipped.iter().chain(&self.after.skipped);
        skipped.into_iter().try_for_each(|reason| writeln!(f, "  skipped: {reason}"))
    }
}

impl Comparison {
    fn changes(&self, f: &mut fmt::Formatter<'_>, difference: &Difference<'_>) -> fmt::Result {
        let [beyond, unknown, within] =
            [Noise::Beyond, Noise::Unknown, Noise::Within].map(|noise| difference.count(noise));
        if beyond == 0 && within > 0 {
            writeln!(f, "\nno change beyond noise")?;
        }
        let heads = [
            (Noise::Beyond, beyond, "changed by more than noise"),
            (Noise::Unknown, unknown, "a single run on one side at least: nobody knows how much is noise"),
            (Noise::Within, within, "within noise"),
        ];
        for (noise, count, head) in heads {
            if count == 0 {
                continue;
            }
            let shows = noise != Noise::Within || self.all;
            let more = if shows { "" } else { " (--all lists it)" };
            let chance = match noise {
                Noise::Beyond => format!(
                    " of {}; if nothing had changed, chance alone would show {:.1}",
                    beyond + within,
                    difference.by_chance()
                ),
                _ => String::new(),
            };
            writeln!(f, "\n{head}: {count}{chance}{more}")?;
            if shows {
                let changes: Vec<&Change<'_>> =
                    difference.changes.iter().filter(|change| change.noise == noise).collect();
                let wide = changes.iter().map(|change| change.name.chars().count()).max().unwrap_or(0);
                changes.iter().try_for_each(|change| line(f, change, wide))?;
            }
        }
        Ok(())
    }
}

fn ended(standing: Standing) -> String {
    standing.trouble().unwrap_or_else(|| "all completed".to_owned())
}

fn line(f: &mut fmt::Formatter<'_>, change: &Change<'_>, wide: usize) -> fmt::Result {
    let shown = |sample: &Sample| value(sample.median(), change.unit);
    let bounds = change
        .bounds
        .map_or_else(String::new, |(least, most)| format!("  ({} to {})", words::ratio(least), words::ratio(most)));
    let better = match change.better {
        Some(true) if change.noise == Noise::Beyond => "  better",
        Some(false) if change.noise == Noise::Beyond => "  WORSE",
        _ => "",
    };
    let (name, before, after, ratio) =
        (change.name, shown(change.before), shown(change.after), words::ratio(change.ratio));
    let disturbed = disturbed(change);
    writeln!(f, "  {name:<wide$}  {before:>12} -> {after:>12}  {ratio:>8}{bounds}{better}{disturbed}")
}

/// Runs that the machine's own host disturbed: `  (disturbed: 2 of A, 1 of B)`.
fn disturbed(change: &Change<'_>) -> String {
    let sides = ["A", "B"].into_iter().zip(change.disturbed).filter(|(_, runs)| *runs > 0);
    let sides: Vec<String> = sides.map(|(side, runs)| format!("{runs} of {side}")).collect();
    if sides.is_empty() { String::new() } else { format!("  (disturbed: {})", sides.join(", ")) }
}

fn value(value: f64, unit: &str) -> String {
    match unit {
        "s" => words::seconds(value),
        "B" => words::bytes(value),
        "B/s" => words::bits(value * 8.0),
        other => format!("{} {other}", words::digits(value)).trim_end().to_owned(),
    }
}

impl Shown for Comparison {
    fn json(&self) -> String {
        let difference = self.difference();
        let sample = |sample: &Sample| json!({"median": sample.median(), "least": sample.least(), "most": sample.most(), "values": sample.len()});
        let changes = difference.changes.iter().map(|change| {
            json!({"name": change.name, "unit": change.unit, "a": sample(change.before), "b": sample(change.after),
                "ratio": change.ratio, "bounds": change.bounds, "noise": change.noise.word(), "better": change.better,
                "disturbed_a": change.disturbed[0], "disturbed_b": change.disturbed[1]})
        });
        let facts = difference.facts.iter().map(|(name, a, b)| json!({"name": name, "a": a, "b": b}));
        let endings =
            difference.endings.iter().map(|(name, a, b)| json!({"name": name, "a": ended(*a), "b": ended(*b)}));
        let found = json!({"a": self.names[0], "b": self.names[1], "facts": facts.collect::<Vec<_>>(),
            "endings": endings.collect::<Vec<_>>(), "changes": changes.collect::<Vec<_>>(), "only_in_a": difference.only_before,
            "only_in_b": difference.only_after, "beyond_noise_by_chance": difference.by_chance()});
        format!("{found:#}")
    }
}
