//! The matrix of guests, links and engines: measured, kept, and drawn.

mod answers;
mod conduct;
mod keeping;
mod plan;
mod presets;

use std::fmt;
use std::path::PathBuf;

use clap::Args;

use self::conduct::Conductor;
use self::keeping::Folder;
use self::plan::Plan;
use self::presets::Preset;
use super::size;
use crate::movers::{Memory, QemuSetting, Setting};
use crate::network::LinkSpec;
use crate::report::table;
use crate::shown::{Shown, say};
use crate::study::Study;
use crate::{BenchError, interrupt};

const EXAMPLES: &str = "\
Guests run as KVM virtual machines: idle; few20 changes a few bytes a page, 20 MiB/s; full200 rewrites whole pages, 200 MiB/s; any
other number will do; random-idle and so on hold incompressible memory. mix and random are memory that nobody writes.
Links are network namespaces joined by veth and shaped by tbf, which takes root; without that, a relay in this process stands in
for them. 1gbit+20ms adds distance.

Examples:
  pageferry-bench harness                              (minutes: what 100 Mbit/s and 1 Gbit/s do to 256 MiB)
  pageferry-bench harness --preset paper --record 2cpu-xeon
  pageferry-bench harness --link 1gbit+20ms --guest few20 --size 512M --ours tcp --ours tls=tls:// --no-qemu
  pageferry-bench report pageferry-harness/harness-quick.json --html again.html

Exit codes: 0 measured, 1 failed or a wrong answer, 3 this machine cannot measure it, 130 interrupted (what was measured is kept)";

/// `pageferry-bench harness`.
#[derive(Args, Debug)]
#[command(after_help = EXAMPLES)]
pub(crate) struct HarnessOptions {
    /// What to run; options change its parts
    #[arg(long, value_enum, default_value = "quick")]
    preset: Preset,
    /// Run the tiny preset and check its answers instead of its times
    #[arg(long, conflicts_with = "preset")]
    test: bool,
    /// Links, such as 100mbit, 1gbit, unshaped, 1gbit+20ms
    #[arg(long, value_delimiter = ',')]
    link: Vec<LinkSpec>,
    /// Guests to move, such as idle, few20, full60, random-idle
    #[arg(long, value_delimiter = ',')]
    guest: Vec<Memory>,
    /// Memory of a guest
    #[arg(long, value_parser = size)]
    size: Option<u64>,
    /// `migrate` with these arguments for `send` (and after ` -- ` for `receive`) under this name; repeat it to compare
    #[arg(long, value_name = "NAME=ARGUMENTS")]
    ours: Vec<Setting>,
    /// QEMU in these settings: plain, xbzrle, multifd-2, multifd-2-zstd, auto-converge, postcopy, or some joined by +
    #[arg(long, value_name = "SETTING", value_delimiter = ',')]
    qemu: Vec<QemuSetting>,
    /// Leave QEMU out
    #[arg(long, conflicts_with = "qemu")]
    no_qemu: bool,
    /// How often everything is run, each engine in its turn
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    turns: Option<u32>,
    /// Seconds after which a migration is given up; an engine that was is not tried again there
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86_400))]
    limit: Option<u64>,
    /// Use the relay even where network namespaces can be made
    #[arg(long)]
    relay: bool,
    /// Where the study (JSON, CSV), the report (HTML) and its picture (SVG) are written, if not to the project's records
    #[arg(long, value_name = "FOLDER", default_value = "pageferry-harness")]
    out: PathBuf,
    /// The `migrate` program; without it, the one beside this program
    #[arg(long, value_name = "FILE")]
    migrate: Option<PathBuf>,
}

impl HarnessOptions {
    /// Whether something else is measured than the preset says.
    fn changes_the_matrix(&self) -> bool {
        let lists = self.link.len() + self.guest.len() + self.ours.len() + self.qemu.len();
        lists > 0 || self.no_qemu || self.relay || self.size.is_some() || self.turns.is_some() || self.limit.is_some()
    }
}

/// What was measured, and where it is kept.
#[derive(Debug)]
pub(crate) struct Finished {
    study: Study,
    folder: Folder,
}

/// `pageferry-bench harness`.
pub(crate) fn harness(options: &HarnessOptions, record: Option<&str>) -> Result<Finished, BenchError> {
    interrupt::listen()?;
    let plan = Plan::new(options)?;
    plan.check_rights()?;
    let folder = Folder::new(&options.out, record, plan.name())?;
    let mut conductor = Conductor::new(&plan, &folder)?;
    let run = conductor.run();
    let (study, wrong) = conductor.finish(run.is_err());
    // Without a run there is nothing to keep, and nothing to put in place of what is there.
    let kept = if study.runs.is_empty() { Ok(()) } else { folder.keep_all(&study) };
    if kept.is_err() || wrong.is_some() {
        // Nothing else will show it.
        say(format_args!("{}", table(&study)));
    }
    if let Err(error) = run {
        match kept {
            Ok(()) if study.runs.is_empty() => say(format_args!("no run was over: nothing is kept")),
            Ok(()) => say(format_args!("{} run(s) are kept in {}", study.runs.len(), folder.path().display())),
            Err(lost) => say(format_args!("{lost}; the table above is all that is left")),
        }
        return Err(error);
    }
    kept?;
    if let Some(wrong) = wrong {
        return Err(BenchError::Tool(wrong));
    }
    if options.test {
        answers::check(&study)?;
    }
    answers::check_any(&study)?;
    Ok(Finished { study, folder })
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&table(&self.study))?;
        for path in self.folder.files() {
            writeln!(f, "wrote {}", path.display())?;
        }
        Ok(())
    }
}

impl Shown for Finished {
    fn json(&self) -> String {
        serde_json::to_string_pretty(&self.study).unwrap_or_default()
    }

    /// It is with them already.
    fn record(&self, _class: &str) -> Result<(), BenchError> {
        Ok(())
    }
}
