//! A virtual machine: memory slots, interrupt controllers, vCPUs, and what a migration asks of them.

use std::ops::Deref;
use std::sync::{Arc, MutexGuard};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use pageferry::memory::GuestMemory;

use crate::config::MachineConfig;
use crate::cpuid;
use crate::crew::{Crew, Threads};
use crate::dirty_log::{DirtyLog, DirtyLogMode};
use crate::error::{KvmError, call};
use crate::exit::{Ending, ExitHandler};
use crate::host::Host;
use crate::host_writes::HostWrites;
use crate::ioctl::XsaveSize;
use crate::state::{self, Knowledge, MsrList};
use crate::throttle::{MAX_PERCENT, Throttle};
use crate::vcpu::Vcpu;
use crate::vm::Vm;

/// Where KVM on old Intel CPUs keeps a page table for real mode: below the BIOS at the end of 4 GiB,
/// where no guest has memory.
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// Three pages after it, for the same reason.
const TSS: usize = 0xfffb_d000;

/// A virtual machine under KVM.
#[derive(Debug)]
pub struct Machine {
    // In this order: threads and throttle end before what they use.
    threads: Option<Threads>,
    throttle: Throttle,
    crew: Arc<Crew>,
    vm: Arc<Vm>,
    config: MachineConfig,
    knowledge: Knowledge,
    host_writes: Arc<HostWrites>,
    manual_dirty_log: u32,
}

impl Machine {
    /// Makes a machine over guest memory, refusing a configuration that this host cannot give
    /// ([`KvmError::Cpu`] names what is missing). The vCPUs are as after a reset: all but the first
    /// wait for the guest to start them.
    pub fn new(host: &Host, config: MachineConfig, memory: Arc<dyn GuestMemory>) -> Result<Self, KvmError> {
        config.check(host)?;
        let fd = host.create_vm()?;
        add_controllers(&fd)?;
        let host_writes = Arc::new(HostWrites::new(memory.layout()));
        let vm = Arc::new(Vm::new(fd, memory)?);
        let (fds, mut config) = make_vcpus(&vm.fd, host, config)?;
        let features = host.features();
        let msrs = MsrList::probe(&fds[0], host.msr_indices())?;
        msrs.require(&config.msrs)?;
        config.msrs = msrs.preset().to_vec();
        let knowledge =
            Knowledge { msrs, xsave: XsaveSize::from_capability(vm.fd.check_extension_int(Cap::Xsave2)), features };
        let vcpus = fds.into_iter().zip(0..).map(|(fd, index)| Vcpu::new(index, fd)).collect::<Result<_, _>>()?;
        let crew = Arc::new(Crew::new(vcpus, Arc::clone(&vm)));
        let throttle = Throttle::new(Arc::clone(&crew));
        let manual_dirty_log = features.manual_dirty_log;
        Ok(Self { threads: None, throttle, crew, vm, config, knowledge, host_writes, manual_dirty_log })
    }

    /// What it was made of, with everything that was left to the host filled in.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// The guest's memory.
    pub fn memory(&self) -> &Arc<dyn GuestMemory> {
        &self.vm.memory
    }

    /// The VM's descriptor, for irqfds, ioeventfds and the like.
    pub fn vm_fd(&self) -> &VmFd {
        &self.vm.fd
    }

    /// Where the VMM reports its own writes to guest memory.
    pub fn host_writes(&self) -> Arc<HostWrites> {
        Arc::clone(&self.host_writes)
    }

    /// A tracker of writes to guest memory for a migration. One can be started at a time.
    pub fn dirty_log(&self, mode: DirtyLogMode) -> DirtyLog {
        DirtyLog::new(Arc::clone(&self.vm), self.host_writes(), mode, self.manual_dirty_log)
    }

    /// An interrupt line (a GSI; 0 to 23 are the pins of PIC and IOAPIC).
    pub fn irq_line(&self, gsi: u32) -> IrqLine {
        IrqLine { vm: Arc::clone(&self.vm), gsi }
    }

