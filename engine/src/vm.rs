//! What the engine asks of a VMM: one trait for the source's guest, one for the destination's.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::dirty::DirtySource;
use crate::memory::{GuestMemory, Layout};

/// An error of the VMM, carried to the caller unchanged.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// Result of a call into the VMM.
pub type VmResult<T> = Result<T, VmError>;

/// Moments of a migration at which a VMM may have work of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Step {
    /// The destination has accepted; the first page is about to be sent.
    Begin,
    /// The guest is stopped and the destination holds everything: release disk locks now, and write
    /// no guest memory. An error here keeps the guest at the source.
    BeforeHandover,
    /// The destination runs the guest. Clean up; announce nothing.
    Committed,
    /// The migration failed and the guest stays here: take back what `BeforeHandover` released.
    Aborted,
}

/// A guest to migrate away. All calls come from the thread that called [`crate::Source::run`].
pub trait SourceVm {
    /// The guest's memory.
    fn memory(&self) -> Arc<dyn GuestMemory>;

    /// The tracker of writes to it.
    fn dirty(&mut self) -> &mut dyn DirtySource;

    /// Writes what the destination must know before it can make room: vCPU count, CPU features,
    /// devices. At most 512 KiB; the engine does not look inside.
    fn describe(&mut self, out: &mut dyn io::Write) -> VmResult<()>;

    /// Whether the guest runs now. A guest that was paused before a migration stays paused after it.
    fn is_running(&self) -> bool {
        true
    }

    /// Stops vCPUs and devices; on return nothing writes guest memory any more.
    fn pause(&mut self) -> VmResult<()>;

    /// Runs the guest again after a failed migration. Never called once Commit may have left.
    fn resume(&mut self) -> VmResult<()>;

    /// Takes about `percent` (0 to 99) of the vCPUs' time away; 0 ends it.
    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        let _ = percent;
        Err("this VMM cannot throttle its vCPUs".into())
    }

    /// Writes the machine state (vCPUs, interrupt controllers, devices) of the paused guest. It may
    /// write guest memory on the way; the engine harvests once more afterwards.
    fn save(&mut self, out: &mut dyn io::Write) -> VmResult<()>;

    /// Bytes that [`save`](Self::save) will write, roughly: part of the predicted downtime.
    fn state_bytes_estimate(&self) -> u64 {
        64 << 10
    }

    /// A moment has come; see [`Step`].
    fn step(&mut self, step: Step) -> VmResult<()> {
        let _ = step;
        Ok(())
    }
}

/// A place for a guest to arrive at. All calls come from the thread that called
/// [`crate::Destination::run`].
pub trait DestinationVm {
    /// Makes room for the described guest, or refuses it: the error's text reaches the source's
    /// operator. Both arguments come from the peer: check them, also against each other. The returned
    /// memory has this layout and reads as zeros. After a refusal `abort` is called all the same.
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>>;

    /// Takes over the machine state written by [`SourceVm::save`]; the guest must not run yet. The
    /// bytes come from the peer: check them.
    fn load(&mut self, state: &mut dyn io::Read) -> VmResult<()>;

    /// The guest is this side's now. Runs it if `run`, or keeps it paused as it was at the source. After
    /// an error no vCPU has run, and none ever may: the guest goes back to the source.
    fn commit(&mut self, run: bool) -> VmResult<()>;

    /// The guest stays at the source. Lets go of everything; must not run it, now or later. No page is
    /// placed any more when this is called.
    fn abort(&mut self);

    /// Whether this VMM can take over memory that it shares with the source ([`Transfer::Shared`](crate::memory::Transfer)):
    /// it maps the descriptors that it was handed, and touches nothing of that memory before `commit`, not even in `load`,
    /// and not in `abort` either. No is the honest default, and a guest with such memory is then refused.
    fn takes_shared_memory(&self) -> bool {
        false
    }

    /// Userfaultfds over the guest's memory, for post-copy. None is the honest default.
    fn userfaultfds(&mut self) -> VmResult<Vec<OwnedFd>> {
        Ok(Vec::new())
    }
}
