//! The few KVM calls that `kvm-ioctls` lacks, or offers only with an allocation per call.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_dirty_log, kvm_sregs2, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};

const WRITE: u64 = 1;
const READ: u64 = 2;

/// A request number as in the kernel's `asm-generic/ioctl.h`.
const fn request<T>(direction: u64, number: u64) -> u64 {
    direction << 30 | (size_of::<T>() as u64) << 16 | (KVMIO as u64) << 8 | number
}

const KVM_GET_DIRTY_LOG: u64 = request::<kvm_dirty_log>(WRITE, 0x42);
const KVM_CLEAR_DIRTY_LOG: u64 = request::<kvm_clear_dirty_log>(READ | WRITE, 0xc0);
const KVM_SET_XSAVE: u64 = request::<kvm_xsave>(WRITE, 0xa5);
const KVM_GET_XSAVE: u64 = request::<kvm_xsave>(READ, 0xa4);
const KVM_GET_XSAVE2: u64 = request::<kvm_xsave>(READ, 0xcf);
const KVM_GET_SREGS2: u64 = request::<kvm_sregs2>(READ, 0xcc);
const KVM_SET_SREGS2: u64 = request::<kvm_sregs2>(WRITE, 0xcd);

/// # Safety
///
/// `argument` must be what `request` expects: valid for its reads and writes.
unsafe fn call(fd: &impl AsRawFd, request: u64, argument: *mut libc::c_void) -> io::Result<()> {
    // SAFETY: the caller's promise; the descriptor is open for as long as it is borrowed.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request as _, argument) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Refuses a buffer that KVM would read or write past.
fn check(fits: bool, what: &'static str) -> io::Result<()> {
    if fits { Ok(()) } else { Err(io::Error::new(io::ErrorKind::InvalidInput, what)) }
}

/// Takes a slot's dirty bits: a bit per page. `bitmap` has room for `pages`, rounded up to a word.
pub(crate) fn dirty_log(vm: &VmFd, slot: u32, pages: u64, bitmap: &mut [u64]) -> io::Result<()> {
    check(bitmap.len() as u64 >= pages.div_ceil(64), "the bitmap is too small for the slot")?;
    let mut argument = kvm_dirty_log { slot, ..Default::default() };
    argument.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: KVM writes a bit per page of the slot, rounded up to 64: as much as was just checked.
    unsafe { call(vm, KVM_GET_DIRTY_LOG, (&raw mut argument).cast()) }
}

/// Clears dirty bits of a slot and write-protects their pages, from `first_page` on.
pub(crate) fn clear_dirty_log(vm: &VmFd, slot: u32, first_page: u64, pages: u64, words: &[u64]) -> io::Result<()> {
    check(words.len() as u64 >= pages.div_ceil(64), "too few bitmap words for the pages")?;
    let mut argument = kvm_clear_dirty_log { slot, num_pages: pages as u32, first_page, ..Default::default() };
    argument.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
    // SAFETY: KVM only reads the words, as many as `num_pages` needs: as many as was just checked.
    unsafe { call(vm, KVM_CLEAR_DIRTY_LOG, (&raw mut argument).cast()) }
}

/// Reads a vCPU's XSAVE area into a buffer of the size that the VM reports for it, at least 4096 bytes.
pub(crate) fn xsave(vcpu: &VcpuFd, area: &mut [u64], size: XsaveSize) -> io::Result<()> {
    check(size_of_val(area) >= size.bytes(), "the buffer is too small for the XSAVE area")?;
    let number = if size.extended { KVM_GET_XSAVE2 } else { KVM_GET_XSAVE };
    // SAFETY: KVM writes the size that it reported: as much as was just checked.
    unsafe { call(vcpu, number, area.as_mut_ptr().cast()) }
}

/// Writes a vCPU's XSAVE area.
pub(crate) fn set_xsave(vcpu: &VcpuFd, area: &[u64], size: XsaveSize) -> io::Result<()> {
    check(size_of_val(area) >= size.bytes(), "the buffer is too small for the XSAVE area")?;
    // SAFETY: KVM only reads, and as much as it reported: as much as was just checked.
    unsafe { call(vcpu, KVM_SET_XSAVE, area.as_ptr().cast_mut().cast()) }
}

/// How large KVM's XSAVE area is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct XsaveSize {
    words: usize,
    extended: bool,
}

impl XsaveSize {
    /// From the value of `KVM_CAP_XSAVE2` on the VM, which is 0 before Linux 5.17.
    pub(crate) fn from_capability(value: i32) -> Self {
        let reported = usize::try_from(value).unwrap_or(0);
        let words = reported.max(size_of::<kvm_xsave>()).div_ceil(size_of::<u64>());
        Self { words, extended: reported > 0 }
    }

    pub(crate) fn bytes(self) -> usize {
        self.words * size_of::<u64>()
    }

    pub(crate) fn words(self) -> usize {
        self.words
    }
}

/// Reads a vCPU's special registers with the page-directory pointers.
pub(crate) fn sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut registers = kvm_sregs2::default();
    // SAFETY: KVM writes one `kvm_sregs2`.
    unsafe { call(vcpu, KVM_GET_SREGS2, (&raw mut registers).cast()) }?;
    Ok(registers)
}

/// Writes a vCPU's special registers with the page-directory pointers.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, registers: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: KVM only reads one `kvm_sregs2`.
    unsafe { call(vcpu, KVM_SET_SREGS2, (&raw const *registers).cast_mut().cast()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_numbers_are_the_kernels() {
        assert_eq!(KVM_GET_DIRTY_LOG, 0x4010_ae42);
        assert_eq!(KVM_CLEAR_DIRTY_LOG, 0xc018_aec0);
        assert_eq!(KVM_GET_XSAVE2, 0x9000_aecf);
        assert_eq!(KVM_SET_XSAVE, 0x5000_aea5);
        assert_eq!(KVM_GET_SREGS2, 0x8140_aecc);
    }

    #[test]
    fn the_xsave_area_is_never_smaller_than_the_old_structure() {
        assert_eq!(XsaveSize::from_capability(0).bytes(), 4096);
        assert_eq!(XsaveSize::from_capability(-1), XsaveSize::from_capability(0));
        assert_eq!(XsaveSize::from_capability(11_008).bytes(), 11_008);
    }
}
