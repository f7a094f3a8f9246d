//! What can go wrong with the example's machine, in words for its operator.

use std::io;
use std::time::Duration;

use pageferry::memory::LayoutError;
use pageferry_kvm::KvmError;

use super::boot::BootError;
use super::room::NoRoom;

/// Why a guest could not be made, saved or taken over.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MachineError {
    /// Memory of a size that no guest can have.
    #[error("{bytes} bytes of guest memory are not possible: use a multiple of 4096, and at least {} MiB", least >> 20)]
    MemorySize { bytes: u64, least: u64 },
    /// More than the built-in guest program can map.
    #[error("{} GiB of guest memory are too much for the built-in guest, which takes {} GiB at most", bytes >> 30, most >> 30)]
    PayloadMemory { bytes: u64, most: u64 },
    /// The engine cannot migrate this layout.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// The host did not give the memory.
    #[error("cannot map {bytes} bytes of guest memory as {backing}: {source}")]
    Map { bytes: u64, backing: &'static str, source: io::Error },
    /// The kernel loader cannot reach the memory.
    #[error("the kernel loader cannot use the guest's memory: {0}")]
    LoaderView(Box<dyn std::error::Error + Send + Sync>),
    /// The guest cannot boot.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// KVM refused something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// A register call on a vCPU failed.
    #[error("cannot set the first vCPU's registers: {0}")]
    Registers(pageferry_kvm::kvm_ioctls::Error),
    /// The console's input thread did not start.
    #[error("cannot read the console's input: {0}")]
    Input(io::Error),
    /// The host has no room, or its operator allows less.
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    /// Another version of this program, or not this program.
    #[error(
        "the source describes its machine in version {theirs}, this side knows version {ours}: use the same `migrate` on both sides"
    )]
    Version { theirs: u16, ours: u16 },
    /// Bytes from the peer that make no sense.
    #[error("the source's {what} cannot be understood: {why}")]
    Invalid { what: &'static str, why: String },
    /// The guest ran into its end.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// The payload found itself unable to go on.
    #[error("the guest has panicked: {0}")]
    Panicked(String),
    /// The payload did not answer.
    #[error("the guest has not {what} for {patience:?}; is it running?")]
    Silent { what: &'static str, patience: Duration },
    /// Whoever waited for the guest does not any more.
    #[error("the guest is not waited for any longer")]
    NotAwaited,
    /// Calls in an order that the engine never uses.
    #[error("no guest has been prepared")]
    NotPrepared,
}

impl MachineError {
    pub(super) fn loader(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::LoaderView(error.into())
    }

    pub(super) fn invalid(what: &'static str, why: &dyn ToString) -> Self {
        Self::Invalid { what, why: why.to_string() }
    }
}
