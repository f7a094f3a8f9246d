//! The source's driver: the entry points, and what its threads tell it.

mod drive;
mod encoders;
mod lanes;
mod meter;
mod state_writer;
mod steps;

use std::io;
use std::sync::Arc;

use super::Lent;
use super::lane::LaneName;
use crate::config::SourceConfig;
use crate::converge::{Adaptive, Convergence};
use crate::digest::{Digest, DigestKey};

use crate::encode::Tally;
use crate::error::{Error, Failed, Unsettled};
use crate::host::{Control, Observer, Spawner, ThreadRole};
use crate::limits::{MAX_LANES, MIN_BANDWIDTH};
use crate::memory::MemoryError;
use crate::session::{SourceSession, SourceSetup};
use crate::stats::Report;
use crate::transport::{Dialer, LaneHalves, TransportError};
use crate::units::PageRun;
use crate::vm::SourceVm;
use crate::wire::{Message, SessionId};
use drive::Driver;
pub(super) use encoders::{Parcel, Work};

/// Migrates a guest away.
///
/// ```no_run
/// # fn f(vm: &mut dyn pageferry::SourceVm, dialer: std::sync::Arc<dyn pageferry::transport::Dialer>) {
/// use pageferry::{Control, Source, SourceConfig};
/// match Source::new(SourceConfig::default()).run(vm, dialer, &Control::new()) {
///     Ok(report) => println!("downtime {:?}", report.downtime.total()),
///     Err(failed) => eprintln!("{failed}"),
/// }
/// # }
/// ```
pub struct Source {
    config: SourceConfig,
    policy: Arc<dyn Fn() -> Box<dyn Convergence> + Send + Sync>,
    lent: Lent,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Source {
    /// A source with the given choices.
    pub fn new(config: SourceConfig) -> Self {
        Self { config, policy: Arc::new(|| Box::new(Adaptive::default())), lent: Lent::default() }
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

    /// Decides by another policy when to stop.
    #[must_use]
    pub fn convergence(mut self, policy: impl Fn() -> Box<dyn Convergence> + Send + Sync + 'static) -> Self {
        self.policy = Arc::new(policy);
        self
    }

    /// Migrates the guest. Blocks until it runs at the destination, or until it is certain that it
    /// goes on here, or until [`SourceConfig::settle_window`] has passed without certainty.
    ///
    /// # Errors
    ///
    /// [`Failed`] says who owns the guest.
    pub fn run(&self, vm: &mut dyn SourceVm, dialer: Arc<dyn Dialer>, control: &Control) -> Result<Report, Failed> {
        let setup =
            self.setup(vm, &*dialer).map_err(|error| Failed::SourceStillOwns { error, report: Box::default() })?;
        let digest_key = setup.digest_key;
        let unsettled = Unsettled { session: setup.session, run: setup.run };
        Driver::new(self, vm, dialer, control, SourceSession::new(setup), unsettled, digest_key).drive()
    }

    /// Asks again about a migration that ended [`Failed::Undecided`], for another
    /// [`SourceConfig::settle_window`]. The guest is resumed here only if the destination has given
    /// it up for good.
    ///
    /// # Errors
    ///
    /// As for [`run`](Self::run).
    pub fn settle(
        &self,
        vm: &mut dyn SourceVm,
        dialer: Arc<dyn Dialer>,
        control: &Control,
        unsettled: Unsettled,
    ) -> Result<Report, Failed> {
        let Unsettled { session, run } = unsettled;
        let setup = self.setup_for(vm, session, DigestKey([0; 32]), Vec::new(), run);
        let error = Error::Misuse("the destination did not answer".to_owned());
        let state = SourceSession::settle(setup, error);
        Driver::new(self, vm, dialer, control, state, unsettled, DigestKey([0; 32])).drive()
    }

    fn setup(&self, vm: &mut dyn SourceVm, dialer: &dyn Dialer) -> Result<SourceSetup, Error> {
        self.check_config(dialer)?;
        let mut random = [0; 48];
        getrandom::fill(&mut random)
            .map_err(|error| Error::Host { what: "random numbers", source: io::Error::other(error.to_string()) })?;
        let mut vm_config = Vec::new();
        vm.describe(&mut vm_config).map_err(|source| Error::Vm { what: "describe the guest", source })?;
        if vm_config.len() > crate::limits::MAX_CONFIG {
            let text = format!("the VMM describes the guest in {} bytes; 512 KiB are possible", vm_config.len());
            return Err(Error::Misuse(text));
        }
        let (mut session, mut key) = ([0; 16], [0; 32]);
        session.copy_from_slice(&random[..16]);
        key.copy_from_slice(&random[16..]);
        let run = vm.is_running();
        Ok(self.setup_for(vm, SessionId(session), DigestKey(key), vm_config, run))
    }

    fn check_config(&self, dialer: &dyn Dialer) -> Result<(), Error> {
        // One of the transport's lanes is the control lane.
        let most = MAX_LANES.min(dialer.capabilities().max_lanes.saturating_sub(1));
        if self.config.lanes > most {
            let text = format!("{} lanes asked for; at most {most} are possible", self.config.lanes);
            return Err(Error::Misuse(text));
        }
        match self.config.bandwidth {
            Some(rate) if rate < MIN_BANDWIDTH => {
                let text = format!("a cap of {rate} bytes per second asked for; at least {MIN_BANDWIDTH} are needed");
                Err(Error::Misuse(text))
            }
            _ => Ok(()),
        }
    }

    fn setup_for(
        &self,
        vm: &mut dyn SourceVm,
        session: SessionId,
        digest_key: DigestKey,
        vm_config: Vec<u8>,
        run: bool,
    ) -> SourceSetup {
        SourceSetup {
            config: self.config.clone(),
            session,
            digest_key,
            layout: vm.memory().layout().clone(),
            vm_config,
            run,
            state_bytes_estimate: vm.state_bytes_estimate(),
            policy: (self.policy)(),
        }
    }
}

/// What the threads of a control lane tell the driver.
pub(super) enum ControlEvent {
    Message(Message),
    /// The receiving half has ended; nothing follows.
    Broken(Error),
    SendFailed(Error),
    Sent,
}

/// What the threads tell the driver.
pub(super) enum SourceEvent {
    Dialled(Result<LaneHalves, TransportError>, String),
    LanesDialled(Result<Vec<(LaneHalves, LaneName)>, TransportError>),
    /// From the control lane of this generation; of an older one it means nothing any more.
    Control(u64, ControlEvent),
    DataLaneBroken(Error),
    /// A lane has sent all it has of the open step.
    LaneFlushed,
    /// A batch was encoded, and has gone to the lanes unless nothing of it needs to be sent.
    Encoded(Encoded),
    EncodingFailed(Error),
    Hashed(Result<Digest, MemoryError>),
    Panicked(ThreadRole),
}

/// What became of a batch.
#[derive(Default)]
pub(super) struct Encoded {
    pub(super) tally: Tally,
    /// Pages put off to the round's second step.
    pub(super) deferred: Vec<PageRun>,
}
