//! What the VMM does when its guest leaves guest mode: port and memory-mapped I/O, and the end.

use std::fmt;
use std::time::Duration;

/// What a vCPU does after its exit was handled.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reaction {
    /// Runs on.
    #[default]
    Continue,
    /// Rests for this long, without holding any lock of the VMM's. A pause ends the rest at once; what is left
    /// of it is forgotten.
    Rest(Duration),
    /// The guest asked to be reset or switched off: no vCPU runs on.
    End,
}

/// Why a guest does not run any more.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Ending {
    /// The exit handler answered [`Reaction::End`].
    Requested,
    /// Triple fault, or another event that resets a PC.
    Shutdown,
    /// The guest halted where nothing can wake it.
    Halted,
    /// KVM could not go on with the guest.
    InternalError {
        /// KVM's own number for it (`KVM_INTERNAL_ERROR_*`).
        suberror: u32,
    },
    /// The CPU refused the guest's state.
    FailedEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// The exit handler panicked.
    HandlerPanicked,
    /// An exit that this crate does not know.
    UnknownExit(
        /// The exit in words.
        String,
    ),
    /// KVM_RUN failed.
    RunFailed {
        /// The host's error number.
        errno: i32,
    },
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Requested => write!(f, "it asked for a reset or to be switched off"),
            Self::Shutdown => write!(f, "shutdown (triple fault)"),
            Self::Halted => write!(f, "it halted and nothing can wake it"),
            Self::InternalError { suberror } => write!(f, "KVM internal error {suberror}"),
            Self::FailedEntry { reason } => write!(f, "the CPU refused its state (reason {reason:#x})"),
            Self::HandlerPanicked => write!(f, "the VMM's exit handler panicked"),
            Self::UnknownExit(exit) => write!(f, "an exit nobody handles: {exit}"),
            Self::RunFailed { errno } => write!(f, "KVM_RUN: {}", std::io::Error::from_raw_os_error(*errno)),
        }
    }
}

/// The VMM's devices, as the vCPU threads reach them. Calls come from several threads at once. A
/// handler must not pause or resume the machine: that waits for the very thread it runs on.
///
/// System calls in a handler can be interrupted by the signal that pauses a vCPU (`EINTR`).
pub trait ExitHandler: Send + Sync {
    /// The guest wrote `data` (1, 2 or 4 bytes) to a port.
    fn pio_out(&self, vcpu: u32, port: u16, data: &[u8]) -> Reaction {
        let _ = (vcpu, port, data);
        Reaction::Continue
    }

    /// The guest reads `data.len()` bytes from a port; absent devices answer with ones.
    fn pio_in(&self, vcpu: u32, port: u16, data: &mut [u8]) -> Reaction {
        let _ = (vcpu, port);
        data.fill(0xff);
        Reaction::Continue
    }

    /// The guest wrote to an address that no memory slot covers.
    fn mmio_write(&self, vcpu: u32, address: u64, data: &[u8]) -> Reaction {
        let _ = (vcpu, address, data);
        Reaction::Continue
    }

    /// The guest reads from an address that no memory slot covers; absent devices answer with ones.
    fn mmio_read(&self, vcpu: u32, address: u64, data: &mut [u8]) -> Reaction {
        let _ = (vcpu, address);
        data.fill(0xff);
        Reaction::Continue
    }

    /// The guest has ended, by what this vCPU did. Called once; no vCPU runs on.
    fn ended(&self, vcpu: u32, ending: &Ending) {
        let _ = (vcpu, ending);
    }
}
