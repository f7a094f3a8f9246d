//! Runs the matrix: every engine in its turn, cell by cell, with word of how it goes.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::keeping::Folder;
use super::plan::{Plan, PlannedGuest, PlannedLink};
use crate::machine::Machine;
use crate::movers::{Moved, Mover, Task};
use crate::network::Network;
use crate::process::Usage;
use crate::report::{group::is_disturbed, words};
use crate::scratch::Scratch;
use crate::shown::say;
use crate::steal::CpuClock;
use crate::study::model::{DOWNTIME_SECONDS, Expected, expect};
use crate::study::{Cost, End, FORMAT, Link, PlainCopy, Remaining, Run, Study};
use crate::{BenchError, interrupt};

/// What starting, filling and checking take beside a migration itself, for the estimate of what is left.
const AROUND: Duration = Duration::from_secs(6);

/// Of what is left over time, so many points are kept of a run: more than a chart can show.
const MOST_POINTS: usize = 240;

/// Who runs a plan, and what was measured so far.
#[derive(Debug)]
pub(super) struct Conductor<'a> {
    plan: &'a Plan,
    folder: &'a Folder,
    scratch: Scratch,
    study: Study,
    /// Link, guest and mover of which a run was given up.
    hopeless: HashSet<[String; 3]>,
    /// Whether the operator has been told that runs cannot be kept.
    warned: bool,
    /// The first wrong answer: the others are still measured, but it is what must be said at the end.
    wrong: Option<String>,
}

impl<'a> Conductor<'a> {
    pub(super) fn new(plan: &'a Plan, folder: &'a Folder) -> Result<Self, BenchError> {
        let study = Study {
            format: FORMAT,
            preset: plan.name().to_owned(),
            command: command_line(std::env::args()),
            machine: Machine::here(),
            links: Vec::new(),
            guests: plan.guests.iter().map(|guest| guest.subject.facts()).collect(),
            movers: plan.movers.iter().map(|mover| mover.facts()).collect(),
            runs: Vec::new(),
            copies: Vec::new(),
            remarks: Vec::new(),
            notes: plan.notes.clone(),
            // Until it is whole.
            interrupted: true,
        };
        let (scratch, hopeless) = (Scratch::new()?, HashSet::new());
        Ok(Self { plan, folder, scratch, study, hopeless, warned: false, wrong: None })
    }

    /// What was measured, and the first wrong answer.
    pub(super) fn finish(mut self, interrupted: bool) -> (Study, Option<String>) {
        self.study.interrupted = interrupted;
        (self.study, self.wrong)
    }

    /// Runs everything. What was measured before an error stays.
    pub(super) fn run(&mut self) -> Result<(), BenchError> {
        let plan = self.plan;
        for note in &plan.notes {
            say(format_args!("note: {note}"));
        }
        say(format_args!("{} migrations, about {}", self.left(0, 0, 0).0, minutes(self.left(0, 0, 0).1)));
        for (at, link) in plan.links.iter().enumerate() {
            self.over(at, link)?;
        }
        Ok(())
    }

    fn over(&mut self, at: usize, link: &PlannedLink) -> Result<(), BenchError> {
        let plan = self.plan;
        let network = if plan.relayed { Network::relayed(link.spec)? } else { Network::new(link.spec)? };
        self.study.links.push(Link {
            name: link.spec.to_string(),
            bits_per_second: link.spec.rate.bits_per_second(),
            rtt_ms: link.spec.rtt.as_secs_f64() * 1e3,
            shaper: network.shaper(),
            goodputs: Vec::new(),
        });
        for turn in 1..=link.turns {
            let goodput = network.try_out()?;
            self.study.links[at].goodputs.push(goodput);
            say(format_args!(
                "{}, turn {turn} of {}: a plain copy gets {}",
                link.spec,
                link.turns,
                efficiency(link, goodput)
            ));
            for (index, guest) in plan.guests.iter().enumerate() {
                self.cell(&network, link, guest, turn)?;
                let (runs, time) = self.left(at, turn as usize - 1, index + 1);
                say(format_args!("  {runs} migrations left, about {}", minutes(time)));
            }
        }
        Ok(())
    }

