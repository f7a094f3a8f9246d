//! A vCPU's state: what it consists of, and the order in which KVM must be asked and told.

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::msrs::{self, MsrList};
use crate::error::{KvmError, call};
use crate::host::Features;
use crate::ioctl::{self, XsaveSize};
use crate::packed::{AtMost, Blob, Exact};

/// MSRs in a state. KVM lists about 150 today; machine-check banks add four each.
pub(crate) const MAX_MSRS: usize = 1024;

/// What this host knows about reading and writing the state of its vCPUs.
#[derive(Clone, Debug)]
pub(crate) struct Knowledge {
    pub(crate) msrs: MsrList,
    pub(crate) xsave: XsaveSize,
    pub(crate) features: Features,
}

/// Everything that a vCPU holds, except its CPUID and TSC frequency: those are the machine's.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    mp_state: Exact<kvm_mp_state>,
    regs: Exact<kvm_regs>,
    sregs: Exact<kvm_sregs>,
    /// Page-directory pointers, where the guest uses PAE paging without long mode.
    pdptrs: Option<[u64; 4]>,
    xsave: Blob,
    /// Extended control registers, where the CPU has XSAVE.
    xcrs: Option<Exact<kvm_xcrs>>,
    debug: Exact<kvm_debugregs>,
    lapic: Exact<kvm_lapic_state>,
    msrs: AtMost<Exact<kvm_msr_entry>, MAX_MSRS>,
    events: Exact<kvm_vcpu_events>,
}

impl VcpuState {
    /// Reads the state of a vCPU that does not run.
    ///
    /// The multiprocessing state comes first: asking for it makes KVM act on start-up messages that
    /// wait at the local APIC, which changes registers. Pending events come last, when nothing that
    /// is read can change them any more.
    pub(crate) fn save(vcpu: &VcpuFd, index: u32, knowledge: &Knowledge) -> Result<Self, KvmError> {
        let what = |part: &str| format!("reading {part} of vCPU {index}");
        Ok(Self {
            mp_state: Exact(vcpu.get_mp_state().map_err(call(what("the run state")))?),
            regs: Exact(vcpu.get_regs().map_err(call(what("the general registers")))?),
            sregs: Exact(vcpu.get_sregs().map_err(call(what("the special registers")))?),
            pdptrs: pdptrs(vcpu, knowledge).map_err(call(what("the page-directory pointers")))?,
            xsave: xsave(vcpu, knowledge.xsave).map_err(call(what("the XSAVE area")))?,
            xcrs: xcrs(vcpu, knowledge).map_err(call(what("the extended control registers")))?,
            debug: Exact(vcpu.get_debug_regs().map_err(call(what("the debug registers")))?),
            lapic: Exact(vcpu.get_lapic().map_err(call(what("the local APIC")))?),
            msrs: AtMost(knowledge.msrs.read(vcpu, index)?.into_iter().map(Exact).collect()),
            events: Exact(vcpu.get_vcpu_events().map_err(call(what("the pending events")))?),
        })
    }

    /// Writes the state into a vCPU that has its CPUID and TSC frequency and has never run.
    ///
    /// Order, and why:
    /// 1. special registers: they switch the local APIC on and choose its mode, and KVM looks at
    ///    what the other registers were when it takes them;
    /// 2. general registers, extended control registers, XSAVE area, debug registers: they depend on nothing else;
    /// 3. local APIC, before the MSRs: a TSC deadline counts only while its timer is in that mode;
    /// 4. MSRs, with the TSC before the deadline, which is the last;
    /// 5. the run state after the special registers, which can set it;
    /// 6. pending events at the end: several of the calls above drop or deliver them.
    pub(crate) fn load(&self, vcpu: &VcpuFd, index: u32, knowledge: &Knowledge) -> Result<(), KvmError> {
        let what = |part: &str| format!("writing {part} of vCPU {index}");
        vcpu.set_sregs(&self.sregs.0).map_err(call(what("the special registers")))?;
        self.set_pdptrs(vcpu, knowledge).map_err(call(what("the page-directory pointers")))?;
        vcpu.set_regs(&self.regs.0).map_err(call(what("the general registers")))?;
        self.set_xcrs(vcpu, index, knowledge)?;
        self.set_xsave(vcpu, index, knowledge.xsave)?;
        vcpu.set_debug_regs(&self.debug.0).map_err(call(what("the debug registers")))?;
        vcpu.set_lapic(&self.lapic.0).map_err(call(what("the local APIC")))?;
        let values: Vec<_> = self.msrs.0.iter().map(|Exact(entry)| *entry).collect();
        msrs::write(vcpu, index, &values)?;
        vcpu.set_mp_state(self.mp_state.0).map_err(call(what("the run state")))?;
        vcpu.set_vcpu_events(&self.events.0).map_err(call(what("the pending events")))
    }

