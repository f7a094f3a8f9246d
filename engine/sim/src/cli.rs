//! The command line: which runs are asked for, the line that shows progress, and what is told at the
//! end, for people or as one JSON object.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use pageferry_sim::{CanaryResult, Ending, Failure, RunResult, Statistics};

/// Prints a line. A reader that has closed the pipe has seen enough.
macro_rules! say {
    ($($text:tt)*) => {{
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}

const EXAMPLES: &str = "\
Examples:
  pageferry-sim                      2000 seeds, every cut of the hand-over, the canaries
  pageferry-sim --seeds 100000       more seeds, and only seeds
  pageferry-sim --seeds 500 --from 90000
  pageferry-sim --seed 17 -v         one run, with its trace
  pageferry-sim --exhaustive --json  every cut of the hand-over; one JSON object at the end
  pageferry-sim --case no-lanes/arrived-31/cut-link --verbose

Exit status: 0 when all rules held, 1 when one was broken or a canary was not caught, 2 for a wrong
command line.";

/// Runs the real migration protocol against a network and VMs that fail in every way, under a virtual
/// clock, and checks that no byte is lost and that the guest has one owner.
#[derive(Parser)]
#[allow(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
#[command(version, after_help = EXAMPLES)]
struct Cli {
    /// Run so many seeds.
    #[arg(long, value_name = "COUNT")]
    seeds: Option<u64>,
    /// The first of them.
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    from: u64,
    /// Run one seed.
    #[arg(long, conflicts_with_all = ["seeds", "from", "exhaustive", "canary", "case"])]
    seed: Option<u64>,
    /// Break the link at every message and at every byte of the hand-over of small migrations.
    #[arg(long)]
    exhaustive: bool,
    /// Run one case of the exhaustive ones.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["seeds", "from", "exhaustive", "canary"])]
    case: Option<String>,
    /// Prove that the checkers find broken engines.
    #[arg(long)]
    canary: bool,
    /// Print every event of a single run.
    #[arg(short, long)]
    verbose: bool,
    /// Print one JSON object at the end, and nothing else on standard output.
    #[arg(long)]
    json: bool,
}

/// All that was run.
#[derive(Default, serde::Serialize)]
struct Report {
    #[serde(skip_serializing_if = "Option::is_none")]
    seeds: Option<Statistics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    exhaustive: Option<Statistics>,
    #[serde(skip_serializing_if = "Option::is_none")]
    canaries: Option<Vec<CanaryResult>>,
    seconds: f64,
    passed: bool,
}

pub(crate) fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(seed) = cli.seed {
        return cli.finish_single(&pageferry_sim::run_seed(seed, cli.verbose));
    }
    if let Some(name) = &cli.case {
        return cli.run_case(name);
    }
    let report = cli.run();
    if cli.json {
        print_json(&report);
    } else {
        report.print();
    }
    exit_code(report.passed)
}

impl Cli {
    fn run(&self) -> Report {
        let all = self.seeds.is_none() && !self.exhaustive && !self.canary;
        let began = Instant::now();
        let mut report = Report::default();
        if let Some(count) = self.seeds.or(all.then_some(2000)) {
            let mut line = ProgressLine::new("seeds", Some(count));
            report.seeds = Some(pageferry_sim::run_seeds(self.from, count, |now| line.show(now)));
            line.clear();
        }
        if self.exhaustive || all {
            let mut line = ProgressLine::new("cuts", None);
            report.exhaustive = Some(pageferry_sim::run_exhaustive(1, |now| line.show(now)));
            line.clear();
        }
        if self.canary || all {
            report.canaries = Some(pageferry_sim::run_canaries());
        }
        report.seconds = began.elapsed().as_secs_f64();
        report.passed = report.statistics().all(Statistics::passed)
            && report.seeds.iter().all(|seeds| seeds.unmet().is_empty())
            && report.canaries.iter().flatten().all(|canary| canary.caught.is_some());
        report
    }

    fn run_case(&self, name: &str) -> ExitCode {
        if let Some(result) = pageferry_sim::run_case(name, self.verbose) {
            return self.finish_single(&result);
        }
        eprintln!("there is no case {name:?}; --exhaustive prints the names of those that break a rule");
        ExitCode::from(2)
    }

    fn finish_single(&self, result: &RunResult) -> ExitCode {
        if self.json {
            print_json(result);
        } else {
            match (&result.violation, result.ending) {
                (Some(violation), _) => say!("{}: VIOLATION: {violation}", result.name),
                (None, Some(ending)) => say!("{}: {ending}", result.name),
                (None, None) => {}
            }
            say!("{} events, {} ms of virtual time, faults: {:?}", result.steps, result.virtual_ms, result.faults);
            say!("trace hash {:016x}", result.trace);
        }
        exit_code(result.violation.is_none())
    }
}

impl Report {
    fn statistics(&self) -> impl Iterator<Item = &Statistics> {
        self.seeds.iter().chain(&self.exhaustive)
    }

    fn print(&self) {
        if let Some(statistics) = &self.seeds {
            print_statistics("random migrations", statistics);
            for coding in statistics.unmet() {
                say!("  HARDLY MET: pages that are {coding}; these runs prove nothing about them");
            }
        }
        if let Some(statistics) = &self.exhaustive {
            print_statistics("exhaustive cuts", statistics);
        }
        for canary in self.canaries.iter().flatten() {
            match &canary.caught {
                Some(caught) => say!("canary {:<28} caught: {caught}", canary.name),
                None => say!("canary {:<28} NOT CAUGHT in {} runs", canary.name, canary.runs),
            }
        }
        let broken: usize = self.statistics().map(|statistics| statistics.failures.len()).sum();
        say!("{broken} broken rules, {:.1} s", self.seconds);
    }
}

fn print_statistics(what: &str, statistics: &Statistics) {
    let hours = Duration::from_millis(statistics.virtual_ms).as_secs_f64() / 3600.0;
    say!("{what}: {} runs, {} events, {hours:.0} h of virtual time", statistics.runs, statistics.events);
    for (ending, count) in &statistics.endings {
        say!("  {:<44} {count:>7}", ending.to_string());
    }
    say!("  {:<44} {:>7}", "(a side had to ask who owns the guest)", statistics.answered);
    let faults: Vec<String> = statistics.faults.iter().map(|(fault, count)| format!("{fault} {count}")).collect();
    say!("  faults: {}", if faults.is_empty() { "none".to_owned() } else { faults.join(", ") });
    let codings: Vec<String> =
        statistics.codings.each().iter().map(|(coding, pages)| format!("{coding} {pages}")).collect();
    say!("  pages: {}", codings.join(", "));
    for failure in &statistics.failures {
        print_failure(failure);
    }
}

fn print_failure(failure: &Failure) {
    say!("  VIOLATION in {}: {}", failure.name, failure.violation);
    say!("    after {:?}; replay: cargo run --release -p pageferry-sim -- {}", failure.faults, failure.replay);
}

fn print_json(value: &impl serde::Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => say!("{text}"),
        Err(error) => eprintln!("the report cannot be written as JSON: {error}"),
    }
}

fn exit_code(passed: bool) -> ExitCode {
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One line on a terminal that says how far it is.
struct ProgressLine {
    what: &'static str,
    count: Option<u64>,
    shown: Option<Instant>,
    terminal: bool,
}

impl ProgressLine {
    fn new(what: &'static str, count: Option<u64>) -> Self {
        Self { what, count, shown: None, terminal: std::io::stderr().is_terminal() }
    }

    fn show(&mut self, now: &Statistics) {
        let recent = self.shown.is_some_and(|shown| shown.elapsed() < Duration::from_millis(100));
        if !self.terminal || recent {
            return;
        }
        self.shown = Some(Instant::now());
        let of = self.count.map(|count| format!(" of {count}")).unwrap_or_default();
        let (completed, broken) = (now.ended(Ending::Completed), now.failures.len());
        let what = self.what;
        eprint!("\r{} {of} {what}, {completed} migrations completed, {broken} broken rules   ", now.runs);
        // It is only a progress line.
        let _ = std::io::stderr().flush();
    }

    fn clear(&self) {
        if self.shown.is_some() {
            eprint!("\r{:78}\r", "");
        }
    }
}
