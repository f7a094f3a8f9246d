//! The process guest at the destination: a place that becomes a guest when it is handed over.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory};
use pageferry::vm::{DestinationVm, VmResult};

use super::ProcessGuestError;
use super::image::Seal;
use super::ram::Ram;
use super::state::{Description, State};
use super::vcpus::Vcpus;
use crate::guest::{Guest, SelfCheck, Written};
use crate::workload::params::Params;

/// A place for a process guest.
#[derive(Debug)]
pub(crate) struct ArrivingProcessGuest {
    backing: Backing,
    prefault: bool,
    /// Memory that was handed over.
    given: Option<Arc<MappedMemory>>,
    prepared: Option<(Ram, Params, Option<Vec<u128>>)>,
    /// The guest's threads: held from `load` to `commit`.
    vcpus: Option<Vcpus>,
    running: bool,
}

impl ArrivingProcessGuest {
    /// A place whose memory will be backed like this, and touched at once if `prefault`.
    pub(crate) fn new(backing: Backing, prefault: bool) -> Self {
        Self { backing, prefault, given: None, prepared: None, vcpus: None, running: false }
    }

    /// A place whose memory is there already, and the source's until `commit`.
    pub(crate) fn with_memory(memory: Arc<MappedMemory>) -> Self {
        Self { given: Some(memory), ..Self::new(Backing::Memfd, false) }
    }

    fn here(&self) -> Result<&Vcpus, ProcessGuestError> {
        self.vcpus.as_ref().ok_or(ProcessGuestError::NotHere)
    }
}

impl DestinationVm for ArrivingProcessGuest {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let (params, image) = Description::read(config)?;
        let ram = match self.given.take() {
            Some(memory) => Ram::of(memory)?,
            None => Ram::map(layout.clone(), self.backing)?,
        };
        if self.prefault {
            ram.prefault()?;
        }
        let memory = ram.memory();
        self.prepared = Some((ram, params, image));
        Ok(memory)
    }

    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()> {
        let state = State::read(state)?;
        let (ram, params, image) = self.prepared.clone().ok_or(ProcessGuestError::NotHere)?;
        let seal = image.map(|hashes| Seal::of(params.seed, &hashes));
        self.vcpus = Some(Vcpus::go_on(ram, params, seal, &state)?);
        Ok(())
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        let vcpus = self.here()?;
        if run {
            vcpus.release();
        }
        self.running = run;
        Ok(())
    }

    fn abort(&mut self) {
        self.vcpus = None;
        self.prepared = None;
    }
}

impl Guest for ArrivingProcessGuest {
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()> {
        Ok(self.here()?.wait_ready(go_on)?)
    }

    fn ended(&self) -> Option<String> {
        self.vcpus.as_ref()?.ended()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.vcpus.as_ref().map(|vcpus| vcpus.heart().beats())
    }

    fn written(&self) -> Option<Written> {
        self.vcpus.as_ref().map(Vcpus::written)
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.here()?.heart().reset();
        Ok(())
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(Some(self.here()?.heart().longest_gap()))
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        let vcpus = self.here()?;
        vcpus.hold();
        let answer = vcpus.check();
        if self.running {
            vcpus.release();
        }
        Ok(answer)
    }
}
