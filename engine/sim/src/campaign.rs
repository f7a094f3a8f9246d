//! Many runs: spread over all cores, counted, and the broken rules kept with the command that
//! replays them. What is counted does not depend on the order in which the runs end.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use pageferry::stats::Stages;

use crate::run::{Ending, RunResult};

/// Fewer runs say nothing about what random runs meet.
const TELLING_RUNS: u64 = 100;

/// A run that broke a rule.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct Failure {
    /// Which run.
    pub name: String,
    /// The rule that was broken first.
    pub violation: String,
    /// What had gone wrong by plan.
    pub faults: Vec<String>,
    /// The arguments that replay it with its whole trace.
    pub replay: String,
    #[serde(skip)]
    index: u64,
}

/// Pages by how they were given: what the encoders have met.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
#[non_exhaustive]
pub struct Codings {
    /// All zeros.
    pub zero: u64,
    /// As last sent: nothing was sent.
    pub unchanged: u64,
    /// One repeated value.
    pub pattern: u64,
    /// What changed since it was last sent.
    pub delta: u64,
    /// A reference to an equal page.
    pub copy: u64,
    /// Whole.
    pub literal: u64,
    /// Of these, written straight into the destination's memory.
    pub written: u64,
    /// Put off as a copy, and sent whole because nothing held the content any more.
    pub copy_turned_literal: u64,
    /// Put off as a copy, and zero when it was read again.
    pub copy_turned_zero: u64,
    /// Not sent, because the guest would have written it again.
    pub spared: u64,
}

impl Codings {
    /// Counts a batch in, of a round's first or second step.
    pub(crate) fn add(&mut self, stages: &Stages, copies: bool) {
        if copies {
            self.copy_turned_literal += stages.literal_pages;
            self.copy_turned_zero += stages.zero_pages;
        } else {
            self.literal += stages.literal_pages;
            self.zero += stages.zero_pages;
        }
        self.unchanged += stages.unchanged_pages;
        self.pattern += stages.pattern_pages;
        self.delta += stages.delta_pages;
        self.copy += stages.copied_pages;
    }

    pub(crate) fn join(&mut self, other: &Self) {
        self.zero += other.zero;
        self.unchanged += other.unchanged;
        self.pattern += other.pattern;
        self.delta += other.delta;
        self.copy += other.copy;
        self.literal += other.literal;
        self.written += other.written;
        self.copy_turned_literal += other.copy_turned_literal;
        self.copy_turned_zero += other.copy_turned_zero;
        self.spared += other.spared;
    }

    /// Each coding by its name.
    pub fn each(&self) -> [(&'static str, u64); 10] {
        [
            ("zero", self.zero),
            ("unchanged", self.unchanged),
            ("pattern", self.pattern),
            ("delta", self.delta),
            ("copy", self.copy),
            ("literal", self.literal),
            ("written", self.written),
            ("copy turned literal", self.copy_turned_literal),
            ("copy turned zero", self.copy_turned_zero),
            ("spared", self.spared),
        ]
    }
}

/// What many runs have shown.
#[derive(Clone, Debug, Default, serde::Serialize)]
#[non_exhaustive]
pub struct Statistics {
    /// Runs that have ended.
    pub runs: u64,
    /// How they ended.
    pub endings: BTreeMap<Ending, u64>,
    /// Runs in which a side asked who owns the guest and was answered.
    pub answered: u64,
    /// What went wrong by plan, by kind.
    pub faults: BTreeMap<String, u64>,
    /// Pages by how they were given.
    pub codings: Codings,
    /// Events handled.
    pub events: u64,
    /// Virtual time that passed, in milliseconds.
    pub virtual_ms: u64,
    /// Broken rules.
    pub failures: Vec<Failure>,
}

impl Statistics {
    /// Whether no rule was broken.
    pub fn passed(&self) -> bool {
        self.failures.is_empty()
    }

    /// Codings of pages that so many random runs should have met, and have not: one page for every 50
    /// runs. A few runs prove nothing either way.
    pub fn unmet(&self) -> Vec<&'static str> {
        let least = if self.runs < TELLING_RUNS { 0 } else { self.runs / 50 };
        self.codings.each().iter().filter(|(_, pages)| *pages < least).map(|(coding, _)| *coding).collect()
    }

    /// How many runs ended so.
    pub fn ended(&self, ending: Ending) -> u64 {
        self.endings.get(&ending).copied().unwrap_or_default()
    }

    fn add(&mut self, index: u64, done: Done) {
        self.runs += 1;
        let result = match done.result {
            Ok(result) => result,
            Err(panic) => return self.fail(index, done.case, panic, Vec::new()),
        };
        self.events += result.steps;
        self.codings.join(&result.codings);
        self.virtual_ms += result.virtual_ms;
        self.answered += u64::from(result.answered);
        for fault in &result.faults {
            *self.faults.entry(fault.clone()).or_default() += 1;
        }
        if let Some(ending) = result.ending {
            *self.endings.entry(ending).or_default() += 1;
        }
        if let Some(violation) = result.violation {
            self.fail(index, done.case, violation, result.faults);
        }
    }

    fn fail(&mut self, index: u64, case: Case, violation: String, faults: Vec<String>) {
        let at = self.failures.partition_point(|failure| failure.index < index);
        self.failures.insert(at, Failure { name: case.name, violation, faults, replay: case.replay, index });
    }
}

/// The name of a run, and how to see it again.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) replay: String,
}

struct Done {
    case: Case,
    /// Or what the engine said when it panicked.
    result: Result<RunResult, String>,
}

/// Runs all cases below `count`, and tells `watch` after each of them.
pub(crate) fn run_all(
    count: u64,
    case: impl Fn(u64) -> Case + Sync,
    run: impl Fn(u64) -> RunResult + Sync,
    mut watch: impl FnMut(&Statistics),
) -> Statistics {
    let next = AtomicU64::new(0);
    let mut statistics = Statistics::default();
    let (sender, results) = mpsc::channel();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            let sender = sender.clone();
            scope.spawn({
                let (next, case, run) = (&next, &case, &run);
                move || work(next, count, case, run, &sender)
            });
        }
        drop(sender);
        for (index, done) in results {
            statistics.add(index, done);
            watch(&statistics);
        }
    });
    statistics
}

fn work(
    next: &AtomicU64,
    count: u64,
    case: &impl Fn(u64) -> Case,
    run: &impl Fn(u64) -> RunResult,
    results: &Sender<(u64, Done)>,
) {
    loop {
        let index = next.fetch_add(1, Ordering::Relaxed);
        if index >= count {
            return;
        }
        let result = catch_unwind(AssertUnwindSafe(|| run(index))).map_err(|panic| told(&*panic));
        if results.send((index, Done { case: case(index), result })).is_err() {
            return;
        }
    }
}

fn told(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("a panic: {}", text.unwrap_or("of an unknown kind"))
}

/// Runs the seeds from `from`, `count` of them.
pub fn run_seeds(from: u64, count: u64, watch: impl FnMut(&Statistics)) -> Statistics {
    let case = |index| {
        let seed = from + index;
        Case { name: format!("seed {seed}"), replay: format!("--seed {seed} -v") }
    };
    run_all(count, case, |index| crate::run::run_seed(from + index, false), watch)
}