    /// All who move a guest over a link, one after the other.
    fn cell(
        &mut self,
        network: &Network,
        link: &PlannedLink,
        guest: &PlannedGuest,
        turn: u32,
    ) -> Result<(), BenchError> {
        let plan = self.plan;
        let (bytes, name) = (guest.subject.bytes, guest.subject.memory.to_string());
        if guest.is_beside_copy() {
            let seconds = network.copy(bytes, link.limit.max(floor(link, bytes) * 3))?;
            say(format_args!("  {name:<12} {:<28} {seconds:.2} s", "plain copy"));
            self.study.copies.push(PlainCopy { link: link.spec.to_string(), guest: name.clone(), turn, seconds });
        }
        for mover in guest.movers(&plan.movers) {
            let key = [link.spec.to_string(), name.clone(), mover.name().to_owned()];
            if self.hopeless.contains(&key) {
                say(format_args!(
                    "  {name:<12} {:<28} not tried again: it was given up in an earlier turn",
                    mover.name()
                ));
                continue;
            }
            let run = self.migrate(network, link, guest, mover, turn)?;
            say(format_args!("  {name:<12} {:<28} {}", mover.name(), in_words(&run)));
            if run.end == End::GivenUp {
                self.hopeless.insert(key);
            }
            self.study.runs.push(run);
            self.keep();
        }
        Ok(())
    }

    fn migrate(
        &mut self,
        network: &Network,
        link: &PlannedLink,
        guest: &PlannedGuest,
        mover: &dyn Mover,
        turn: u32,
    ) -> Result<Run, BenchError> {
        // What nobody can pack takes as long as the link makes it.
        let floor = if guest.is_beside_copy() { floor(link, guest.subject.bytes) * 3 / 2 } else { Duration::ZERO };
        let limit = link.limit.max(floor);
        let (started, clock) = (Instant::now(), CpuClock::now());
        let moved = mover.run(Task { network, subject: &guest.subject, scratch: &self.scratch, limit });
        let run = |end| Run {
            link: link.spec.to_string(),
            guest: guest.subject.memory.to_string(),
            mover: mover.name().to_owned(),
            turn,
            end,
            seconds: started.elapsed().as_secs_f64(),
            downtime_ms: None,
            stalls: crate::study::Stalls::default(),
            rounds: 0,
            remaining: Vec::new(),
            wire_bytes: 0,
            source: Cost::default(),
            destination: Cost::default(),
            throttle_percent: 0.0,
            guest_bytes_per_second: None,
            in_postcopy: None,
            stolen_share: clock.zip(CpuClock::now()).and_then(|(before, now)| before.stolen_share(now)),
            verified: Vec::new(),
            stages: Vec::new(),
        };
        match moved {
            Ok(moved) => {
                let end = if moved.converged { End::Completed } else { End::GivenUp };
                Ok(measured(run(end), moved))
            }
            Err(error @ (BenchError::Interrupted | BenchError::Lacking(_))) => Err(error),
            // One that failed says something of its engine; the others go on.
            Err(error) => {
                interrupt::check()?;
                let run = run(End::Failed(error.to_string()));
                if matches!(error, BenchError::Wrong(_)) && self.wrong.is_none() {
                    self.wrong = Some(format!("{} of {} over {}: {error}", run.mover, run.guest, run.link));
                }
                Ok(run)
            }
        }
    }

    /// Keeps what there is. A disk that is full now may have room at the end.
    fn keep(&mut self) {
        if let Err(error) = self.folder.keep(&self.study)
            && !self.warned
        {
            self.warned = true;
            say(format_args!("warning: {error}; the runs so far are in memory alone"));
        }
    }

    /// Migrations from here on, and how long they may take if the model is right.
    fn left(&self, link: usize, turn: usize, guest: usize) -> (usize, Duration) {
        let (mut runs, mut time) = (0, Duration::ZERO);
        for (at, planned) in self.plan.links.iter().enumerate().skip(link) {
            for number in 0..planned.turns as usize {
                for (index, cell) in self.plan.guests.iter().enumerate() {
                    if at == link && (number, index) < (turn, guest) {
                        continue;
                    }
                    for mover in cell.movers(&self.plan.movers) {
                        let name = cell.subject.memory.to_string();
                        let key = [planned.spec.to_string(), name, mover.name().to_owned()];
                        if !self.hopeless.contains(&key) {
                            runs += 1;
                            time += guess(planned, cell) + AROUND;
                        }
                    }
                }
            }
        }
        (runs, time)
    }
}

/// How this program was started, wherever it lies.
fn command_line(mut words: impl Iterator<Item = String>) -> String {
    let program = words.next().unwrap_or_default();
    let name = program.rsplit('/').next().unwrap_or_default().to_owned();
    [name].into_iter().chain(words).collect::<Vec<_>>().join(" ")
}

