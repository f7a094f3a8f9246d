//! The accepting end.
//!
//! A caller stands in the door until its first message is there: only then does the host get a lane of it. A
//! caller in the door has what a lane needs, so few may stand there, and for a newcomer the one that has been silent longest goes.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pageferry::limits::GREETING_TIMEOUT;
use pageferry::memory::GuestMemory;
use pageferry::transport::{Acceptor, Capabilities, Lane, TransportError};

use crate::address::resolve;
use crate::cm::{Event, Id};
use crate::failure::ConnectFailure;
use crate::halves::{Direct, RdmaLane};
use crate::lane::Core;
use crate::message::{Hello, Rejection, VERSION};
use crate::options::RdmaOptions;
use crate::plan::{Plan, Rings};
use crate::sys::{local_addresses, wait_readable};
use crate::windows::{Exposure, Extent};

/// Calls that the kernel keeps for us.
const BACKLOG: i32 = 256;

/// Time that a caller has at least, whoever else comes: plenty for a first message in a network that has RDMA.
const GRACE: Duration = Duration::from_millis(50);

/// Listens on one address.
#[derive(Debug)]
pub struct RdmaAcceptor {
    local: SocketAddr,
    options: RdmaOptions,
    plan: Plan,
    exposure: Arc<Exposure>,
    door: Mutex<Door>,
}

struct Door {
    listener: Id,
    callers: Vec<Caller>,
}

/// A connection from which nothing has come yet.
struct Caller {
    core: Core,
    since: Instant,
}

impl RdmaAcceptor {
    /// Listens on `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`: an address of an RDMA device, or `0.0.0.0` or `[::]` for
    /// all devices. Port 0 lets the host choose one: see [`local_addr`](Self::local_addr).
    pub fn bind(address: &str, options: RdmaOptions) -> Result<Self, TransportError> {
        let refuse =
            |failure: ConnectFailure| TransportError::Accept { local: address.to_owned(), source: failure.into() };
        let mut failures = Vec::new();
        for candidate in resolve(address).map_err(refuse)? {
            match listen(candidate) {
                Ok((listener, local)) => {
                    let (plan, door) = (Plan::of(&options), Mutex::new(Door { listener, callers: Vec::new() }));
                    return Ok(Self { local, options, plan, exposure: Arc::default(), door });
                }
                Err(failure) => failures.push(failure),
            }
        }
        Err(refuse(ConnectFailure::one_of(failures)))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    fn extent(&self) -> Extent {
        let whole = self.options.pin_all;
        // As many as there are regions.
        let windows = if whole { u16::MAX } else { self.plan.windows };
        Extent { windows, window: self.plan.window, whole }
    }

    /// Lets a caller into the door, or turns it away.
    fn answer(&self, callers: &mut Vec<Caller>, id: Id, private: &[u8]) {
        let hello = match Hello::decode(private) {
            Ok(hello) => hello,
            Err(Some(_)) => return id.reject(&Rejection::Version(VERSION).encode()),
            Err(None) => return id.reject(&Rejection::Host.encode()),
        };
        let (id, rings) = (Arc::new(id), Rings::new(hello.one_way.then_some(false)));
        let peer = id.peer().map_or_else(|| "an unknown address".to_owned(), |address| address.to_string());
        let core = match Core::new(&id, rings, self.options.probe_after, peer) {
            Ok(core) => core,
            Err(ConnectFailure::LockedMemory { .. }) => return id.reject(&Rejection::LockedMemory.encode()),
            Err(_) => return id.reject(&Rejection::Host.encode()),
        };
        core.meet(hello);
        let ours = Hello { one_way: hello.one_way, credits: rings.credits, windows: self.extent().windows };
        match id.accept(&ours.encode()) {
            Ok(()) => callers.push(Caller { core, since: Instant::now() }),
            // It hung up meanwhile.
            Err(_) => core.give_up(),
        }
    }

    fn admit(&self, core: Core) -> Box<dyn Lane> {
        let granted = self.exposure.admit(core.queue());
        let direct = Direct::Opens { exposure: Arc::clone(&self.exposure), granted, extent: self.extent() };
        Box::new(RdmaLane::new(core, direct))
    }

    /// The first caller from whom something came; those that failed or were silent for too long leave.
    fn spoken(callers: &mut Vec<Caller>) -> Option<Core> {
        let mut at = 0;
        while at < callers.len() {
            match callers[at].core.has_arrived() {
                Ok(true) => return Some(callers.remove(at).core),
                Ok(false) if callers[at].since.elapsed() < GREETING_TIMEOUT => at += 1,
                _ => callers.remove(at).core.give_up(),
            }
        }
        None
    }

    fn accept_within(&self, timeout: Duration) -> io::Result<Option<Box<dyn Lane>>> {
        let deadline = Instant::now() + timeout;
        let mut door = self.door.lock().unwrap_or_else(PoisonError::into_inner);
        let Door { listener, callers } = &mut *door;
        loop {
            if let Some(core) = Self::spoken(callers) {
                return Ok(Some(self.admit(core)));
            }
            let full = callers.len() >= self.plan.callers;
            let patience =
                callers.first().map_or(GREETING_TIMEOUT, |oldest| GRACE.saturating_sub(oldest.since.elapsed()));
            if !full || patience.is_zero() {
                match listener.next_event()? {
                    Some(Event::Request(id, private)) => {
                        if full {
                            callers.remove(0).core.give_up();
                        }
                        self.answer(callers, id, &private);
                        continue;
                    }
                    Some(_) => continue,
                    None => {}
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            let mut fds: Vec<_> = callers.iter().flat_map(|caller| caller.core.fds()).collect();
            let waiting_for_grace = full && !patience.is_zero();
            if !waiting_for_grace {
                fds.push(listener.fd());
            }
            wait_readable(&fds, left.min(if waiting_for_grace { patience } else { GREETING_TIMEOUT }))?;
        }
    }
}

impl Acceptor for RdmaAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        self.accept_within(timeout).map_err(|source| TransportError::Accept { local: self.local.to_string(), source })
    }

    fn expose(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        self.exposure.expose(memory);
        Ok(self.extent().windows > 0)
    }

    fn conceal(&self) {
        self.exposure.conceal();
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        (capabilities.max_lanes, capabilities.one_sided) = (self.plan.max_lanes, self.extent().windows > 0);
        capabilities
    }
}

/// The first address of this host that belongs to an RDMA device, if there is one.
pub fn first_address() -> Option<IpAddr> {
    let candidates = local_addresses().into_iter().filter(|address| !address.is_loopback());
    candidates.into_iter().find(|&address| listen(SocketAddr::new(address, 0)).is_ok())
}

fn listen(address: SocketAddr) -> Result<(Id, SocketAddr), ConnectFailure> {
    let listener = Id::new()?;
    let failure = |error: io::Error| match error.raw_os_error() {
        Some(libc::EADDRINUSE) => ConnectFailure::InUse(error),
        Some(libc::ENODEV | libc::EADDRNOTAVAIL) => ConnectFailure::NotOnDevice { address, error },
        _ => ConnectFailure::Host { what: "listening", error },
    };
    listener.bind(address).map_err(failure)?;
    listener.listen(BACKLOG).map_err(failure)?;
    let local = SocketAddr::new(address.ip(), listener.local_port());
    Ok((listener, local))
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Door({} callers)", self.callers.len())
    }
}
