//! Machine state: a guest goes on elsewhere as if nothing had happened, and bad state is refused.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pageferry::memory::{GuestMemory, MappedMemory, RegionId};
use pageferry_kvm::kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, Msrs, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_msr_entry, kvm_xcrs,
};
use pageferry_kvm::{Host, KvmError, Machine, MachineConfig};

use crate::fixture::*;

/// A machine as the destination makes it: from the bytes of the source's configuration.
fn destination(host: &Host, source: &Machine) -> (Machine, Arc<MappedMemory>) {
    let config = MachineConfig::from_bytes(&source.config().to_bytes()).unwrap();
    let memory = memory(pageferry::memory::Backing::Anonymous);
    (Machine::new(host, config, memory.clone()).unwrap(), memory)
}

fn copy_memory(from: &MappedMemory, to: &MappedMemory) {
    for (region, len) in [(RegionId(0), LOW_LEN), (RegionId(2), HIGH_LEN)] {
        let mut bytes = vec![0; len as usize];
        from.read(region, 0, &mut bytes).unwrap();
        to.write(region, 0, &bytes).unwrap();
    }
}

#[test]
fn several_vcpus_go_on_counting_in_another_machine() {
    let Some(host) = host() else { return };
    let (mut source, source_memory) = loaded(&host, 3, SPIN);
    let counters = |memory: &MappedMemory| [0, 1, 2].map(|index| read_u64(memory, COUNTERS + index * 4096));
    source.start(Arc::new(Device::default())).unwrap();
    source.resume().unwrap();
    until("all vCPUs count", || counters(&source_memory).iter().all(|&count| count > 0));
    source.pause().unwrap();
    let state = source.save().unwrap();
    let (mut there, memory) = destination(&host, &source);
    there.start(Arc::new(Device::default())).unwrap();
    copy_memory(&source_memory, &memory);
    there.load(&state).unwrap();
    let arrived = counters(&memory);
    assert_eq!(arrived, counters(&source_memory));
    there.resume().unwrap();
    until("all vCPUs go on", || counters(&memory).iter().zip(arrived).all(|(now, before)| *now > before));
    assert_eq!(counters(&source_memory), arrived, "the source stays paused");
}

#[test]
fn no_step_is_lost_or_done_twice_over_many_moves() {
    let Some(host) = host() else { return };
    let (mut machine, mut memory) = loaded(&host, 1, ADD_INPUT);
    let device = Arc::new(Device::default());
    machine.start(device.clone()).unwrap();
    for _ in 0..20 {
        let before = device.ins.load(Ordering::SeqCst);
        machine.resume().unwrap();
        until("the guest reads", || device.ins.load(Ordering::SeqCst) > before + 3);
        machine.pause().unwrap();
        let (mut next, next_memory) = destination(&host, &machine);
        next.start(device.clone()).unwrap();
        copy_memory(&memory, &next_memory);
        next.load(&machine.save().unwrap()).unwrap();
        (machine, memory) = (next, next_memory);
    }
    let answered = device.ins.load(Ordering::SeqCst);
    let (sum, all) = (read_u64(&*memory, COUNTERS), answered * (answered + 1) / 2);
    assert!(sum == all || sum == all - answered, "{sum} of {all}: the last answer may still be in its register");
}

/// Values that no fresh machine has, in every part of a state.
struct Marks {
    xsave: Vec<u32>,
    lapic: kvm_lapic_state,
    debug: kvm_debugregs,
    xcrs: Option<kvm_xcrs>,
    redirection: u64,
    kernel_gs: u64,
}

const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// A time of the guest's clock, in nanoseconds: more than an hour, which no fresh machine has been there for.
const CLOCK: u64 = 1 << 42;

