//! The smallest machine that runs the guest: RAM, vCPUs, the in-kernel interrupt controller and the ports.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use crate::payload;
use crate::workload::line::Line;
use crate::workload::page::PAGE_BYTES;
use crate::workload::params::Params;
use crate::workload::ports::{self, Command};

const START_INFO: u64 = 0x6000;
const MEMORY_MAP: u64 = 0x6100;
const COMMAND_LINE: u64 = 0x7000;
/// How long a guest may be silent: several times what the slowest step takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running guest.
pub(crate) struct Machine {
    memory: GuestMemoryMmap,
    image_end: u64,
    ports: Arc<Ports>,
    lines: Receiver<String>,
    vcpus: Vec<JoinHandle<()>>,
    _vm: VmFd,
}

#[derive(Default)]
struct Ports {
    commands: Mutex<VecDeque<Command>>,
    beats: AtomicU64,
    /// How long the next beat is to take.
    hold_ms: AtomicU64,
    stop: AtomicBool,
}

/// Whether the machine has KVM; says so if not.
pub(crate) fn have_kvm() -> bool {
    let found = Kvm::new();
    if let Err(error) = &found {
        drop(std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("skipped: /dev/kvm cannot be used: {error}\n"),
        ));
    }
    found.is_ok()
}

impl Machine {
    /// Starts the guest with these runs of RAM (address and length).
    pub(crate) fn start(ram: &[(u64, u64)], params: Params) -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        let memory = map_memory(&vm, ram);
        let vcpus: Vec<_> = (0..params.vcpus).map(|id| vcpu(&kvm, &vm, id)).collect();
        let params = Params { tsc_khz: vcpus[0].get_tsc_khz().unwrap(), ..params };
        let (entry, image_end) = load(&memory, &params);
        enter_at(&vcpus[0], entry);
        let ports = Arc::new(Ports::default());
        let (sender, lines) = channel();
        let run = |vcpu| {
            let (ports, sender) = (ports.clone(), sender.clone());
            std::thread::spawn(move || run_vcpu(vcpu, &ports, &sender))
        };
        let vcpus = vcpus.into_iter().map(run).collect();
        Self { memory, image_end, ports, lines, vcpus, _vm: vm }
    }

    /// Waits for a line that `pick` wants.
    pub(crate) fn wait_for<T>(&self, pick: impl Fn(Line<'_>) -> Option<T>) -> T {
        loop {
            let text = self.lines.recv_timeout(PATIENCE).expect("the guest goes on printing");
            match Line::parse(&text) {
                Some(Line::Panic(_)) | None => panic!("the guest printed: {text}"),
                Some(line) => {
                    if let Some(picked) = pick(line) {
                        return picked;
                    }
                }
            }
        }
    }

    /// Sends a command.
    pub(crate) fn command(&self, command: Command) {
        self.ports.commands.lock().unwrap().push_back(command);
    }

    /// Beats heard so far.
    pub(crate) fn beats(&self) -> u64 {
        self.ports.beats.load(Ordering::Relaxed)
    }

    /// Makes the next beat take this long; returns when it has begun.
    pub(crate) fn hold_next_beat(&self, time: Duration) {
        self.ports.hold_ms.store(time.as_millis() as u64, Ordering::Relaxed);
        let deadline = Instant::now() + PATIENCE;
        while self.ports.hold_ms.load(Ordering::Relaxed) != 0 {
            assert!(Instant::now() < deadline, "the guest does not beat");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Reads a page.
    pub(crate) fn read(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_BYTES];
        self.memory.read_slice(&mut bytes, GuestAddress(page * PAGE_BYTES as u64)).unwrap();
        bytes
    }

    /// Overwrites a page.
    pub(crate) fn write(&self, page: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(page * PAGE_BYTES as u64)).unwrap();
    }

    /// The page after the loaded program, where the guest's own tables begin.
    pub(crate) fn first_page_after_image(&self) -> u64 {
        self.image_end.div_ceil(PAGE_BYTES as u64)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.ports.stop.store(true, Ordering::SeqCst);
        for vcpu in self.vcpus.drain(..) {
            while !vcpu.is_finished() {
                // SAFETY: the thread has not been joined, so its handle is valid; the handler does nothing.
                unsafe { libc::pthread_kill(vcpu.as_pthread_t(), libc::SIGUSR1) };
                std::thread::sleep(Duration::from_millis(1));
            }
            let result = vcpu.join();
            assert!(result.is_ok() || std::thread::panicking(), "a vCPU thread failed");
        }
    }
}