/// The least time that so many bytes take over a link.
fn floor(link: &PlannedLink, bytes: u64) -> Duration {
    let rate = link.spec.rate.bits_per_second().unwrap_or(u64::MAX);
    Duration::from_secs_f64(bytes as f64 * 8.0 / rate as f64)
}

/// How long a migration may take if the model is right.
fn guess(link: &PlannedLink, guest: &PlannedGuest) -> Duration {
    let Some(bits) = link.spec.rate.bits_per_second() else { return Duration::from_secs(1) };
    match expect(&guest.subject.facts(), bits as f64 / 8.0, DOWNTIME_SECONDS) {
        Expected::Ends { seconds, .. } => Duration::from_secs_f64(seconds).min(link.limit),
        Expected::Never { .. } => link.limit,
    }
}

fn measured(run: Run, moved: Moved) -> Run {
    Run {
        seconds: moved.seconds,
        downtime_ms: moved.downtime_ms,
        stalls: moved.stalls,
        rounds: moved.rounds,
        remaining: thinned(&moved.remaining),
        wire_bytes: moved.wire_bytes,
        source: cost(moved.source),
        destination: cost(moved.destination),
        throttle_percent: moved.throttle_percent,
        guest_bytes_per_second: moved.guest_bytes_per_second,
        in_postcopy: Some(moved.in_postcopy),
        verified: moved.verified,
        stages: moved.stages,
        ..run
    }
}

fn cost(usage: Usage) -> Cost {
    let Usage { cpu_seconds, peak_rss_bytes, beside_guest_bytes } = usage;
    Cost { cpu_seconds, peak_rss_bytes, beside_guest_bytes }
}

/// Fewer points: the first and last of every round stay.
fn thinned(all: &[Remaining]) -> Vec<Remaining> {
    let step = all.len().div_ceil(MOST_POINTS).max(1);
    let ends_round = |index: usize| {
        let round = |index: usize| all.get(index).map(|point| point.round);
        index == 0 || round(index - 1) != round(index) || round(index + 1) != round(index)
    };
    let kept = (0..all.len()).filter(|index| index % step == 0 || ends_round(*index));
    kept.map(|index| all[index]).collect()
}

fn in_words(run: &Run) -> String {
    let end = match &run.end {
        End::Completed => String::new(),
        End::GivenUp => ", GIVEN UP".to_owned(),
        End::Failed(why) => return format!("FAILED: {why}"),
    };
    let host = run.stolen_share.filter(|_| is_disturbed(run));
    let host = host
        .map_or_else(String::new, |share| format!(", while the host took {} of the CPU time", words::percent(share)));
    let stall = run.stalls.during_ms.map_or_else(String::new, |stall| format!(", stall {stall:.0} ms"));
    format!("{:.2} s{stall}, {:.1} MiB on the wire{end}{host}", run.seconds, run.wire_bytes as f64 / f64::from(1 << 20))
}

fn efficiency(link: &PlannedLink, goodput: f64) -> String {
    let megabits = goodput * 8.0 / 1e6;
    match link.spec.rate.bits_per_second() {
        Some(bits) => format!("{megabits:.1} Mbit/s, {:.1} % of the rate", megabits * 1e8 / bits as f64),
        None => format!("{megabits:.0} Mbit/s"),
    }
}

fn minutes(time: Duration) -> String {
    format!("{} min", time.as_secs().div_ceil(60))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_tells_the_command_and_not_where_the_program_lies() {
        let words = ["/home/me/target/release/pageferry-bench", "harness", "--turns", "3"].map(str::to_owned);
        assert_eq!(command_line(words.into_iter()), "pageferry-bench harness --turns 3");
    }

    #[test]
    fn thinning_keeps_the_ends_of_rounds() {
        let point = |index: u64| Remaining { seconds: index as f64, bytes: 10_000 - index, round: index / 700 };
        let all: Vec<Remaining> = (0..2_000).map(point).collect();
        let kept = thinned(&all);
        assert!(kept.len() < 300, "{}", kept.len());
        for index in [0, 699, 700, 1_399, 1_400, 1_999] {
            assert!(kept.contains(&all[index]), "{index}");
        }
        assert_eq!(thinned(&all[..5]), all[..5]);
        assert!(thinned(&[]).is_empty());
    }
}
