//! Getting a vCPU's thread out of the guest: a signal, and the flag that keeps it out.
//!
//! A signal alone can be lost: it may arrive just before KVM_RUN, do nothing, and the vCPU runs on.
//! So the kicker sets `immediate_exit` in the vCPU's shared page first and sends the signal after it.
//! A vCPU about to enter sees the flag; one that looked just before it was set has the signal
//! pending, and KVM looks for that as the last thing before entering the guest.
#![allow(unsafe_code)]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;

/// Makes sure that the kick signal (the first real-time signal) interrupts a thread and does nothing
/// else. A handler that the process has installed for it already serves as well and is left alone.
pub(crate) fn install_handler() -> io::Result<()> {
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let result = INSTALLED.get_or_init(|| install().map_err(|error| error.raw_os_error().unwrap_or(0)));
    result.map_err(io::Error::from_raw_os_error)
}

extern "C" fn ignore(_signal: libc::c_int) {}

fn install() -> io::Result<()> {
    let mut present = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: asks for the present action; the kernel fills the structure, for which all zeros is valid too.
    let present = unsafe {
        check(libc::sigaction(libc::SIGRTMIN(), ptr::null(), present.as_mut_ptr()))?;
        present.assume_init()
    };
    if present.sa_sigaction != libc::SIG_DFL && present.sa_sigaction != libc::SIG_IGN {
        return Ok(());
    }
    // SAFETY: all zeros is a valid `sigaction`; the handler touches nothing, so it may run anywhere.
    unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        check(libc::sigaction(libc::SIGRTMIN(), &raw const action, ptr::null_mut()))
    }
}

/// Lets the calling thread receive the kick signal, whatever mask it has inherited.
pub(crate) fn unblock_in_this_thread() -> io::Result<()> {
    let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
    // SAFETY: `set` lives through the calls, which initialise and then read it.
    let result = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGRTMIN());
        libc::pthread_sigmask(libc::SIG_UNBLOCK, set.as_ptr(), ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result)) }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A thread that can be signalled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Thread(libc::pthread_t);

impl Thread {
    /// The calling thread.
    pub(crate) fn current() -> Self {
        // SAFETY: takes nothing and cannot fail.
        Self(unsafe { libc::pthread_self() })
    }

    /// Sends the kick signal.
    ///
    /// # Safety
    ///
    /// The thread must not have ended.
    pub(crate) unsafe fn kick(self) {
        // SAFETY: the caller's promise. It can fail only for a thread or a signal that does not exist.
        unsafe { libc::pthread_kill(self.0, libc::SIGRTMIN()) };
    }
}

/// The page that KVM and this process share about a vCPU (`struct kvm_run`), mapped a second time:
/// the first mapping belongs to [`VcpuFd`], which hands out exclusive references into it.
#[derive(Debug)]
pub(crate) struct RunPage(NonNull<kvm_run>);

// SAFETY: a mapping may be used from any thread; every access below is atomic or volatile.
unsafe impl Send for RunPage {}
// SAFETY: as above.
unsafe impl Sync for RunPage {}

impl RunPage {
    const LEN: usize = size_of::<kvm_run>();

    /// Maps a vCPU's shared page.
    pub(crate) fn map(vcpu: &VcpuFd) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start =
            unsafe { libc::mmap(ptr::null_mut(), Self::LEN, protection, libc::MAP_SHARED, vcpu.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(start.cast()).map(Self).ok_or_else(|| io::ErrorKind::AddrNotAvailable.into())
    }

    /// Makes KVM_RUN finish pending I/O and return without entering the guest, until it is unset.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        // SAFETY: the field lies inside the mapping; KVM only reads it, and this process writes it
        // through this mapping alone.
        let flag = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        flag.store(u8::from(on), Ordering::SeqCst);
    }

    /// Bytes per element of the port I/O that KVM_RUN returned with.
    pub(crate) fn io_size(&self) -> usize {
        // SAFETY: the field lies inside the mapping, and any byte is a valid value.
        usize::from(unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.io.size).read_volatile() })
    }

    /// The kind of internal error that KVM_RUN returned with.
    pub(crate) fn internal_suberror(&self) -> u32 {
        // SAFETY: as in `io_size`.
        unsafe { (&raw const (*self.0.as_ptr()).__bindgen_anon_1.internal.suberror).read_volatile() }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, to which nobody else has a pointer.
        unsafe { libc::munmap(self.0.as_ptr().cast(), Self::LEN) };
    }
}