    /// A vCPU's registers; an error while it runs, and while somebody else holds them.
    pub fn vcpu(&self, index: u32) -> Result<PausedVcpu<'_>, KvmError> {
        let vcpu = self.crew.vcpus.get(index as usize);
        let vcpu = vcpu.ok_or_else(|| KvmError::Config(format!("there is no vCPU {index}")))?;
        vcpu.paused().map(PausedVcpu)
    }

    /// Starts the vCPU threads, parked: [`resume`](Self::resume) lets them run. Call it once; a destination can do it
    /// before the state comes, so that it costs no downtime.
    pub fn start(&mut self, handler: Arc<dyn ExitHandler>) -> Result<(), KvmError> {
        if self.threads.is_some() {
            return Err(KvmError::Order { is: "started already", remedy: "call start once, then resume" });
        }
        self.threads = Some(Threads::start(&self.crew, handler).map_err(call("starting the vCPU threads"))?);
        Ok(())
    }

    /// Runs the vCPUs. A guest with KVM's clock is told that it stood still, so that its watchdogs do not bark.
    pub fn resume(&self) -> Result<(), KvmError> {
        if self.threads.is_none() {
            return Err(KvmError::Order { is: "not started", remedy: "call start with an exit handler first" });
        }
        if self.knowledge.features.clock_control && !self.is_running() {
            self.crew.vcpus.iter().try_for_each(tell_of_pause)?;
        }
        self.crew.resume()
    }

    /// Stops the vCPUs. On return none runs and none has an unfinished I/O instruction, so their
    /// state is whole. An error if the guest has ended: there is nothing to migrate then.
    pub fn pause(&self) -> Result<(), KvmError> {
        self.crew.pause()
    }

    /// Whether the vCPUs were resumed, not paused since, and the guest has not ended.
    pub fn is_running(&self) -> bool {
        self.crew.is_running()
    }

    /// How the guest ended, if it did.
    pub fn ended(&self) -> Option<Ending> {
        self.crew.ended()
    }

    /// Takes about `percent` (0 to 99) of the vCPUs' time away, in slices of some milliseconds; 0 ends it. It does not
    /// delay a pause, and lasts beyond one.
    pub fn throttle(&self, percent: u8) -> Result<(), KvmError> {
        if percent > MAX_PERCENT {
            let refusal = format!("a throttle of {percent} % would stop the guest: {MAX_PERCENT} % is the most");
            return Err(KvmError::Config(refusal));
        }
        self.throttle.set(percent).map_err(call("starting the throttle"))
    }

    /// The state of all vCPUs and of what they share; the vCPUs must be paused.
    pub fn save(&self) -> Result<Vec<u8>, KvmError> {
        state::save(&self.vm, &self.crew.vcpus, &self.knowledge)
    }

    /// Takes over a state that [`save`](Self::save) wrote on a machine of the same configuration, before this one has
    /// ever run. The bytes come from the peer and are checked; after an error the machine must not run.
    pub fn load(&self, state: &[u8]) -> Result<(), KvmError> {
        state::load(&self.vm, &self.crew.vcpus, &self.knowledge, state)
    }
}

/// Refused with `EINVAL` when the guest does not use KVM's clock: then its watchdogs do not ask for it either.
fn tell_of_pause(vcpu: &Vcpu) -> Result<(), KvmError> {
    match vcpu.paused()?.kvmclock_ctrl() {
        Err(error) if error.errno() != libc::EINVAL => {
            Err(call(format!("telling vCPU {} that it was paused", vcpu.index))(error))
        }
        _ => Ok(()),
    }
}

fn add_controllers(vm: &VmFd) -> Result<(), KvmError> {
    vm.set_identity_map_address(IDENTITY_MAP).map_err(call("placing the identity map"))?;
    vm.set_tss_address(TSS).map_err(call("placing the TSS"))?;
    vm.create_irq_chip().map_err(call("creating the interrupt controllers"))?;
    let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(pit).map_err(call("creating the timer chip"))
}

/// Makes the vCPUs, gives them their CPU, and checks that it is the one the source had.
fn make_vcpus(vm: &VmFd, host: &Host, mut config: MachineConfig) -> Result<(Vec<VcpuFd>, MachineConfig), KvmError> {
    let mut vcpus = Vec::with_capacity(config.vcpus as usize);
    for index in 0..config.vcpus {
        let vcpu = vm.create_vcpu(u64::from(index)).map_err(call(format!("creating vCPU {index}")))?;
        let cpuid: CpuId = cpuid::for_vcpu(&config.cpuid, index)?;
        vcpu.set_cpuid2(&cpuid).map_err(call(format!("setting the CPUID of vCPU {index}")))?;
        config.tsc_khz = Some(tune(&vcpu, host, config.tsc_khz)?);
        vcpus.push(vcpu);
    }
    let in_force = vcpus[0].get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("reading the CPUID of vCPU 0 back"))?;
    cpuid::require(&config.cpuid_in_force, in_force.as_slice())?;
    config.cpuid_in_force = in_force.as_slice().to_vec();
    Ok((vcpus, config))
}

