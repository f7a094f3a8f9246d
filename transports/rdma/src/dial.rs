//! The dialling end.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use pageferry::memory::GuestMemory;
use pageferry::transport::{Capabilities, Dialer, Lane, LaneRole, TransportError};

use crate::address::resolve;
use crate::cm::{Event, Id, NO_SUCH_SERVICE};
use crate::failure::ConnectFailure;
use crate::halves::{Direct, RdmaLane};
use crate::lane::Core;
use crate::message::{Hello, Rejection};
use crate::options::RdmaOptions;
use crate::plan::{Plan, Rings};
use crate::sys::wait_readable;
use crate::windows::{Extent, Shared, Writer};

/// Opens lanes over RDMA to one destination.
///
/// A name may stand for several addresses: they are tried in turn, each with its share of the time. The first that
/// answers serves for the life of the dialer.
#[derive(Debug)]
pub struct RdmaDialer {
    target: String,
    source: Option<IpAddr>,
    options: RdmaOptions,
    plan: Plan,
    reached: OnceLock<SocketAddr>,
    memory: Arc<Shared>,
    /// The destination has said that it opens no windows.
    no_windows: AtomicBool,
}

impl RdmaDialer {
    /// A dialer to `host:port`, `192.0.2.1:port` or `[2001:db8::1]:port`: an address of the destination's RDMA device.
    pub fn new(target: impl Into<String>, options: RdmaOptions) -> Self {
        Self {
            target: target.into(),
            source: None,
            plan: Plan::of(&options),
            options,
            reached: OnceLock::new(),
            memory: Arc::default(),
            no_windows: AtomicBool::new(false),
        }
    }

    /// Connects from this address of the local host, and so over its device.
    #[must_use]
    pub fn with_source(mut self, address: IpAddr) -> Self {
        self.source = Some(address);
        self
    }

    fn addresses(&self) -> Result<Vec<SocketAddr>, ConnectFailure> {
        if let Some(&address) = self.reached.get() {
            return Ok(vec![address]);
        }
        let found = resolve(&self.target)?;
        let Some(source) = self.source else {
            return Ok(found);
        };
        let fitting: Vec<_> = found.into_iter().filter(|address| address.is_ipv4() == source.is_ipv4()).collect();
        if fitting.is_empty() { Err(ConnectFailure::Family(source)) } else { Ok(fitting) }
    }

    fn connect_any(&self, role: LaneRole, timeout: Duration) -> Result<RdmaLane, ConnectFailure> {
        let started = Instant::now();
        let addresses = self.addresses()?;
        let mut failures = Vec::new();
        for (index, &address) in addresses.iter().enumerate() {
            let share = timeout.saturating_sub(started.elapsed()) / (addresses.len() - index) as u32;
            match self.connect(address, role, share.max(Duration::from_millis(1))) {
                Ok(lane) => {
                    self.reached.get_or_init(|| address);
                    return Ok(lane);
                }
                Err(failure) => failures.push(failure),
            }
        }
        Err(ConnectFailure::one_of(failures))
    }

    pub(crate) fn connect(
        &self,
        address: SocketAddr,
        role: LaneRole,
        timeout: Duration,
    ) -> Result<RdmaLane, ConnectFailure> {
        let call = Call { id: Arc::new(Id::new()?), address, deadline: Instant::now() + timeout, timeout };
        let source = self.source.map(|source| SocketAddr::new(source, 0));
        call.id.resolve_address(source, address, timeout).map_err(|error| call.failed(error))?;
        call.wait_for(|event| matches!(event, Event::AddressResolved).then_some(()))?;
        call.id.resolve_route(call.left()).map_err(|error| call.failed(error))?;
        call.wait_for(|event| matches!(event, Event::RouteResolved).then_some(()))?;

        let one_way = matches!(role, LaneRole::Data(_));
        let rings = Rings::new(one_way.then_some(true));
        let core = Core::new(&call.id, rings, self.options.probe_after, address.to_string())?;
        let ours = Hello { one_way, credits: rings.credits, windows: 0 };
        // There is nobody to say farewell to where this fails.
        let theirs = call.introduce(ours).inspect_err(|_| core.give_up())?;
        core.meet(theirs);
        if theirs.windows == 0 {
            self.no_windows.store(true, Ordering::Relaxed);
        }
        let extent = Extent { windows: self.plan.windows, window: self.plan.window, whole: self.options.pin_all };
        let writer = Writer::new(Arc::clone(&self.memory), extent, theirs.windows);
        Ok(RdmaLane::new(core, Direct::Writes(Box::new(Mutex::new(writer)))))
    }
}

