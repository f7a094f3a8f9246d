//! A guest under KVM at the destination.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use pageferry::memory::{GuestMemory, Layout};
use pageferry::vm::{DestinationVm, VmError, VmResult};

use super::Program;
use super::conversation::Conversation;
use crate::guest::{Guest, SelfCheck};
use crate::machine::{ArrivalConfig, ArrivingGuest, GuestHandle};

/// A place for a guest under KVM.
#[derive(Debug)]
pub(crate) struct ArrivingKvmGuest {
    place: ArrivingGuest,
    program: Program,
    conversation: Option<Conversation>,
}

impl ArrivingKvmGuest {
    /// An empty place.
    pub(crate) fn new(config: ArrivalConfig, program: Program) -> Self {
        Self { place: ArrivingGuest::new(config), program, conversation: None }
    }

    /// Shows the guest, once there is one.
    pub(crate) fn handle(&self) -> Option<GuestHandle> {
        self.place.handle()
    }

    fn here(&self) -> Result<&Conversation, VmError> {
        self.conversation.as_ref().ok_or_else(|| "no guest has arrived".into())
    }
}

impl DestinationVm for ArrivingKvmGuest {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let memory = self.place.prepare(config, layout)?;
        let ram_bytes = layout.regions().iter().map(|region| region.len).sum();
        self.conversation = self.place.handle().map(|handle| Conversation::new(handle, self.program, ram_bytes));
        Ok(memory)
    }

    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()> {
        self.place.load(state)
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        self.place.commit(run)
    }

    fn abort(&mut self) {
        self.conversation = None;
        self.place.abort();
    }
}

impl Guest for ArrivingKvmGuest {
    fn wait_ready(&mut self) -> VmResult<()> {
        self.here().map(drop)
    }

    fn heartbeats(&self) -> Option<u64> {
        self.conversation.as_ref()?.heartbeats()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.here()?.reset_stall();
        Ok(())
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(self.here()?.longest_stall()?)
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        Ok(self.here()?.self_check()?)
    }
}