/// Sets a vCPU's TSC frequency where it must be another than the host's, and returns it.
fn tune(vcpu: &VcpuFd, host: &Host, wanted: Option<u32>) -> Result<u32, KvmError> {
    /// What KVM itself takes for the same frequency (its `tsc_tolerance_ppm`).
    const TOLERANCE_PPM: u64 = 250;
    let own = vcpu.get_tsc_khz().map_err(call("asking for the TSC's frequency"))?;
    let Some(wanted) = wanted.filter(|&wanted| wanted != own) else {
        return Ok(own);
    };
    let difference = u64::from(wanted.abs_diff(own)) * 1_000_000;
    if difference > u64::from(own) * TOLERANCE_PPM && !host.features().tsc_scaling {
        let missing = format!("a TSC of {wanted} kHz (this host's runs at {own} kHz and cannot be scaled)");
        return Err(KvmError::Cpu(vec![missing]));
    }
    vcpu.set_tsc_khz(wanted).map_err(call(format!("setting the TSC's frequency to {wanted} kHz")))?;
    Ok(wanted)
}

/// A vCPU that does not run now: its registers can be read and written. It cannot run before this is dropped.
#[derive(Debug)]
pub struct PausedVcpu<'a>(MutexGuard<'a, VcpuFd>);

impl Deref for PausedVcpu<'_> {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.0
    }
}

/// An interrupt line of the machine's controllers. Clones drive the same line.
#[derive(Clone, Debug)]
pub struct IrqLine {
    vm: Arc<Vm>,
    gsi: u32,
}

impl IrqLine {
    /// Raises or lowers the line.
    pub fn set(&self, active: bool) -> Result<(), KvmError> {
        self.vm.fd.set_irq_line(self.gsi, active).map_err(call(format!("driving interrupt line {}", self.gsi)))
    }

    /// Raises and lowers the line: an edge.
    pub fn pulse(&self) -> Result<(), KvmError> {
        self.set(true)?;
        self.set(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::memory::{Backing, Layout, MappedMemory, Region};

    fn memory() -> Arc<MappedMemory> {
        let layout = Layout::new(vec![Region::ram("ram", 0, 1 << 20)]).unwrap();
        Arc::new(MappedMemory::new(layout, Backing::Memfd).unwrap())
    }

    #[test]
    fn registers_that_somebody_holds_are_an_error_and_no_deadlock() {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                return drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
            }
        };
        let machine = Machine::new(&host, MachineConfig::new(&host, 1), memory()).unwrap();
        let held = machine.vcpu(0).unwrap();
        assert!(matches!(machine.vcpu(0), Err(KvmError::Held { index: 0 })));
        drop(held);
        assert!(machine.vcpu(0).is_ok());
    }

    #[test]
    fn an_impossible_number_of_vcpus_is_refused_and_no_panic() {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                return drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
            }
        };
        let refusal = Machine::new(&host, MachineConfig::new(&host, u32::MAX), memory()).unwrap_err();
        assert!(refusal.to_string().contains("vCPUs are not possible"), "{refusal}");
    }

    #[test]
    fn an_msr_that_this_host_does_not_have_is_named_before_any_page_comes() {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                return drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
            }
        };
        let source = Machine::new(&host, MachineConfig::new(&host, 1), memory()).unwrap();
        let mut config = MachineConfig::from_bytes(&source.config().to_bytes()).unwrap();
        assert!(!config.msrs.is_empty());
        Machine::new(&host, config.clone(), memory()).unwrap();
        config.msrs.push(0xdead_beef);
        let refusal = Machine::new(&host, config, memory()).unwrap_err();
        assert!(refusal.to_string().contains("MSR 0xdeadbeef"), "{refusal}");
    }

    #[test]
    fn bits_that_the_sources_kvm_added_count_as_well() {
        let host = match Host::open() {
            Ok(host) => host,
            Err(error) => {
                return drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
            }
        };
        let memory = memory();
        let source = Machine::new(&host, MachineConfig::new(&host, 1), memory.clone()).unwrap();
        let mut config = MachineConfig::from_bytes(&source.config().to_bytes()).unwrap();
        Machine::new(&host, config.clone(), memory.clone()).unwrap();
        let features = config.cpuid_in_force.iter_mut().find(|entry| entry.function == 0x8000_0001).unwrap();
        features.ecx |= 1 << 16;
        let refusal = Machine::new(&host, config, memory).unwrap_err();
        assert!(refusal.to_string().contains("FMA4"), "{refusal}");
    }
}
