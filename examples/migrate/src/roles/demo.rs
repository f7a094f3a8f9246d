//! `migrate demo`: both ends on this machine. The destination is a second process of this program.

use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, unbounded};
use pageferry::vm::VmError;
use pageferry_unix::UnixDialer;

use super::operator::{Operator, Wish};
use super::save::file_dialer;
use super::send::{Way, became_ready, migrate};
use super::{afterwards, ended_early, guests, links, not_started, rdma};
use crate::cli::{Address, Backing, DemoOptions, DemoTransport, ExitStatus, GuestOptions, LingerTime, Rdma, Security};
use crate::progress::{JsonEvent, Screen};
use crate::report::{FinalReport, Owner, Role};

/// How long a fresh process may take to listen.
const START: Duration = Duration::from_secs(20);

/// How long a destination may go on after a failed migration, to give up or to say that it took over.
const WIND_UP: Duration = Duration::from_secs(60);

/// How long a destination may take to check a guest's memory, on top of the time it lets it run.
const CHECK: Duration = Duration::from_secs(600);

/// How often to look whether the operator wants the end.
const LOOK_UP: Duration = Duration::from_millis(200);

/// Runs the command.
pub(super) fn demo(options: &DemoOptions) -> ExitStatus {
    let screen = Arc::new(Screen::choose(options.output.json));
    match try_demo(options, &screen) {
        Ok(status) => status,
        Err(error) => not_started(&screen, Role::Demo, &error),
    }
}

fn try_demo(options: &DemoOptions, screen: &Arc<Screen>) -> Result<ExitStatus, VmError> {
    let operator = Operator::listen(false)?;
    let own = OwnGuest::of(options);
    let mut way = Route::new(options, &own)?;
    let mut guest = guests::start(&own.guest, screen, false, if own.hands_over { 1 } else { 2 })?;
    if !became_ready(&mut guest, &operator)? || operator.wait(options.after) == Wish::Stop {
        return Ok(ended_early(screen, Role::Demo));
    }
    screen.note(&way.describe());
    let linger = LingerTime::For(options.linger);
    let DemoOptions { limits, lane, encoding, .. } = options;
    let dialer = match &way.address {
        Address::File(file) => file_dialer(file, false, limits)?,
        Address::Unix(path) if own.hands_over => {
            Arc::new(UnixDialer::new(path).with_descriptors(guest.hand_memory_over()?))
        }
        address => links::dialer(address, lane, &security(options.transport), limits.peer_timeout, screen)?,
    };
    let how = Way { role: Role::Demo, limits, lane, encoding, linger };
    let mut report = migrate(&mut guest, &dialer, &how, screen, &operator);
    if report.owner == Owner::Source {
        afterwards::question(&mut guest, &operator, linger, &mut report);
    }
    if report.owner != Owner::Source || screen.was_accepted() {
        let patience = if report.owner == Owner::Destination { options.linger + CHECK } else { WIND_UP };
        match way.arrive(options, &own)?.report(patience, &operator, screen) {
            Some(other) => report.merge_destination(&other),
            None => report.lose_destination(),
        }
    }
    if options.guest.kernel.is_none() {
        report.require_self_check();
    }
    screen.report(&report);
    Ok(report.exit_status())
}

/// The guest, with the memory that the transport needs.
struct OwnGuest {
    guest: GuestOptions,
    hands_over: bool,
}

impl OwnGuest {
    fn of(options: &DemoOptions) -> Self {
        let (mut guest, hands_over) = (options.guest.clone(), options.transport == DemoTransport::Memfd);
        if hands_over {
            guest.backing = Backing::Memfd;
        }
        Self { guest, hands_over }
    }
}

/// Where the guest goes.
struct Route {
    address: Address,
    /// Nobody yet, if it goes into a file first.
    destination: Option<Destination>,
}

impl Route {
    fn new(options: &DemoOptions, own: &OwnGuest) -> Result<Self, VmError> {
        if options.transport == DemoTransport::File {
            return Ok(Self { address: options.transport.listen().parse()?, destination: None });
        }
        let destination = Destination::start(options, own)?;
        Ok(Self { address: destination.address()?, destination: Some(destination) })
    }

    fn describe(&self) -> String {
        match &self.address {
            Address::File(file) => format!("saving to {}, for another process of this machine", file.display()),
            address => format!("migrating to {address}, another process of this machine"),
        }
    }

