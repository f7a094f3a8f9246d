//! A guest under KVM at the source.

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pageferry::dirty::DirtySource;
use pageferry::memory::GuestMemory;
use pageferry::vm::{SourceVm, Step, VmResult};
use pageferry_kvm::DirtyLogMode;
use pageferry_kvm::kvm_ioctls::Kvm;

use super::Program;
use super::conversation::Conversation;
use crate::cli::Backing;
use crate::guest::{Guest, SelfCheck};
use crate::machine::{BootImage, ConsoleEnds, GuestConfig, GuestHandle, LiveGuest};
use crate::workload::params::Params;

/// A kernel of the user's.
#[derive(Clone, Debug)]
pub(crate) struct Linux {
    /// Its file.
    pub(crate) kernel: PathBuf,
    /// Its initial RAM disk.
    pub(crate) initrd: Option<PathBuf>,
    /// Its command line.
    pub(crate) command_line: String,
}

/// A file that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}")]
struct Unreadable {
    path: PathBuf,
    source: io::Error,
}

/// A guest that runs here and can be migrated away.
#[derive(Debug)]
pub(crate) struct KvmGuest {
    live: LiveGuest,
    conversation: Conversation,
    program: Program,
}

impl KvmGuest {
    /// Boots our guest program.
    pub(crate) fn start(memory: u64, backing: Backing, params: Params) -> VmResult<Self> {
        let params = Params { tsc_khz: clock_khz()?, ..params };
        let image =
            BootImage { kernel: Cow::Borrowed(crate::payload()), initrd: None, command_line: params.to_string() };
        Self::boot(memory, backing, params.vcpus, image, Program::Ours, ConsoleEnds::default())
    }

    /// Boots a Linux.
    pub(crate) fn start_linux(
        memory: u64,
        backing: Backing,
        vcpus: u32,
        linux: &Linux,
        console: ConsoleEnds,
    ) -> VmResult<Self> {
        let image = BootImage {
            kernel: Cow::Owned(read(&linux.kernel)?),
            initrd: linux.initrd.as_ref().map(read).transpose()?,
            command_line: linux.command_line.clone(),
        };
        Self::boot(memory, backing, vcpus, image, Program::Linux, console)
    }

    fn boot(
        ram_bytes: u64,
        backing: Backing,
        vcpus: u32,
        image: BootImage,
        program: Program,
        console: ConsoleEnds,
    ) -> VmResult<Self> {
        let (backing, dirty_log) = (backing.into(), DirtyLogMode::default());
        let mut live = LiveGuest::boot(GuestConfig { ram_bytes, vcpus, backing, image, console, dirty_log })?;
        let conversation = Conversation::new(live.handle(), program, ram_bytes);
        live.resume()?;
        Ok(Self { live, conversation, program })
    }

    /// Shows the guest to others.
    pub(crate) fn handle(&self) -> GuestHandle {
        self.live.handle()
    }

    /// What runs in it.
    pub(crate) fn program(&self) -> Program {
        self.program
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, Unreadable> {
    std::fs::read(path).map_err(|source| Unreadable { path: path.clone(), source })
}

/// The frequency at which a guest's time stamp counter will run; not every CPU tells it to guests.
fn clock_khz() -> VmResult<u32> {
    // A host without KVM is told so by the machine, in better words.
    let Ok(kvm) = Kvm::new() else { return Ok(0) };
    Ok(kvm.create_vm()?.create_vcpu(0)?.get_tsc_khz()?)
}

impl SourceVm for KvmGuest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.live.memory()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        self.live.dirty()
    }

    fn describe(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        self.live.describe(out)
    }

    fn is_running(&self) -> bool {
        self.live.is_running()
    }

    fn pause(&mut self) -> VmResult<()> {
        self.live.pause()
    }

    fn resume(&mut self) -> VmResult<()> {
        self.live.resume()
    }

    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        self.live.throttle(percent)
    }

    fn save(&mut self, out: &mut dyn io::Write) -> VmResult<()> {
        self.live.save(out)
    }

    fn state_bytes_estimate(&self) -> u64 {
        self.live.state_bytes_estimate()
    }

    fn step(&mut self, step: Step) -> VmResult<()> {
        self.live.step(step)
    }
}

impl Guest for KvmGuest {
    fn wait_ready(&mut self) -> VmResult<()> {
        Ok(self.conversation.wait_ready()?)
    }

    fn heartbeats(&self) -> Option<u64> {
        self.conversation.heartbeats()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.conversation.reset_stall();
        Ok(())
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(self.conversation.longest_stall()?)
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        Ok(self.conversation.self_check()?)
    }
}
