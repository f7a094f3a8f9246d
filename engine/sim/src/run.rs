//! One run from its seed to its verdict: the migration with its faults, the settling of what was left
//! undecided once both sides can talk again, and a second migration on a healthy network, which has
//! to succeed.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::config::OnTimeout;
use pageferry::session::{DestinationAction, DestinationInput, DestinationSession, LaneKey, Outcome};
use pageferry::wire::{Greeting, GreetingRole, Kind, Message, Owner, PROTOCOL_MAX, PROTOCOL_MIN, SessionId};
use pageferry::{DestinationConfig, Error, SourceConfig};

use crate::campaign::Codings;
use crate::clock::Clock;
use crate::destination::fresh_memory;
use crate::fault::{Call, Fault};
use crate::guest::{Guest, SharedGuest, lock};
use crate::network::SentFrame;
use crate::random::Random;
use crate::scenario::Scenario;
use crate::trace::Trace;
use crate::world::World;

/// Events in one migration; the longest honest ones need some hundred thousand.
const MAX_STEPS: u64 = 5_000_000;

/// How a run ended.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Ending {
    /// The guest runs at the destination, and the source knows it.
    Completed,
    /// The guest stayed at the source because the user said so.
    Cancelled,
    /// The guest stayed at the source because something failed.
    Failed,
    /// Undecided at first; both sides then agreed that the guest is the source's.
    SettledSource,
    /// Undecided at first; both sides then agreed that the guest is the destination's.
    SettledDestination,
    /// Undecided, and the destination's process is dead: for the operator to decide.
    Undecided,
    /// The guest was handed over and died with the destination's process.
    Lost,
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Completed => "completed",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed, the guest stays at the source",
            Self::SettledSource => "undecided, then settled to the source",
            Self::SettledDestination => "undecided, then settled to the destination",
            Self::Undecided => "undecided, the destination is dead",
            Self::Lost => "handed over, then the destination died",
        })
    }
}

/// What a run has shown.
#[derive(Clone, Debug, serde::Serialize)]
#[non_exhaustive]
pub struct RunResult {
    /// Which run.
    pub name: String,
    /// The first rule that was broken; `None` when all held.
    pub violation: Option<String>,
    /// How it ended; `None` when a rule was broken before.
    pub ending: Option<Ending>,
    /// What went wrong by plan, by kind.
    pub faults: Vec<String>,
    /// A side asked who owns the guest, and was answered.
    pub answered: bool,
    /// A hash of everything that happened: equal in every replay.
    pub trace: u64,
    /// Pages by how they were given, in both migrations.
    pub codings: Codings,
    /// Events handled.
    pub steps: u64,
    /// Virtual time that passed, in milliseconds.
    pub virtual_ms: u64,
    #[serde(skip)]
    pub(crate) frames: Vec<SentFrame>,
}

/// Runs a seed.
pub fn run_seed(seed: u64, print: bool) -> RunResult {
    run(&Scenario::of_seed(seed), print, false)
}

/// Runs a scenario. `log` keeps a list of all frames of the first migration.
pub(crate) fn run(scenario: &Scenario, print: bool, log: bool) -> RunResult {
    let mut random = Random::new(scenario.seed ^ 0x5EED);
    let guest = match new_guest(scenario, &mut random) {
        Ok(guest) => guest,
        Err(error) => return failed_to_start(scenario, &error),
    };
    let clock = Clock::new(random, Trace::new(print));
    let mut run = Run {
        world: World::new(scenario, clock, guest),
        scenario,
        ending: None,
        frames: Vec::new(),
        passed: Duration::ZERO,
        codings: Codings::default(),
    };
    run.world.ctx.network.log = log.then(Vec::new);
    let verdict = run.all_phases();
    run.result(verdict.err())
}

fn failed_to_start(scenario: &Scenario, error: &std::io::Error) -> RunResult {
    RunResult {
        name: scenario.name.clone(),
        violation: Some(format!("the simulator could not make guest memory: {error}")),
        ending: None,
        faults: Vec::new(),
        answered: false,
        trace: 0,
        codings: Codings::default(),
        steps: 0,
        virtual_ms: 0,
        frames: Vec::new(),
    }
}

fn new_guest(scenario: &Scenario, random: &mut Random) -> std::io::Result<SharedGuest> {
    let memory = Arc::new(fresh_memory(&scenario.layout)?);
    let failures = scenario.vm.failures.clone();
    let mut guest = Guest::new(memory, scenario.runs, scenario.pattern, scenario.tracking, failures, random.fork(1));
    guest.fill(scenario.filled);
    guest.tearing = scenario.tears;
    Ok(Arc::new(Mutex::new(guest)))
}

