//! Writes to guest memory that KVM does not see: the VMM's own.

/// Collects the pages that the VMM itself writes (a loader, a device model). Shared by everything
/// that writes; marks are two atomic operations a page.
#[derive(Debug)]
pub struct HostWrites {}

impl HostWrites {
    /// Bytes of guest-physical memory were written. Call it after the write, before the guest or
    /// anybody else is told of it. What lies in no region is ignored.
    pub fn mark(&self, guest_address: u64, len: u64) {
        let _ = (guest_address, len);
        todo!()
    }
}
