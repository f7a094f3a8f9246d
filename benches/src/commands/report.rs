//! Draws again from a study that was kept.

use std::fmt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use crate::report::group::{Quantity, cell, cells};
use crate::report::verdict::{duels, losses, tally};
use crate::report::{csv, html, svg, table};
use crate::shown::{Shown, say};
use crate::study::{Study, file};
use crate::{BenchError, keep};

/// `pageferry-bench report`.
#[derive(Args, Debug)]
pub(crate) struct ReportOptions {
    /// A study that `harness` has written
    study: PathBuf,
    /// Write the whole report to this file, as one page that needs nothing else
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write every run to this file, as comma-separated values
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
    /// Write a picture of total time and downtime over two links to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// A study, shown as a table of medians.
#[derive(Debug)]
pub(crate) struct Summary(Study);

/// `pageferry-bench report`.
pub(crate) fn report(options: &ReportOptions) -> Result<Summary, BenchError> {
    let study = file::read(&options.study)?;
    write(options.html.as_deref(), || html(&study))?;
    write(options.csv.as_deref(), || csv(&study))?;
    write(options.svg.as_deref(), || svg(&study))?;
    Ok(Summary(study))
}

fn write(path: Option<&Path>, draw: impl FnOnce() -> String) -> Result<(), BenchError> {
    let Some(path) = path else { return Ok(()) };
    keep::write(path, &draw())?;
    say(format_args!("wrote {}", path.display()));
    Ok(())
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table(&self.0))
    }
}

impl Shown for Summary {
    /// Medians with their ranges, and where ours is behind.
    fn json(&self) -> String {
        let study = &self.0;
        let groups = cells(study).flat_map(|(link, guest)| cell(study, link, guest));
        let groups = groups.map(|group| {
            let quantities = Quantity::ALL.map(|quantity| {
                let sample = group.sample(quantity);
                json!({"quantity": quantity.name(), "unit": quantity.unit(), "values": sample.len(),
                    "median": sample.median(), "least": sample.least(), "most": sample.most()})
            });
            let standing = group.standing;
            json!({"link": group.link.name, "guest": group.guest.name, "mover": group.mover.name, "runs": standing.runs,
                "completed": standing.completed, "given_up": standing.given_up, "failed": standing.failed,
                "unverified": standing.unverified, "quantities": quantities})
        });
        let (duels, groups) = (duels(study), groups.collect::<Vec<_>>());
        let behind = losses(study, &duels).into_iter().map(|loss| {
            json!({"link": loss.link, "guest": loss.guest, "mover": loss.mover, "quantity": loss.quantity.name(),
                "words": loss.words, "reason": loss.reason})
        });
        let tally = tally(&duels);
        let found = json!({"preset": study.preset, "machine": study.machine, "interrupted": study.interrupted, "groups": groups,
            "behind": behind.collect::<Vec<_>>(), "better": tally.better, "level": tally.level, "worse": tally.worse,
            "only_ours_finished": tally.alone, "ours_unfinished": tally.unfinished});
        format!("{found:#}")
    }
}