struct Run<'a> {
    world: World,
    scenario: &'a Scenario,
    ending: Option<Ending>,
    frames: Vec<SentFrame>,
    /// Virtual time of the first migration, once the second has begun.
    passed: Duration,
    /// Of the first migration, once the second has begun.
    codings: Codings,
}

/// A broken rule ends the run.
type Verdict<T = ()> = Result<T, String>;

impl Run<'_> {
    fn all_phases(&mut self) -> Verdict {
        self.world.start();
        self.until_both_are_over()?;
        self.frames = self.world.ctx.network.log.take().unwrap_or_default();
        let ending = self.judge()?;
        let ending = if ending == Ending::Undecided { self.settle()? } else { self.ask_the_other_side(ending)? };
        self.ending = Some(ending);
        if matches!(ending, Ending::Undecided | Ending::Lost) { Ok(()) } else { self.migrate_again() }
    }

    fn result(self, violation: Option<String>) -> RunResult {
        let clock = &self.world.ctx.clock;
        let mut codings = self.codings;
        codings.join(&self.world.source.codings);
        let faults = self.world.ctx.network.struck().map(|fault| fault.name().to_owned());
        let failed = lock(&self.world.guest).failed_calls.clone();
        RunResult {
            name: self.scenario.name.clone(),
            answered: self.world.ctx.network.sent(Kind::Settled) > 0,
            ending: self.ending.filter(|_| violation.is_none()),
            violation,
            faults: faults.chain(failed.iter().map(|call| format!("{call:?} fails"))).collect(),
            trace: clock.trace.hash(),
            codings,
            steps: clock.steps,
            virtual_ms: (self.passed + clock.now).as_millis() as u64,
            frames: self.frames,
        }
    }

    // ---- running ----

    fn step(&mut self, deadline: Duration) -> Verdict {
        if let Some(violation) = self.world.step() {
            return Err(violation);
        }
        let clock = &self.world.ctx.clock;
        if clock.steps > MAX_STEPS || clock.now > deadline {
            let (steps, now) = (clock.steps, clock.now);
            return Err(format!("the migration does not end: {steps} events, {now:?} passed"));
        }
        Ok(())
    }

    fn until_both_are_over(&mut self) -> Verdict {
        let deadline = self.world.ctx.clock.now + self.longest();
        while !self.world.source.is_over() || self.destination_is_busy() {
            self.step(deadline)?;
        }
        if let Some(destination) = self.world.destination.as_mut().filter(|host| !host.is_over()) {
            // Nobody will come any more.
            destination.cancel(&mut self.world.ctx);
        }
        while self.world.destination.as_ref().is_some_and(|host| !host.is_over()) {
            self.step(deadline)?;
        }
        Ok(())
    }

    fn destination_is_busy(&self) -> bool {
        self.world.destination.as_ref().is_some_and(|host| !host.is_over() && !host.is_waiting())
    }

    /// The longest time that a migration with these limits may take.
    fn longest(&self) -> Duration {
        let (source, destination) = (&self.scenario.config, &self.scenario.destination_config);
        let stopped = source.peer_timeout * 8 + destination.peer_timeout * 8;
        let dialling = Duration::from_secs(10) * (u32::from(source.lanes) + 2);
        let settling = (source.settle_window + destination.settle_window) * 2;
        source.timeout + (stopped + dialling + settling) * 2 + Duration::from_secs(600)
    }

    // ---- judging ----

    /// The two outcomes fit each other, the guest, and the plan.
    fn judge(&mut self) -> Verdict<Ending> {
        let scenario = self.scenario;
        let source = self.world.source.outcome();
        let destination = self.world.destination.as_ref().and_then(|host| host.outcome());
        let mut guest = lock(&self.world.guest);
        for outcome in [source, destination].into_iter().flatten() {
            check_error(outcome, self.world.ctx.network.struck())?;
        }
        if scenario.must_succeed() && !matches!(source, Some(Outcome::HandedOver)) {
            return Err(format!("nothing went wrong, but the migration ended with {source:?}"));
        }
        let dead = guest.destination.dead;
        let committed = guest.destination.committed;
        match (source, destination) {
            (Some(Outcome::HandedOver), _) if !committed => Err("handed over, and nobody took the guest".to_owned()),
            (Some(Outcome::HandedOver), Some(Outcome::HandedOver)) => {
                let memory = guest.destination.memory.clone();
                if let Some(memory) = memory {
                    guest.compare(&memory, "after hand-over");
                }
                guest.violation.take().map_or(Ok(Ending::Completed), Err)
            }
            (Some(Outcome::HandedOver), _) if dead => Ok(Ending::Lost),
            (Some(Outcome::SourceOwns(_)), Some(Outcome::HandedOver)) => {
                Err("two owners by their own words".to_owned())
            }
            (Some(Outcome::SourceOwns(error)), _) => {
                let ending = if matches!(error, Error::Cancelled) { Ending::Cancelled } else { Ending::Failed };
                check_source(&mut guest).map(|()| ending)
            }
            (Some(Outcome::Undecided(_)), _) if guest.source.runs => Err("undecided, and the source runs".to_owned()),
            (Some(Outcome::Undecided(_)), _) => Ok(Ending::Undecided),
            (source, destination) => Err(format!("the outcomes do not fit: {source:?} and {destination:?}")),
        }
    }

    // ---- settling ----

    /// The source is undecided. Both sides can talk now.
    fn settle(&mut self) -> Verdict<Ending> {
        if lock(&self.world.guest).destination.dead {
            return Ok(Ending::Undecided);
        }
        let session = self.world.source.session_id();
        match self.world.destination.as_mut().map(|host| (host.session_id(), host.outcome())) {
            Some((Some(known), Some(Outcome::Undecided(_)))) if known == session => {
                self.world.settle(Some(session));
                self.until_both_are_over()?;
                self.judge_settled()
            }
            Some((_, Some(outcome))) => {
                let committed = matches!(outcome, Outcome::HandedOver | Outcome::DestinationOwns(_));
                self.ask_ended(session, committed)?;
                self.operator_decides(committed)
            }
            _ => Err("undecided, and the destination has no outcome".to_owned()),
        }
    }

    fn judge_settled(&mut self) -> Verdict<Ending> {
        let source = self.world.source.outcome();
        let mut guest = lock(&self.world.guest);
        let destination = self.world.destination.as_ref().and_then(|host| host.outcome());
        match (source, destination, guest.destination.committed) {
            (Some(Outcome::SourceOwns(_)), Some(Outcome::SourceOwns(_)), false) => {
                check_source(&mut guest).map(|()| Ending::SettledSource)
            }
            (Some(Outcome::HandedOver), Some(Outcome::HandedOver), true) => Ok(Ending::SettledDestination),
            (source, destination, committed) => {
                Err(format!("settled badly: {source:?} and {destination:?}, committed: {committed}"))
            }
        }
    }

    /// The destination's verdict is known to its operator, who acts on it at the source.
    fn operator_decides(&mut self, committed: bool) -> Verdict<Ending> {
        let mut guest = lock(&self.world.guest);
        if committed != guest.destination.committed {
            return Err("the destination's outcome is not what its VM did".to_owned());
        }
        if committed {
            return Ok(Ending::SettledDestination);
        }
        guest.source.locks = true;
        if guest.ran {
            guest.resume_source();
        }
        guest.source.throttle = 0;
        if let Some(violation) = guest.violation.take() {
            return Err(violation);
        }
        check_source(&mut guest).map(|()| Ending::SettledSource)
    }

    /// A session that has ended must not tell lies, however late it is asked.
    fn ask_ended(&mut self, session: SessionId, committed: bool) -> Verdict {
        let Some(destination) = &mut self.world.destination else { return Ok(()) };
        let answer = ask(destination.session_mut(), session);
        let expected = if committed { Owner::Destination } else { Owner::Source };
        match answer {
            Some(owner) if owner != expected => Err(format!("asked after its end, the destination says {owner:?}")),
            _ => Ok(()),
        }
    }

    /// The source knows where the guest is. If the destination does not, it has to believe it.
    fn ask_the_other_side(&mut self, ending: Ending) -> Verdict<Ending> {
        let session = self.world.source.session_id();
        let Some(destination) = &mut self.world.destination else { return Ok(ending) };
        let Some(Outcome::Undecided(_)) = destination.outcome() else { return Ok(ending) };
        if destination.session_id() != Some(session) {
            return Ok(ending);
        }
        if ask(destination.session_mut(), session) == Some(Owner::Destination) {
            return Err("asked after its end, an undecided destination says that it owns the guest".to_owned());
        }
        let setup = pageferry::session::DestinationSetup { config: DestinationConfig::default() };
        let mut ready = DestinationSession::settle(setup, session, Error::NoSource(Duration::ZERO));
        if ask(&mut ready, session) == Some(Owner::Source) {
            Ok(ending)
        } else {
            Err("a destination that stands ready to settle does not give the guest up".to_owned())
        }
    }

    // ---- again ----

    /// Nothing goes wrong any more: the guest, wherever it is, can be migrated.
    fn migrate_again(&mut self) -> Verdict {
        let mut scenario = self.scenario.clone();
        scenario.faults.clear();
        scenario.visits.clear();
        scenario.vm.failures.clear();
        scenario.canary = None;
        scenario.config = SourceConfig::default();
        scenario.config.lanes = self.scenario.config.lanes;
        scenario.config.verify = self.scenario.config.verify;
        scenario.config.encode = self.scenario.config.encode.clone();
        scenario.config.timeout = Duration::from_secs(20);
        scenario.config.on_timeout = OnTimeout::SwitchOver;
        scenario.destination_config = DestinationConfig::default();
        lock(&self.world.guest).settle_down();
        let trace = std::mem::take(&mut self.world.ctx.clock.trace);
        let random = self.world.ctx.clock.random.fork(40);
        let mut clock = Clock::new(random, trace);
        clock.note("world", "again", || "a second migration, on a healthy network".to_owned());
        let (steps, guest) = (self.world.ctx.clock.steps, Arc::clone(&self.world.guest));
        self.passed = self.world.ctx.clock.now;
        self.codings = self.world.source.codings;
        let mut world = World::new(&scenario, clock, guest);
        world.start();
        let before = std::mem::replace(&mut self.world, world);
        let result = self.until_both_are_over().and_then(|()| self.judge_again());
        // The first migration's faults are the ones to report.
        self.world.ctx.clock.steps += steps;
        self.world.ctx.network = before.ctx.network;
        result
    }

    fn judge_again(&mut self) -> Verdict {
        match self.world.source.outcome() {
            Some(Outcome::HandedOver) => Ok(()),
            outcome => Err(format!("the second migration, with nothing going wrong, ended with {outcome:?}")),
        }
    }
}