fn map_memory(vm: &VmFd, ram: &[(u64, u64)]) -> GuestMemoryMmap {
    let ranges: Vec<_> = ram.iter().map(|&(start, len)| (GuestAddress(start), len as usize)).collect();
    let memory = GuestMemoryMmap::from_ranges(&ranges).unwrap();
    for (slot, region) in memory.iter().enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: memory.get_host_address(region.start_addr()).unwrap() as u64,
            flags: 0,
        };
        // SAFETY: the mapping lives as long as the machine, which drops its vCPUs first.
        unsafe { vm.set_user_memory_region(region).unwrap() };
    }
    memory
}

fn vcpu(kvm: &Kvm, vm: &VmFd, id: u32) -> VcpuFd {
    let vcpu = vm.create_vcpu(u64::from(id)).unwrap();
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    for entry in cpuid.as_mut_slice().iter_mut().filter(|entry| entry.function == 1) {
        entry.ebx = entry.ebx & 0x00ff_ffff | id << 24;
    }
    vcpu.set_cpuid2(&cpuid).unwrap();
    vcpu
}

/// Loads the program and its start info; returns the entry point and the end of the program.
fn load(memory: &GuestMemoryMmap, params: &Params) -> (u64, u64) {
    let loaded = Elf::load(memory, None, &mut std::io::Cursor::new(payload::IMAGE), None).unwrap();
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else { panic!("the guest has no PVH entry") };
    let mut line = params.to_string().into_bytes();
    line.push(0);
    memory.write_slice(&line, GuestAddress(COMMAND_LINE)).unwrap();
    let mut map = vec![(0, 0xa_0000_u64)];
    for region in memory.iter() {
        let start = region.start_addr().raw_value().max(0x10_0000);
        map.push((start, region.start_addr().raw_value() + region.len() - start));
    }
    for (index, &(start, len)) in map.iter().enumerate() {
        let entry = [start, len, 1];
        memory.write_obj(entry, GuestAddress(MEMORY_MAP + index as u64 * 24)).unwrap();
    }
    let info = [0x1_336e_c578_u64, 0, 0, COMMAND_LINE, 0, MEMORY_MAP, map.len() as u64];
    memory.write_obj(info, GuestAddress(START_INFO)).unwrap();
    (entry.raw_value(), loaded.kernel_end)
}

/// The state the PVH convention asks for.
fn enter_at(vcpu: &VcpuFd, entry: u64) {
    let mut special = vcpu.get_sregs().unwrap();
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, db: 1, ..Default::default() };
    special.cs = kvm_segment { selector: 0x10, type_: 0xb, ..flat };
    let data = kvm_segment { selector: 0x18, type_: 0x3, ..flat };
    (special.ds, special.es, special.ss) = (data, data, data);
    special.cr0 = 1;
    vcpu.set_sregs(&special).unwrap();
    let registers = kvm_regs { rip: entry, rbx: START_INFO, rflags: 2, ..Default::default() };
    vcpu.set_regs(&registers).unwrap();
}

fn run_vcpu(mut vcpu: VcpuFd, ports: &Ports, lines: &Sender<String>) {
    allow_kicks();
    let mut line = String::new();
    while !ports.stop.load(Ordering::SeqCst) {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(ports::SERIAL_DATA, &[byte])) => match byte {
                b'\n' => drop(lines.send(std::mem::take(&mut line))),
                byte => line.push(char::from(byte)),
            },
            Ok(VcpuExit::IoOut(ports::REST, data)) => {
                let micros = u32::from_le_bytes(data.try_into().unwrap());
                std::thread::sleep(Duration::from_micros(u64::from(micros)));
            }
            Ok(VcpuExit::IoOut(ports::BEAT, _)) => {
                ports.beats.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(ports.hold_ms.swap(0, Ordering::Relaxed)));
            }
            Ok(VcpuExit::IoIn(ports::COMMAND, data)) => {
                let command = ports.commands.lock().unwrap().pop_front().map_or(0, |command| command as u32);
                data.copy_from_slice(&command.to_le_bytes());
            }
            Ok(exit) => {
                let exit = format!("{exit:?}");
                panic!("{exit} at {:x?} {:x?}", vcpu.get_regs(), vcpu.get_sregs());
            }
            // Kicked, or started by another vCPU.
            Err(error) => assert!(matches!(error.errno(), libc::EINTR | libc::EAGAIN), "KVM_RUN: {error}"),
        }
    }
}

/// A signal ends KVM_RUN; its handler has nothing to do.
fn allow_kicks() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: the action is fully initialised and its handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
    }
}
