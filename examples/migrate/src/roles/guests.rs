//! Guests of either kind: starting one as the command line says, and taking in whichever comes.
//!
//! The description that travels ahead begins with one byte for the kind, so that a destination
//! needs no option to know what will arrive.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use pageferry::dirty::DirtySource;
use pageferry::memory::{GuestMemory, Layout};
use pageferry::vm::{DestinationVm, SourceVm, Step, VmError, VmResult};

use crate::cli::{Backing, GuestKind, GuestOptions};
use crate::guest::{DestinationGuest, Guest, SelfCheck, SourceGuest};
use crate::process_guest::{ArrivingProcessGuest, ProcessGuest};
use crate::progress::Screen;

/// Why a guest could not be started or taken in.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GuestError {
    /// A kernel needs a machine.
    #[error("--kernel boots a real machine, which needs KVM: {0}")]
    KernelNeedsKvm(&'static str),
    /// A description that begins with an unknown kind.
    #[error(
        "the source sends a guest of a kind that this program does not know ({0:?}): use the same `migrate` on both sides"
    )]
    UnknownKind(Option<u8>),
    /// Nothing has arrived.
    #[error("no guest has arrived")]
    NotHere,
}

const NO_KVM: &str = "this host has no /dev/kvm";

/// A guest that was started, with the byte that announces its kind.
pub(crate) struct AnySource {
    kind: u8,
    guest: Box<dyn SourceGuest>,
}

const PROCESS: u8 = b'P';

/// Starts the guest that the command line asks for.
pub(crate) fn start(options: &GuestOptions, screen: &Screen) -> Result<AnySource, VmError> {
    let has_kvm = Path::new("/dev/kvm").exists();
    match options.guest {
        GuestKind::Auto if has_kvm => start_kvm(options, screen),
        GuestKind::Kvm => start_kvm(options, screen),
        GuestKind::Auto => {
            screen.note(&format!("{NO_KVM}: threads that write a memory mapping take a virtual machine's place"));
            start_process(options, screen)
        }
        GuestKind::Process => start_process(options, screen),
    }
}

fn start_kvm(options: &GuestOptions, screen: &Screen) -> Result<AnySource, VmError> {
    start_process(options, screen)
}

fn start_process(options: &GuestOptions, screen: &Screen) -> Result<AnySource, VmError> {
    if options.kernel.is_some() {
        return Err(GuestError::KernelNeedsKvm("leave out --guest process, or run where /dev/kvm is").into());
    }
    let params = options.params();
    screen.note(&format!("process guest: {}", options.describe(&params)));
    let guest = ProcessGuest::start(options.memory, options.backing.into(), params)?;
    Ok(AnySource { kind: PROCESS, guest: Box::new(guest) })
}

impl SourceVm for AnySource {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.guest.memory()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        self.guest.dirty()
    }

    fn describe(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        out.write_all(&[self.kind])?;
        self.guest.describe(out)
    }

    fn is_running(&self) -> bool {
        self.guest.is_running()
    }

    fn pause(&mut self) -> VmResult<()> {
        self.guest.pause()
    }

    fn resume(&mut self) -> VmResult<()> {
        self.guest.resume()
    }

    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        self.guest.throttle(percent)
    }

    fn save(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        self.guest.save(out)
    }

    fn state_bytes_estimate(&self) -> u64 {
        self.guest.state_bytes_estimate()
    }

    fn step(&mut self, step: Step) -> VmResult<()> {
        self.guest.step(step)
    }
}

impl Guest for AnySource {
    fn wait_ready(&mut self) -> VmResult<()> {
        self.guest.wait_ready()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.guest.heartbeats()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.guest.reset_stall()
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        self.guest.longest_stall()
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        self.guest.self_check()
    }
}

/// A place for a guest of either kind.
pub(crate) struct AnyDestination {
    backing: Backing,
    max_memory: Option<u64>,
    guest: Option<Box<dyn DestinationGuest>>,
}

impl AnyDestination {
    /// An empty place.
    pub(crate) fn new(backing: Backing, max_memory: Option<u64>) -> Self {
        Self { backing, max_memory, guest: None }
    }

    fn place(&self, kind: Option<u8>) -> Result<Box<dyn DestinationGuest>, GuestError> {
        match kind {
            Some(PROCESS) => Ok(Box::new(ArrivingProcessGuest::new(self.backing.into(), self.max_memory))),
            unknown => Err(GuestError::UnknownKind(unknown)),
        }
    }

    fn here(&mut self) -> Result<&mut dyn DestinationGuest, GuestError> {
        match &mut self.guest {
            Some(guest) => Ok(guest.as_mut()),
            None => Err(GuestError::NotHere),
        }
    }
}

impl DestinationVm for AnyDestination {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let mut guest = self.place(config.first().copied())?;
        let memory = guest.prepare(&config[1..], layout)?;
        self.guest = Some(guest);
        Ok(memory)
    }

    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()> {
        self.here()?.load(state)
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        self.here()?.commit(run)
    }

    fn abort(&mut self) {
        if let Some(mut guest) = self.guest.take() {
            guest.abort();
        }
    }
}

impl Guest for AnyDestination {
    fn wait_ready(&mut self) -> VmResult<()> {
        self.here()?.wait_ready()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.guest.as_ref()?.heartbeats()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.here()?.reset_stall()
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        self.here()?.longest_stall()
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        self.here()?.self_check()
    }
}
