//! A one-sided transport within this process.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::memory::{GuestMemory, RegionId};
use pageferry::transport::{
    Acceptor, Capabilities, Dialer, DirectRun, InMemoryAcceptor, InMemoryDialer, Lane, LaneHalves, LaneRole,
    LaneSender, TransportError,
};

pub const PAGE: u64 = 4096;

/// What happens to a page at the source while it is written: before, and after.
pub type Meddler = Arc<dyn Fn(RegionId, u64, Moment) + Send + Sync>;

#[derive(Clone, Copy, PartialEq)]
pub enum Moment {
    Before,
    After,
}

/// What the engine asked of a transport.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Call {
    Expose,
    Attach,
    /// A data lane.
    Dial(u16),
    Conceal,
}

/// The memories that a one-sided transport knows, and what it can do.
#[allow(clippy::struct_excessive_bools)] // independent choices of a test
pub struct Known {
    /// This end is one-sided.
    pub source: bool,
    pub destination: bool,
    /// Whatever is written does not arrive.
    pub fails: bool,
    pub calls: Mutex<Vec<Call>>,
    pub from: Mutex<Option<Arc<dyn GuestMemory>>>,
    pub to: Mutex<Option<Arc<dyn GuestMemory>>>,
    pub written: AtomicU64,
    pub refuses: bool,
    pub meddler: Option<Meddler>,
    /// What a device still sees of pages that it holds and that the guest has given back.
    pub held: Held,
}

/// Contents of pages, as a device sees them.
pub type Held = Arc<Mutex<HashMap<(RegionId, u64), [u8; PAGE as usize]>>>;

impl Default for Known {
    fn default() -> Self {
        Self {
            source: true,
            destination: true,
            fails: false,
            calls: Mutex::default(),
            from: Mutex::default(),
            to: Mutex::default(),
            written: AtomicU64::new(0),
            refuses: false,
            meddler: None,
            held: Held::default(),
        }
    }
}

impl Known {
    fn note(&self, call: Call) {
        self.calls.lock().unwrap().push(call);
    }
}

fn capabilities(one_sided: bool) -> Capabilities {
    let mut capabilities = Capabilities::default();
    capabilities.one_sided = one_sided;
    capabilities
}

pub struct DirectDialer(pub InMemoryDialer, pub Arc<Known>);
pub struct DirectAcceptor(pub InMemoryAcceptor, pub Arc<Known>);
struct DirectLane(Box<dyn Lane>, Arc<Known>);
struct DirectSender(Box<dyn LaneSender>, Arc<Known>);

impl Dialer for DirectDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        if let LaneRole::Data(index) = role {
            self.1.note(Call::Dial(index));
        }
        Ok(Box::new(DirectLane(self.0.dial(role, timeout)?, self.1.clone())))
    }

    fn attach(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        self.1.note(Call::Attach);
        *self.1.from.lock().unwrap() = Some(memory);
        Ok(!self.1.refuses)
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(self.1.source)
    }
}

impl Acceptor for DirectAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        self.0.accept(timeout)
    }

    fn expose(&self, memory: Arc<dyn GuestMemory>) -> Result<bool, TransportError> {
        self.1.note(Call::Expose);
        *self.1.to.lock().unwrap() = Some(memory);
        Ok(true)
    }

    fn conceal(&self) {
        self.1.note(Call::Conceal);
        *self.1.to.lock().unwrap() = None;
    }

    fn capabilities(&self) -> Capabilities {
        capabilities(self.1.destination)
    }
}

impl Lane for DirectLane {
    fn peer(&self) -> String {
        self.0.peer()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let halves = self.0.split()?;
        Ok(LaneHalves { sender: Box::new(DirectSender(halves.sender, self.1)), ..halves })
    }
}

impl LaneSender for DirectSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.0.send(frame)
    }

    fn write_pages(&mut self, runs: &[DirectRun]) -> io::Result<()> {
        let (from, to) = (self.1.from.lock().unwrap().clone(), self.1.to.lock().unwrap().clone());
        let (from, to) = from.zip(to).filter(|_| !self.1.fails).ok_or(io::ErrorKind::PermissionDenied)?;
        for run in runs {
            assert!(run.offset % PAGE == 0 && run.len % PAGE == 0 && run.len > 0);
            for offset in (run.offset..run.offset + run.len).step_by(PAGE as usize) {
                let meddle = |moment| {
                    if let Some(meddle) = &self.1.meddler {
                        meddle(run.region, offset, moment);
                    }
                };
                let mut page = [0; PAGE as usize];
                meddle(Moment::Before);
                match self.1.held.lock().unwrap().get(&(run.region, offset)) {
                    Some(held) => page = *held,
                    None => from.read(run.region, offset, &mut page).map_err(io::Error::other)?,
                }
                to.write(run.region, offset, &page).map_err(io::Error::other)?;
                meddle(Moment::After);
                self.1.written.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(())
    }
}
