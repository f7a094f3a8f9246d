//! What this host's KVM can do.

use kvm_bindings::kvm_cpuid_entry2;

use crate::error::KvmError;

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct Host {}

impl Host {
    /// Opens `/dev/kvm` and checks that everything this crate needs is there.
    pub fn open() -> Result<Self, KvmError> {
        todo!()
    }

    /// The CPUID entries that this host can give a guest.
    pub fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        todo!()
    }
}