    fn set_pdptrs(&self, vcpu: &VcpuFd, knowledge: &Knowledge) -> std::io::Result<()> {
        let (Some(pdptrs), true) = (self.pdptrs, knowledge.features.sregs2) else {
            // KVM has read them from guest memory, which has the same content in all but strange guests.
            return Ok(());
        };
        let mut registers = ioctl::sregs2(vcpu)?;
        registers.flags |= u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID);
        registers.pdptrs = pdptrs;
        ioctl::set_sregs2(vcpu, &registers)
    }

    fn set_xcrs(&self, vcpu: &VcpuFd, index: u32, knowledge: &Knowledge) -> Result<(), KvmError> {
        /// XCR0 after a reset: x87 only.
        const INITIAL: u64 = 1;
        match &self.xcrs {
            Some(Exact(xcrs)) if knowledge.features.xcrs => {
                vcpu.set_xcrs(xcrs).map_err(call(format!("writing the extended control registers of vCPU {index}")))
            }
            Some(Exact(xcrs)) if xcrs.xcrs[0].value != INITIAL => {
                let value = xcrs.xcrs[0].value;
                Err(KvmError::State(format!(
                    "vCPU {index} uses XSAVE (XCR0 = {value:#x}), which this CPU does not have"
                )))
            }
            _ => Ok(()),
        }
    }

    fn set_xsave(&self, vcpu: &VcpuFd, index: u32, size: XsaveSize) -> Result<(), KvmError> {
        let bytes = &self.xsave.0;
        if bytes.len() > size.bytes() && bytes[size.bytes()..].iter().any(|&byte| byte != 0) {
            let (theirs, ours) = (bytes.len(), size.bytes());
            let refusal = format!("the XSAVE area of vCPU {index} has {theirs} bytes, this host's has {ours}");
            return Err(KvmError::State(refusal));
        }
        let mut area = vec![0; size.words()];
        for (word, bytes) in area.iter_mut().zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            *word = u64::from_ne_bytes(padded);
        }
        ioctl::set_xsave(vcpu, &area, size).map_err(call(format!("writing the XSAVE area of vCPU {index}")))
    }
}

fn pdptrs(vcpu: &VcpuFd, knowledge: &Knowledge) -> std::io::Result<Option<[u64; 4]>> {
    if !knowledge.features.sregs2 {
        return Ok(None);
    }
    let registers = ioctl::sregs2(vcpu)?;
    let valid = registers.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    Ok(valid.then_some(registers.pdptrs))
}

fn xcrs(vcpu: &VcpuFd, knowledge: &Knowledge) -> Result<Option<Exact<kvm_xcrs>>, kvm_ioctls::Error> {
    if knowledge.features.xcrs { Ok(Some(Exact(vcpu.get_xcrs()?))) } else { Ok(None) }
}

fn xsave(vcpu: &VcpuFd, size: XsaveSize) -> std::io::Result<Blob> {
    let mut area = vec![0; size.words()];
    ioctl::xsave(vcpu, &mut area, size)?;
    Ok(Blob(area.into_iter().flat_map(u64::to_ne_bytes).collect()))
}
