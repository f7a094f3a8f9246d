//! What this host's KVM can do, asked once.

use std::ffi::CString;
use std::io;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SREGS2, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::cpuid;
use crate::error::{KvmError, call};

/// Where Linux puts KVM.
const DEVICE: &str = "/dev/kvm";

/// Capabilities that this crate cannot work without, and the first kernel with them on x86-64.
const NEEDED: [(Cap, &str, &str); 13] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "2.6.25"),
    (Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS", "2.6.30"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "2.6.25"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "2.6.25"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR", "2.6.32"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2", "2.6.32"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "2.6.25"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "2.6.25"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "2.6.33"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "2.6.33"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "2.6.35"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "2.6.36"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "4.11"),
];

/// Abilities that change how this crate works, where the host has them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
#[allow(clippy::struct_excessive_bools)] // each says yes or no to a capability of its own
pub struct Features {
    /// Bits of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: 1 for manual protection, 2 for all bits set at first.
    pub manual_dirty_log: u32,
    /// The guest's TSC can be scaled to another frequency.
    pub tsc_scaling: bool,
    /// The local APIC has a TSC-deadline timer.
    pub tsc_deadline: bool,
    /// The guest can be told that it stood still, so that its watchdogs keep quiet.
    pub clock_control: bool,
    /// The CPU has XSAVE, and with it extended control registers.
    pub xcrs: bool,
    /// Page-directory pointers of PAE guests are part of the state.
    pub sregs2: bool,
    /// Most vCPUs of a machine.
    pub max_vcpus: u32,
}

/// An open `/dev/kvm`.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    features: Features,
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<u32>,
}

impl Host {
    /// Opens `/dev/kvm` and checks that everything this crate needs is there.
    pub fn open() -> Result<Self, KvmError> {
        Self::open_at(DEVICE)
    }

    /// Opens a KVM device under another name.
    pub fn open_at(path: &str) -> Result<Self, KvmError> {
        let name = CString::new(path).map_err(|error| open_error(path, error.into()))?;
        let kvm = Kvm::new_with_path(&name).map_err(|errno| open_error(path, errno.into()))?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION as i32 {
            return Err(KvmError::ApiVersion { path: path.to_owned(), version });
        }
        if let Some((_, capability, since)) = NEEDED.into_iter().find(|(cap, ..)| !kvm.check_extension(*cap)) {
            return Err(KvmError::MissingCapability { capability, since });
        }
        let features = Features::of(&kvm);
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(call("asking for the CPU features a guest can have"))?;
        let msrs = kvm.get_msr_index_list().map_err(call("asking for the list of MSRs"))?;
        let mut cpuid = cpuid.as_slice().to_vec();
        cpuid::complete(&mut cpuid, features);
        Ok(Self { features, cpuid, msrs: msrs.as_slice().to_vec(), kvm })
    }

    /// What this host can do beyond the necessary.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The CPUID entries that this host can give a guest.
    pub fn supported_cpuid(&self) -> &[kvm_cpuid_entry2] {
        &self.cpuid
    }

    /// Indices of the MSRs that a guest's state may consist of.
    pub(crate) fn msr_indices(&self) -> &[u32] {
        &self.msrs
    }

    pub(crate) fn create_vm(&self) -> Result<VmFd, KvmError> {
        loop {
            match self.kvm.create_vm() {
                // A signal that came meanwhile.
                Err(error) if error.errno() == libc::EINTR => {}
                made => return made.map_err(call("creating a virtual machine")),
            }
        }
    }
}

impl Features {
    fn of(kvm: &Kvm) -> Self {
        let manual = kvm.check_extension_raw(u64::from(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2));
        Self {
            manual_dirty_log: u32::try_from(manual).unwrap_or(0),
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            clock_control: kvm.check_extension(Cap::KvmclockCtrl),
            xcrs: kvm.check_extension(Cap::Xcrs),
            sregs2: kvm.check_extension_raw(u64::from(KVM_CAP_SREGS2)) > 0,
            max_vcpus: kvm.get_max_vcpus() as u32,
        }
    }
}

fn open_error(path: &str, source: io::Error) -> KvmError {
    let path = path.to_owned();
    match source.raw_os_error() {
        // ENXIO and ENODEV: the node exists, the module behind it does not.
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => KvmError::NoDevice { path },
        Some(libc::EACCES | libc::EPERM) => KvmError::NoPermission { path },
        _ => KvmError::Open { path, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_of_not_having_kvm_names_its_own_remedy() {
        let missing = Host::open_at("/dev/no-such-kvm").unwrap_err();
        assert!(matches!(missing, KvmError::NoDevice { .. }), "{missing}");
        assert!(missing.to_string().contains("modprobe") && missing.to_string().contains("/dev/no-such-kvm"));
        let denied = open_error(DEVICE, io::Error::from_raw_os_error(libc::EACCES));
        assert!(denied.to_string().contains("group `kvm`"), "{denied}");
        let busy = open_error(DEVICE, io::Error::from_raw_os_error(libc::EBUSY));
        assert!(busy.to_string().contains("another hypervisor"), "{busy}");
        let other_device = Host::open_at("/dev/null").unwrap_err();
        assert!(matches!(other_device, KvmError::ApiVersion { .. }), "{other_device}");
    }

    extern "C" fn ignore(_signal: libc::c_int) {}

    #[test]
    #[allow(unsafe_code)]
    fn signals_do_not_keep_a_machine_from_being_made() {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                drop(io::Write::write_fmt(&mut io::stderr(), format_args!("skipped: {error}\n")));
                return;
            }
        };
        // SAFETY: the action is zeroed but for its handler, which does nothing; no other test uses the signal.
        let maker = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as libc::sighandler_t;
            assert_eq!(libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()), 0);
            libc::pthread_self()
        };
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Pauses of many lengths, so that a slow machine gets on between two of them.
                for pause in (0..64).cycle().take_while(|_| !done.load(std::sync::atomic::Ordering::Relaxed)) {
                    // SAFETY: the thread that makes machines waits for this one.
                    unsafe { libc::pthread_kill(maker, libc::SIGUSR2) };
                    std::thread::sleep(std::time::Duration::from_micros(50 * pause));
                }
            });
            let failed = (0..500).find_map(|_| host.create_vm().err());
            done.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(failed.is_none(), "{failed:?}");
        });
    }
}
