//! `migrate receive`: a place where a guest arrives and runs on.

use std::sync::Arc;

use pageferry::Destination;
use pageferry::config::DestinationConfig;
use pageferry::transport::Acceptor;
use pageferry::vm::VmError;
use pageferry_unix::Descriptors;

use super::guests::{AnyDestination, Place};
use super::links::Listening;
use super::operator::Operator;
use super::settle::settle;
use super::{afterwards, links, not_started, parent};
use crate::cli::{ExitStatus, LingerTime, PlaceOptions, ReceiveOptions};
use crate::machine::Allowance;
use crate::progress::Screen;
use crate::report::{CostClock, FinalReport, Owner, Role};

/// Runs the command.
pub(super) fn receive(options: &ReceiveOptions) -> ExitStatus {
    let screen = Arc::new(Screen::choose(options.output.json));
    match try_receive(options, &screen) {
        Ok(status) => status,
        Err(error) => not_started(&screen, Role::Receive, &error),
    }
}

fn try_receive(options: &ReceiveOptions, screen: &Arc<Screen>) -> Result<ExitStatus, VmError> {
    if let Some(parent) = options.with_parent {
        parent::end_with(parent)?;
    }
    let operator = Operator::listen(false)?;
    let ReceiveOptions { listen, interface, rdma, security, peer_timeout, .. } = options;
    let Listening { acceptor, local, descriptors } =
        links::acceptor(listen, interface.as_ref(), *rdma, security, *peer_timeout, screen)?;
    screen.listening(&local.to_string(), &local.connection_string());
    let mut config = DestinationConfig::default();
    config.wait_for_source = options.wait;
    config.peer_timeout = options.peer_timeout;
    config.settle_window = options.settle_window;
    let arrival = Arrival { role: Role::Receive, place: place(options.place), config, linger: options.linger.linger };
    Ok(arrive(&arrival, &acceptor, descriptors, screen, &operator))
}

/// What the command line has made ready.
pub(super) fn place(options: PlaceOptions) -> Place {
    let allowance = Allowance { limit: options.max_memory, overcommit: options.overcommit };
    Place { backing: options.backing, allowance, prefault: options.prefault }
}

/// How a guest is taken in.
pub(super) struct Arrival {
    pub(super) role: Role,
    pub(super) place: Place,
    pub(super) config: DestinationConfig,
    pub(super) linger: LingerTime,
}

/// Waits for a guest, takes it in, and lets it run on.
pub(super) fn arrive(
    arrival: &Arrival,
    acceptor: &Arc<dyn Acceptor>,
    descriptors: Option<Descriptors>,
    screen: &Arc<Screen>,
    operator: &Operator,
) -> ExitStatus {
    let mut guest = AnyDestination::new(arrival.place, Arc::clone(screen)).taking(descriptors);
    let mut report = take_in(&mut guest, arrival, acceptor, screen, operator);
    if report.owner == Owner::Destination {
        afterwards::question(&mut guest, operator, arrival.linger, &mut report);
    }
    screen.report(&report);
    if report.owner == Owner::Destination && arrival.linger == LingerTime::Forever {
        screen.note("the guest runs here; Ctrl-C ends it");
        if let Some(end) = afterwards::run_on(&guest, operator) {
            screen.note(&format!("the guest has ended: {end}"));
            return ExitStatus::GuestWrong;
        }
    }
    report.exit_status()
}

fn take_in(
    guest: &mut AnyDestination,
    arrival: &Arrival,
    acceptor: &Arc<dyn Acceptor>,
    screen: &Arc<Screen>,
    operator: &Operator,
) -> FinalReport {
    let clock = CostClock::start();
    let destination = Destination::new(arrival.config.clone()).observer(Arc::clone(screen) as _);
    let result = destination.run(guest, Arc::clone(acceptor), operator.control());
    let cost = clock.stop(guest.memory().as_deref());
    operator.forget_cancel();
    let ask = |session| destination.settle(guest, Arc::clone(acceptor), operator.control(), session);
    let result = settle(result, arrival.linger, operator, screen, ask);
    let mut report = FinalReport::new(arrival.role, &result);
    match (report.owner, arrival.role) {
        (Owner::Source, Role::Restore) => report.owner = Owner::File,
        (Owner::Source, _) if !guest.was_offered() => report.owner = Owner::Nobody,
        _ => {}
    }
    report.charge(&cost);
    report
}
