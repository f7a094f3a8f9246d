//! `migrate send`: a guest here, moved to a destination that listens.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use pageferry::Source;
use pageferry::transport::Dialer;
use pageferry::vm::{SourceVm, VmError};
use pageferry_unix::UnixDialer;

use super::gentle::GentleSpawner;
use super::guests::{self, AnySource};
use super::handover::HandOverError;
use super::operator::{Operator, Wish};
use super::save::file_dialer;
use super::settle::settle;
use super::{afterwards, ended_early, links, not_started};
use crate::cli::{
    Address, Backing, Encoding, ExitStatus, GuestOptions, Lane, Limits, LingerTime, Moment, SendOptions, Verify,
};
use crate::guest::Guest;
use crate::progress::Screen;
use crate::report::{CostClock, FinalReport, Owner, Role};

/// Runs the command.
pub(super) fn send(options: &SendOptions) -> ExitStatus {
    let screen = Arc::new(Screen::choose(options.output.json));
    match try_send(options, &screen) {
        Ok(status) => status,
        Err(error) => not_started(&screen, Role::Send, &error),
    }
}

fn try_send(options: &SendOptions, screen: &Arc<Screen>) -> Result<ExitStatus, VmError> {
    // What cannot be is said before a guest is started.
    let SendOptions { to, lane, security, limits, .. } = options;
    let paired = options.pairing_file.as_ref().map(|path| links::with_pairing_of(to, path)).transpose()?;
    let to = paired.as_ref().unwrap_or(to);
    let dialer = match to {
        Address::File(path) if lane.names_no_network() => file_dialer(path, false, limits)?,
        _ => links::dialer(to, lane, security, limits.peer_timeout, screen)?,
    };
    let hand_over = if options.hand_over_memory { Some(hand_over(options)?) } else { None };
    let way = Way { role: Role::Send, limits, lane, encoding: &options.encoding, linger: options.linger.linger };
    let (guest, moment) = (&options.guest, options.moment);
    depart(&Departure { dialer, hand_over, way, guest, moment, verb: "migrates" }, screen)
}

/// The socket to which memory is to be handed over.
fn hand_over(options: &SendOptions) -> Result<&Path, HandOverError> {
    if options.guest.backing != Backing::Memfd {
        return Err(HandOverError::NotMemfd);
    }
    if options.limits.verify == Verify::Full {
        return Err(HandOverError::OneMemory);
    }
    if let Address::Unix(path) = &options.to { Ok(path) } else { Err(HandOverError::NotUnix) }
}

/// A guest that is to leave.
pub(super) struct Departure<'a> {
    pub(super) dialer: Arc<dyn Dialer>,
    /// Where its memory is handed over, if it is not copied.
    pub(super) hand_over: Option<&'a Path>,
    pub(super) way: Way<'a>,
    pub(super) guest: &'a GuestOptions,
    pub(super) moment: Moment,
    /// What is done to it, in words.
    pub(super) verb: &'static str,
}

/// Starts a guest, waits for the moment, and has it leave.
pub(super) fn depart(departure: &Departure<'_>, screen: &Arc<Screen>) -> Result<ExitStatus, VmError> {
    let Departure { way, moment, .. } = departure;
    let mut dialer = Arc::clone(&departure.dialer);
    let operator = Operator::listen(moment.on_key)?;
    let mut guest = guests::start(departure.guest, screen, !moment.on_key, 1)?;
    if !became_ready(&mut guest, &operator)? {
        return Ok(ended_early(screen, way.role));
    }
    announce(departure, screen);
    if operator.wait_for_moment(*moment) == Wish::Stop {
        return Ok(ended_early(screen, way.role));
    }
    if let Some(path) = departure.hand_over {
        dialer = Arc::new(UnixDialer::new(path).with_descriptors(guest.hand_memory_over()?));
    }
    let mut report = migrate(&mut guest, &dialer, way, screen, &operator);
    if report.owner == Owner::Source {
        afterwards::question(&mut guest, &operator, way.linger, &mut report);
    }
    screen.report(&report);
    if report.owner != Owner::Destination && way.linger == LingerTime::Forever {
        screen.note("the guest is still here; Ctrl-C ends it");
        if let Some(end) = afterwards::run_on(&guest, &operator) {
            screen.note(&format!("the guest has ended: {end}"));
        }
    }
    Ok(report.exit_status())
}

/// Waits until the guest is ready to be migrated; `false` when the program is to end before.
pub(super) fn became_ready(guest: &mut dyn Guest, operator: &Operator) -> Result<bool, VmError> {
    let waited = guest.wait_ready(&|| operator.wish() == Wish::GoOn);
    if operator.wish() == Wish::Stop {
        return Ok(false);
    }
    waited.map(|()| true)
}

fn announce(departure: &Departure<'_>, screen: &Screen) {
    let verb = departure.verb;
    if departure.moment.on_key {
        screen.note(&format!("the guest runs; Enter {verb} it"));
    } else if departure.moment.on_signal {
        screen.note(&format!("the guest runs; kill -USR1 {} {verb} it", std::process::id()));
    }
}

/// How a guest is migrated.
pub(super) struct Way<'a> {
    pub(super) role: Role,
    pub(super) limits: &'a Limits,
    pub(super) lane: &'a Lane,
    pub(super) encoding: &'a Encoding,
    pub(super) linger: LingerTime,
}

impl Way<'_> {
    /// A source that migrates the way the command line says.
    fn source(&self, screen: &Arc<Screen>) -> Source {
        let mut config = self.limits.source_config(self.lane.lanes);
        config.encode = self.encoding.config();
        let spawner = GentleSpawner { encoder_nice: self.encoding.encoder_nice };
        Source::new(config).observer(Arc::clone(screen) as _).spawner(Arc::new(spawner))
    }
}

/// Migrates the guest, and reports what the source knows.
pub(super) fn migrate(
    guest: &mut AnySource,
    dialer: &Arc<dyn Dialer>,
    way: &Way<'_>,
    screen: &Arc<Screen>,
    operator: &Operator,
) -> FinalReport {
    let stall_before = afterwards::longest_stall(guest);
    // A guest that cannot forget its earlier stalls still tells a bound.
    let _ = guest.reset_stall();
    let written = guest.written();
    let clock = CostClock::start();
    let source = way.source(screen);
    let result = source.run(guest, Arc::clone(dialer), operator.control());
    let ended = Instant::now();
    let pages_per_second = written.zip(guest.written()).and_then(|(before, after)| after.rate(before, ended));
    let cost = clock.stop(Some(&*guest.memory()));
    operator.forget_cancel();
    let ask = |session| source.settle(guest, Arc::clone(dialer), operator.control(), session);
    let result = settle(result, way.linger, operator, screen, ask);
    let mut report = FinalReport::new(way.role, &result);
    report.guest_stalls_ms.before = stall_before;
    report.guest_pages_per_second = pages_per_second;
    report.charge(&cost);
    report
}
