//! What can go wrong between this crate and KVM, with the remedy where there is one.

use std::io;

use crate::exit::Ending;

/// Why something could not be done with KVM.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmError {
    /// There is no KVM on this host.
    #[error(
        "{path} does not exist: load the module kvm_intel or kvm_amd (modprobe), and switch on virtualisation in the \
         firmware, or nested virtualisation if this host is itself a virtual machine"
    )]
    NoDevice {
        /// The device that was looked for.
        path: String,
    },
    /// This user may not use KVM.
    #[error(
        "{path} may not be opened by this user: add the user to the group `kvm` (usermod -aG kvm), then log in again"
    )]
    NoPermission {
        /// The device.
        path: String,
    },
    /// The device cannot be opened for another reason.
    #[error("cannot open {path}: {source}; if it is busy, another hypervisor may be using the CPU's virtualisation")]
    Open {
        /// The device.
        path: String,
        /// What the host said.
        source: io::Error,
    },
    /// Not the KVM API that every Linux since 2.6.22 has.
    #[error("{path} speaks KVM API version {version}, not 12: this kernel cannot be used")]
    ApiVersion {
        /// The device.
        path: String,
        /// The version it reports.
        version: i32,
    },
    /// KVM lacks something that this crate cannot work without.
    #[error("this host's KVM lacks {capability}: use a kernel of version {since} or newer")]
    MissingCapability {
        /// Its name in the KVM API.
        capability: &'static str,
        /// First kernel version that has it on x86-64.
        since: &'static str,
    },
    /// A call into KVM failed.
    #[error("{operation} failed: {source}")]
    Call {
        /// What was to be done, and to which thing.
        operation: String,
        /// What the host said.
        source: io::Error,
    },
    /// A configuration that cannot be made into a machine.
    #[error("{0}")]
    Config(String),
    /// The host's CPU or KVM cannot give the guest the CPU it was started with.
    #[error("this host cannot give the guest its CPU; missing: {}", .0.join(", "))]
    Cpu(
        /// What is missing, one thing each.
        Vec<String>,
    ),
    /// The vCPUs must be paused for this.
    #[error("vCPU {index} is running: pause the machine first")]
    Running {
        /// The vCPU.
        index: u32,
    },
    /// A vCPU's registers are for one holder at a time.
    #[error("the registers of vCPU {index} are held already: drop the other `PausedVcpu` first")]
    Held {
        /// The vCPU.
        index: u32,
    },
    /// A vCPU did not stop: the VMM's exit handler does not return.
    #[error("vCPU {index} did not stop within {seconds} s: an exit handler of the VMM does not return")]
    Stuck {
        /// The vCPU.
        index: u32,
        /// How long it was waited for.
        seconds: u64,
    },
    /// A call that comes at the wrong time.
    #[error("the machine is {is}; {remedy}")]
    Order {
        /// The state it is in.
        is: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// The guest has ended and cannot run on.
    #[error("the guest has ended: {0}")]
    Ended(Ending),
    /// Machine state that this host cannot take over.
    #[error("machine state cannot be loaded: {0}")]
    State(String),
}

/// Gives a failed call the name of what it was to do.
pub(crate) fn call<E: Into<io::Error>>(operation: impl Into<String>) -> impl FnOnce(E) -> KvmError {
    move |error| KvmError::Call { operation: operation.into(), source: error.into() }
}
