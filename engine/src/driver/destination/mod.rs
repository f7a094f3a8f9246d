//! The destination's driver: the entry points, and what its threads tell it.

mod drive;
mod lanes;

use std::sync::Arc;
use std::time::Duration;

use super::Lent;
use super::door::Guest;
use crate::config::DestinationConfig;
use crate::digest::Digest;
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Observer, Spawner, ThreadRole};
use crate::memory::{GuestMemory, Layout, MemoryError};
use crate::session::{DestinationSession, DestinationSetup, LaneKey};
use crate::stats::Report;
use crate::transport::{Acceptor, TransportError};
use crate::vm::{DestinationVm, VmResult};
use crate::wire::{Message, SessionId};
use drive::Driver;

/// Receives a guest.
///
/// ```no_run
/// # fn f(vm: &mut dyn pageferry::DestinationVm, acceptor: std::sync::Arc<dyn pageferry::transport::Acceptor>) {
/// use pageferry::{Control, Destination, DestinationConfig};
/// match Destination::new(DestinationConfig::default()).run(vm, acceptor, &Control::new()) {
///     Ok(report) => println!("the guest runs here; {} pages came", report.pages_sent),
///     Err(failed) => eprintln!("{failed}"),
/// }
/// # }
/// ```
pub struct Destination {
    config: DestinationConfig,
    lent: Lent,
}

impl std::fmt::Debug for Destination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Destination").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Destination {
    /// A destination with the given choices.
    pub fn new(config: DestinationConfig) -> Self {
        Self { config, lent: Lent::default() }
    }

    /// Tells an observer what happens.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.lent.observer = Some(observer);
        self
    }

    /// Runs the engine's threads on the host's terms.
    #[must_use]
    pub fn spawner(mut self, spawner: Arc<dyn Spawner>) -> Self {
        self.lent.spawner = spawner;
        self
    }

    /// Waits for a source, takes its guest, and runs it. Blocks until the guest runs here and the
    /// source knows it, or until it is certain that it does not, or until
    /// [`DestinationConfig::settle_window`] has passed without certainty.
    ///
    /// # Errors
    ///
    /// [`Failed`] says who owns the guest.
    pub fn run(
        &self,
        vm: &mut dyn DestinationVm,
        acceptor: Arc<dyn Acceptor>,
        control: &Control,
    ) -> Result<Report, Failed> {
        let setup = DestinationSetup { config: self.config.clone() };
        Driver::new(self, vm, control, acceptor, DestinationSession::new(setup)).drive()
    }

    /// Tells a source that is still undecided that its guest runs here: for a migration that ended
    /// well on this side ([`Report::session`]), when the source lost the link before it knew. Waits
    /// for the source for [`DestinationConfig::settle_window`] at most.
    ///
    /// # Errors
    ///
    /// The acceptor's, as [`Failed::DestinationOwns`].
    pub fn confirm(
        &self,
        acceptor: Arc<dyn Acceptor>,
        control: &Control,
        session: SessionId,
    ) -> Result<Report, Failed> {
        let setup = DestinationSetup { config: self.config.clone() };
        Driver::new(self, &mut NoVm, control, acceptor, DestinationSession::confirm(setup, session)).drive()
    }

    /// Stands ready once more to be asked about a migration that ended [`Failed::Undecided`]. Being
    /// asked means that Commit never came here: the guest is given up, and the source told so.
    ///
    /// # Errors
    ///
    /// Always: `SourceStillOwns` once settled, `Undecided` if nobody asked.
    pub fn settle(
        &self,
        vm: &mut dyn DestinationVm,
        acceptor: Arc<dyn Acceptor>,
        control: &Control,
        unsettled: Unsettled,
    ) -> Result<Report, Failed> {
        let setup = DestinationSetup { config: self.config.clone() };
        let error = Error::NoSource(self.config.settle_window);
        Driver::new(self, vm, control, acceptor, DestinationSession::settle(setup, unsettled.session, error)).drive()
    }
}

/// Stands in where no VM is asked for anything any more.
struct NoVm;

impl DestinationVm for NoVm {
    fn prepare(&mut self, _config: &[u8], _layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        Err("no guest is expected here".into())
    }

    fn load(&mut self, _state: &mut dyn std::io::Read) -> VmResult<()> {
        Err("no guest is expected here".into())
    }

    fn commit(&mut self, _run: bool) -> VmResult<()> {
        Err("no guest is expected here".into())
    }

    fn abort(&mut self) {}
}

/// What the threads of a lane tell the driver.
pub(super) enum LaneEvent {
    Message(Message),
    RoundComplete(u32, Digest),
    PlacingFailed(Error),
    /// The receiving half of the control lane has ended; nothing follows.
    ControlBroken(Error),
    ControlSendFailed(Error),
    ControlSent,
    DataLaneBroken(Error),
}

/// What the threads tell the driver.
pub(super) enum DestinationEvent {
    Greeted(LaneKey, Box<Guest>),
    DoorBroken(TransportError),
    /// From a lane of this generation; of an older one it means nothing any more.
    Lane(u64, LaneEvent),
    Hashed(Result<Digest, MemoryError>, Duration),
    Panicked(ThreadRole),
}