impl Marks {
    fn set(machine: &Machine, host: &Host) {
        let vcpu = machine.vcpu(1).unwrap();
        let mut xsave = vcpu.get_xsave().unwrap();
        xsave.region[40] = 0x1234_5678; // XMM0
        xsave.region[128] |= 0b11; // XSTATE_BV: x87 and SSE are not in their initial state
        #[allow(unsafe_code)]
        // SAFETY: no dynamically enabled features, so the classic structure is as large as KVM's.
        unsafe { vcpu.set_xsave(&xsave) }.unwrap();
        let mut lapic = vcpu.get_lapic().unwrap();
        lapic.regs[0x80] = 0x20; // task priority
        lapic.regs[0xf1] = 1; // software enable
        vcpu.set_lapic(&lapic).unwrap();
        let mut debug = vcpu.get_debug_regs().unwrap();
        debug.db[1] = 0xdead_0000;
        vcpu.set_debug_regs(&debug).unwrap();
        if host.features().xcrs {
            let mut xcrs = vcpu.get_xcrs().unwrap();
            xcrs.xcrs[0].value = 3;
            vcpu.set_xcrs(&xcrs).unwrap();
        }
        let entry = kvm_msr_entry { index: KERNEL_GS_BASE, data: 0x7777_0000, ..Default::default() };
        assert_eq!(vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()), Ok(1));
        let mut ioapic = Self::ioapic(machine);
        // SAFETY: the structure was filled by KVM for this chip.
        #[allow(unsafe_code)]
        unsafe {
            ioapic.chip.ioapic.redirtbl[5].bits = 0x1_0041;
        }
        machine.vm_fd().set_irqchip(&ioapic).unwrap();
        machine.vm_fd().set_clock(&kvm_clock_data { clock: CLOCK, ..Default::default() }).unwrap();
    }

    fn of(machine: &Machine) -> Self {
        let vcpu = machine.vcpu(1).unwrap();
        let mut msrs = Msrs::from_entries(&[kvm_msr_entry { index: KERNEL_GS_BASE, ..Default::default() }]).unwrap();
        assert_eq!(vcpu.get_msrs(&mut msrs), Ok(1));
        // SAFETY: the structure was filled by KVM for this chip.
        #[allow(unsafe_code)]
        let redirection = unsafe { Self::ioapic(machine).chip.ioapic.redirtbl[5].bits };
        Self {
            xsave: vcpu.get_xsave().unwrap().region.to_vec(),
            lapic: vcpu.get_lapic().unwrap(),
            debug: vcpu.get_debug_regs().unwrap(),
            xcrs: vcpu.get_xcrs().ok(),
            redirection,
            kernel_gs: msrs.as_slice()[0].data,
        }
    }

    fn ioapic(machine: &Machine) -> kvm_irqchip {
        let mut chip = kvm_irqchip { chip_id: KVM_IRQCHIP_IOAPIC, ..Default::default() };
        machine.vm_fd().get_irqchip(&mut chip).unwrap();
        chip
    }
}

#[test]
fn every_part_of_the_state_arrives() {
    let Some(host) = host() else { return };
    let (source, _memory) = loaded(&host, 2, SPIN);
    Marks::set(&source, &host);
    let (there, _there_memory) = destination(&host, &source);
    there.load(&source.save().unwrap()).unwrap();
    let (sent, arrived) = (Marks::of(&source), Marks::of(&there));
    assert_eq!((sent.redirection, sent.kernel_gs), (0x1_0041, 0x7777_0000), "the marks were set");
    assert_eq!((arrived.redirection, arrived.kernel_gs), (sent.redirection, sent.kernel_gs));
    assert_eq!(arrived.xsave, sent.xsave);
    assert_eq!(sent.xsave[40], 0x1234_5678);
    assert_eq!(arrived.lapic.regs[..], sent.lapic.regs[..]);
    assert_eq!((arrived.debug, arrived.xcrs), (sent.debug, sent.xcrs));
    for index in 0..2 {
        let (ours, theirs) = (source.vcpu(index).unwrap(), there.vcpu(index).unwrap());
        assert_eq!(theirs.get_regs().unwrap(), ours.get_regs().unwrap());
        assert_eq!(theirs.get_sregs().unwrap(), ours.get_sregs().unwrap());
        assert_eq!(theirs.get_mp_state().unwrap(), ours.get_mp_state().unwrap());
    }
    assert!((CLOCK..2 * CLOCK).contains(&there.vm_fd().get_clock().unwrap().clock));
}

