//! `migrate send`: a guest here, moved to a destination that listens.

use std::sync::Arc;
use std::time::Instant;

use pageferry::Source;
use pageferry::transport::Dialer;
use pageferry_tcp::{TcpDialer, TcpOptions};

use super::guests::{self, AnySource};
use super::operator::{Operator, Wish};
use super::{afterwards, not_started};
use crate::cli::{ExitStatus, Lane, Limits, LingerTime, SendOptions};
use crate::guest::Guest;
use crate::progress::Screen;
use crate::report::{CpuClock, FinalReport, Owner, Role, peak_rss};

/// Runs the command.
pub(super) fn send(options: &SendOptions) -> ExitStatus {
    let screen = Arc::new(Screen::choose(options.output.json));
    match try_send(options, &screen) {
        Ok(status) => status,
        Err(error) => not_started(&screen, Role::Send, &error),
    }
}

fn try_send(options: &SendOptions, screen: &Arc<Screen>) -> Result<ExitStatus, pageferry::vm::VmError> {
    let operator = Operator::listen(options.moment.on_key)?;
    let mut guest = guests::start(&options.guest, screen, !options.moment.on_key)?;
    guest.wait_ready()?;
    announce(options, screen);
    if operator.wait_for_moment(options.moment) == Wish::Stop {
        return Err("ended before the migration began".into());
    }
    let dialer = dialer(&options.to, &options.lane, &options.limits);
    let mut report = migrate(&mut guest, Role::Send, &options.limits, &options.lane, dialer, screen, &operator);
    let over = Instant::now();
    if report.owner == Owner::Source {
        afterwards::question(&mut guest, &operator, options.linger.linger, &mut report);
    }
    screen.report(&report);
    if report.owner != Owner::Destination && options.linger.linger == LingerTime::Forever {
        screen.note("the guest is still here; Ctrl-C ends it");
        operator.wait_for_end(options.linger.linger, over);
    }
    Ok(report.exit_status())
}

fn announce(options: &SendOptions, screen: &Screen) {
    if options.moment.on_key {
        screen.note("the guest runs; Enter migrates it");
    } else if options.moment.on_signal {
        screen.note(&format!("the guest runs; kill -USR1 {} migrates it", std::process::id()));
    }
}

/// Opens connections the way the command line says.
pub(super) fn dialer(to: &str, lane: &Lane, limits: &Limits) -> Arc<dyn Dialer> {
    let mut options = TcpOptions::default();
    options.interface.clone_from(&lane.interface);
    options.dead_peer_after = limits.peer_timeout;
    let dialer = TcpDialer::new(to, options);
    match lane.bind {
        Some(address) => Arc::new(dialer.with_source(address)),
        None => Arc::new(dialer),
    }
}

/// Migrates the guest, and reports what the source knows.
pub(super) fn migrate(
    guest: &mut AnySource,
    role: Role,
    limits: &Limits,
    lane: &Lane,
    dialer: Arc<dyn Dialer>,
    screen: &Arc<Screen>,
    operator: &Operator,
) -> FinalReport {
    // A guest that cannot forget its earlier stalls still tells a bound.
    let _ = guest.reset_stall();
    let clock = CpuClock::start();
    let source = Source::new(limits.source_config(lane.lanes)).observer(Arc::clone(screen) as _);
    let result = source.run(guest, dialer, operator.control());
    operator.forget_cancel();
    let (engine_cpu, guest_cpu) = clock.split();
    let mut report = FinalReport::new(role, &result);
    report.cpu_seconds.source = Some(engine_cpu);
    report.guest_cpu_seconds.source = Some(guest_cpu);
    report.peak_rss_bytes.source = Some(peak_rss());
    report
}