/// A connection on its way.
struct Call {
    id: Arc<Id>,
    address: SocketAddr,
    deadline: Instant,
    timeout: Duration,
}

impl Call {
    fn left(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }

    /// Makes the connection, and hears what the peer says of itself.
    fn introduce(&self, ours: Hello) -> Result<Hello, ConnectFailure> {
        let address = self.address;
        self.id.connect(&ours.encode()).map_err(|error| self.failed(error))?;
        let private = self.wait_for(|event| match event {
            Event::Established(private) => Some(private),
            _ => None,
        })?;
        Hello::decode(&private).map_err(|version| match version {
            Some(theirs) => ConnectFailure::Version { address, theirs },
            None => ConnectFailure::Stranger(address),
        })
    }

    /// Waits for an event that is wanted; another that ends the call is an error.
    fn wait_for<T>(&self, wanted: impl Fn(Event) -> Option<T>) -> Result<T, ConnectFailure> {
        loop {
            let event = self.id.next_event().map_err(|error| self.failed(error))?;
            match event {
                Some(Event::Rejected(reason, private)) => return Err(self.rejected(reason, &private)),
                Some(Event::Failed(error)) => return Err(self.failed(error)),
                Some(Event::Disconnected) => return Err(ConnectFailure::Refused(self.address)),
                Some(event) => {
                    if let Some(found) = wanted(event) {
                        return Ok(found);
                    }
                }
                None if self.left().is_zero() => return Err(self.no_answer()),
                None => {
                    wait_readable(&[self.id.fd()], self.left()).map_err(|error| self.failed(error))?;
                }
            }
        }
    }

    fn no_answer(&self) -> ConnectFailure {
        ConnectFailure::NoAnswer { address: self.address, timeout: self.timeout }
    }

    fn failed(&self, error: io::Error) -> ConnectFailure {
        let address = self.address;
        match error.raw_os_error() {
            Some(libc::ENODEV | libc::EADDRNOTAVAIL) => ConnectFailure::NotOnDevice { address, error },
            Some(libc::ETIMEDOUT) => self.no_answer(),
            _ => ConnectFailure::Unreachable { address, error },
        }
    }

    fn rejected(&self, reason: i32, private: &[u8]) -> ConnectFailure {
        let address = self.address;
        match Rejection::decode(private) {
            Some(Rejection::Version(theirs)) => ConnectFailure::Version { address, theirs },
            Some(Rejection::LockedMemory) => ConnectFailure::ReceiverFull(address),
            Some(Rejection::Host) | None if reason != NO_SUCH_SERVICE => ConnectFailure::Stranger(address),
            _ => ConnectFailure::Refused(address),
        }
    }
}

impl Dialer for RdmaDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        match self.connect_any(role, timeout) {
            Ok(lane) => Ok(Box::new(lane)),
            Err(failure) => Err(TransportError::Dial { peer: self.target.clone(), source: failure.into() }),
        }
    }

    fn attach(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        self.memory.set(Some(memory));
        Ok(self.plan.windows > 0 && !self.no_windows.load(Ordering::Relaxed))
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        (capabilities.max_lanes, capabilities.one_sided) = (self.plan.max_lanes, self.plan.windows > 0);
        capabilities
    }
}