#[test]
fn loading_leaves_guest_memory_alone() {
    let Some(host) = host() else { return };
    let (source, _memory) = loaded(&host, 2, SPIN);
    let (there, memory) = destination(&host, &source);
    there.load(&source.save().unwrap()).unwrap();
    let mut low = vec![0; LOW_LEN as usize];
    memory.read(RegionId(0), 0, &mut low).unwrap();
    assert_eq!(low.iter().position(|&byte| byte != 0), None);
}

#[test]
fn a_running_machine_and_another_number_of_vcpus_are_refused() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 2, SPIN);
    let (three, _memory) = bare(&host, 3);
    let error = three.load(&machine.save().unwrap()).unwrap_err();
    assert!(error.to_string().contains("of 2 vCPUs, this machine has 3"), "{error}");
    machine.start(Arc::new(Device::default())).unwrap();
    machine.resume().unwrap();
    until("the guest gets on", || read_u64(&*memory, COUNTERS) > 0);
    assert!(matches!(machine.save(), Err(KvmError::Running { .. })));
}

#[test]
fn damaged_state_is_an_error_or_harmless_but_never_a_panic() {
    let Some(host) = host() else { return };
    let (source, _memory) = loaded(&host, 1, SPIN);
    let (there, _there_memory) = destination(&host, &source);
    let state = source.save().unwrap();
    for len in 0..state.len() {
        assert!(there.load(&state[..len]).is_err(), "cut to {len} of {} bytes", state.len());
    }
    let mut random = 7u64;
    for _ in 0..2000 {
        let mut damaged = state.clone();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let at = (random >> 33) as usize % damaged.len();
        damaged[at] ^= 1 << (random >> 20 & 7);
        let _ = there.load(&damaged);
    }
    assert!(there.load(&vec![0xff; 100_000]).is_err());
    there.load(&state).unwrap();
}

#[test]
fn a_cpu_feature_that_the_host_lacks_is_refused_by_its_name() {
    let Some(host) = host() else { return };
    let mut config = MachineConfig::new(&host, 1);
    let leaf = config.cpuid.iter_mut().find(|entry| entry.function == 0x8000_0001).unwrap();
    leaf.ecx |= 1 << 11;
    let config = MachineConfig::from_bytes(&config.to_bytes()).unwrap();
    let refusal = Machine::new(&host, config, memory(pageferry::memory::Backing::Memfd)).unwrap_err();
    assert!(refusal.to_string().contains("XOP (leaf 0x80000001 ECX bit 11)"), "{refusal}");
    let KvmError::Cpu(missing) = refusal else { panic!("{refusal}") };
    assert_eq!(missing.len(), 1);
}

#[test]
fn a_tsc_that_the_host_cannot_give_is_refused_before_it_is_tried() {
    let Some(host) = host() else { return };
    if host.features().tsc_scaling {
        drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: this host can scale the TSC\n")));
        return;
    }
    let (machine, memory) = bare(&host, 1);
    let own = machine.config().tsc_khz.unwrap();
    let with = |khz| {
        let mut config = machine.config().clone();
        config.tsc_khz = Some(khz);
        config
    };
    let refusal = Machine::new(&host, with(own / 2), memory.clone()).unwrap_err();
    assert!(matches!(&refusal, KvmError::Cpu(missing) if missing[0].contains("cannot be scaled")), "{refusal}");
    Machine::new(&host, with(own + own / 100_000), memory).unwrap();
}

#[test]
fn impossible_configurations_are_refused_with_a_reason() {
    let Some(host) = host() else { return };
    let make = |config| Machine::new(&host, config, memory(pageferry::memory::Backing::Memfd)).unwrap_err();
    for vcpus in [0, 256, u32::MAX] {
        let mut config = MachineConfig::new(&host, 1);
        config.vcpus = vcpus;
        assert!(make(config).to_string().contains("vCPUs are not possible"));
    }
    let mut nested = MachineConfig::new(&host, 1);
    nested.cpuid.iter_mut().find(|entry| entry.function == 1).unwrap().ecx |= 1 << 5;
    assert!(make(nested).to_string().contains("VMX"));
}
