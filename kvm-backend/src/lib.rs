//! Pageferry's thin KVM adapter: what the engine needs of a guest under KVM, and what a small VMM
//! needs besides to run one.
//!
//! The road through it:
//!
//! 1. [`Host::open`] asks `/dev/kvm` what this host can do.
//! 2. [`Machine::new`] makes a virtual machine over guest memory that this process has mapped: a memory slot
//!    per region, interrupt controllers, timer, vCPUs with a [`MachineConfig`]'s CPUID. The
//!    configuration travels to the destination before any page does, and a host that cannot give
//!    the guest its CPU features refuses it by name.
//! 3. The VMM loads a guest, sets registers ([`Machine::vcpu`]), and calls [`Machine::start`] with an
//!    [`ExitHandler`]: a thread per vCPU, parked until [`Machine::resume`].
//! 4. [`Machine::dirty_log`] is the tracker of writes for the engine; what the VMM itself writes to
//!    guest memory it reports to [`Machine::host_writes`].
//! 5. [`Machine::throttle`], [`Machine::pause`], [`Machine::save`] at the source, [`Machine::load`] and
//!    [`Machine::resume`] at the destination.
//!
//! Unsafe code is in four places: the KVM calls that `kvm-ioctls` lacks (`ioctl`), signals and the
//! shared page of a vCPU (`kick`), the call that gives KVM its memory slots (`vm`), and the one that
//! signals a vCPU thread (`vcpu`).
#![deny(unsafe_code)]

mod config;
mod cpuid;
mod crew;
mod dirty_log;
mod error;
mod exit;
mod host;
mod host_writes;
mod ioctl;
mod kick;
mod machine;
mod packed;
mod state;
mod throttle;
mod vcpu;
mod vm;

pub use config::MachineConfig;
pub use cpuid::missing_features;
pub use dirty_log::{DirtyLog, DirtyLogMode};
pub use error::KvmError;
pub use exit::{Ending, ExitHandler, Reaction};
pub use host::{Features, Host};
pub use host_writes::HostWrites;
pub use machine::{IrqLine, Machine, PausedVcpu};
pub use {kvm_bindings, kvm_ioctls};