/// The guest stays at the source: it goes on as it was.
fn check_source(guest: &mut Guest) -> Verdict {
    if guest.destination.committed {
        return Err("the source says that it owns the guest, and the destination has taken over".to_owned());
    }
    if guest.source.runs != guest.ran && !guest.failed_calls.contains(&Call::Resume) {
        return Err(format!("the guest ran before: {}; it runs after the failure: {}", guest.ran, guest.source.runs));
    }
    if guest.log.on {
        return Err("dirty tracking was left on".to_owned());
    }
    if guest.source.throttle != 0 {
        return Err(format!("the guest was left throttled by {} %", guest.source.throttle));
    }
    if !guest.source.locks {
        return Err("the guest was left without its locks".to_owned());
    }
    let memory = Arc::clone(&guest.source.memory);
    guest.compare(&memory, "at the source");
    guest.violation.take().map_or(Ok(()), Err)
}

/// Errors that only a bug can cause, or damage on the way. A damaged round number, which is compared
/// before the pages behind it are checked, looks like misbehaviour.
fn check_error(outcome: &Outcome, mut struck: impl Iterator<Item = Fault>) -> Verdict {
    let (Outcome::SourceOwns(error) | Outcome::DestinationOwns(error) | Outcome::Undecided(error)) = outcome else {
        return Ok(());
    };
    let told = |what: &str| matches!(error, Error::PeerAborted { reason, .. } if reason.contains(what));
    let bug =
        matches!(error, Error::Bug(_) | Error::DigestMismatch { .. } | Error::Memory(_)) || told("memory differs");
    let invalid = matches!(error, Error::InvalidMessage { .. } | Error::PeerMisbehaved { .. })
        || told("invalid data")
        || told("misbehaved");
    if bug || (invalid && !struck.any(|fault| matches!(fault, Fault::Flip { .. }))) {
        return Err(format!("an error that must not be: {error}"));
    }
    Ok(())
}

/// Asks a destination's session who owns the guest.
fn ask(session: &mut DestinationSession, id: SessionId) -> Option<Owner> {
    let (version_min, version_max) = (PROTOCOL_MIN, PROTOCOL_MAX);
    let greeting = Greeting { version_min, version_max, session: id, role: GreetingRole::Settle };
    let lane = LaneKey(u64::MAX);
    session.handle(Duration::ZERO, DestinationInput::Greeted { lane, greeting, peer: String::new() });
    std::iter::from_fn(|| session.poll_action()).find_map(|action| match action {
        DestinationAction::Answer(_, Message::Settled(owner)) | DestinationAction::Send(Message::Settled(owner)) => {
            Some(owner)
        }
        _ => None,
    })
}