    /// The process that has the guest now, or is to have it.
    fn arrive(&mut self, options: &DemoOptions, own: &OwnGuest) -> Result<&Destination, VmError> {
        match &mut self.destination {
            Some(destination) => Ok(destination),
            empty => Ok(empty.insert(Destination::start(options, own)?)),
        }
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        self.destination = None;
        if let Address::File(path) | Address::Unix(path) = &self.address {
            // It was for this run only. No file is there if the guest was not saved, and no socket if the destination had the
            // time to remove it.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Where the destination is to listen. An RDMA device has no loopback address.
fn listen(transport: DemoTransport) -> String {
    match rdma::own_address() {
        Some(address) if transport == DemoTransport::Rdma => format!("rdma://{}", SocketAddr::new(address, 0)),
        _ => transport.listen(),
    }
}

/// The address of an RDMA device could be another host's, for all that can be seen of it.
fn security(transport: DemoTransport) -> Security {
    Security { insecure_plaintext: transport == DemoTransport::Rdma, ..Security::default() }
}

/// The other process.
struct Destination {
    child: Child,
    lines: Receiver<Line>,
}

/// What it may say.
enum Line {
    Event(JsonEvent),
    Report(Box<FinalReport>),
}

impl Destination {
    fn start(options: &DemoOptions, own: &OwnGuest) -> io::Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["receive", "--listen", &listen(options.transport), "--json"]);
        if security(options.transport).insecure_plaintext {
            command.arg("--insecure-plaintext");
        }
        command.args(["--with-parent", &std::process::id().to_string()]);
        command.args(["--linger", &milliseconds(options.linger), "--wait", "1h"]);
        command.args(["--peer-timeout", &milliseconds(options.limits.peer_timeout)]);
        command.args(["--settle-window", &milliseconds(options.limits.settle_window)]);
        command.args(["--backing", own.guest.backing.name()]);
        if options.guest.overcommit {
            command.arg("--overcommit");
        }
        let Rdma { rdma_pin_all, rdma_locked_memory } = options.lane.rdma;
        if rdma_pin_all {
            command.arg("--rdma-pin-all");
        }
        if let Some(most) = rdma_locked_memory {
            command.args(["--rdma-locked-memory", &most.to_string()]);
        }
        if options.prefault {
            command.arg("--prefault");
        }
        if let Some(most) = options.max_memory {
            command.args(["--max-memory", &most.to_string()]);
        }
        // A process group of its own: Ctrl-C on the terminal is for the source, which cancels.
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0).spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("the destination has no output"))?;
        let (sender, lines) = unbounded();
        std::thread::Builder::new()
            .name("destination".to_owned())
            .spawn(move || read_lines(stdout).try_for_each(|line| sender.send(line).ok()))?;
        Ok(Self { child, lines })
    }

    /// Where it listens.
    fn address(&self) -> Result<Address, VmError> {
        loop {
            match self.lines.recv_timeout(START) {
                Ok(Line::Event(JsonEvent::Listening { connect, .. })) => return Ok(connect.parse()?),
                Ok(Line::Event(_)) => {}
                Ok(Line::Report(report)) => return Err(report.error.unwrap_or_default().into()),
                Err(RecvTimeoutError::Timeout) => return Err("the destination process does not listen".into()),
                Err(RecvTimeoutError::Disconnected) => return Err("the destination process ended at once".into()),
            }
        }
    }

    /// What it reports at its end; `None` when it does not.
    fn report(&self, patience: Duration, operator: &Operator, screen: &Screen) -> Option<FinalReport> {
        let until = Instant::now() + patience;
        while Instant::now() < until && operator.wish() == Wish::GoOn {
            match self.lines.recv_timeout(LOOK_UP) {
                Ok(Line::Event(JsonEvent::Console { text })) => screen.console(&text),
                Ok(Line::Event(_)) | Err(RecvTimeoutError::Timeout) => {}
                Ok(Line::Report(report)) => return Some(*report),
                Err(RecvTimeoutError::Disconnected) => return None,
            }
        }
        None
    }
}

impl Drop for Destination {
    fn drop(&mut self) {
        // It has reported or it never will; either way nobody needs it any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_lines(stdout: ChildStdout) -> impl Iterator<Item = Line> {
    BufReader::new(stdout).lines().map_while(Result::ok).filter_map(|text| {
        let event = serde_json::from_str(&text).map(Line::Event);
        event.or_else(|_| serde_json::from_str(&text).map(|report| Line::Report(Box::new(report)))).ok()
    })
}

fn milliseconds(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}
