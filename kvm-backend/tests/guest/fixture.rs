//! A tiny guest in ring 3 of long mode: pages identity-mapped, no stack, no interrupts. Accessed and
//! dirty bits are set in its page tables beforehand, so that the CPU has no reason to write to them.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry_kvm::kvm_bindings::{kvm_regs, kvm_segment};
use pageferry_kvm::{Ending, ExitHandler, Host, KvmError, Machine, MachineConfig, Reaction};

pub(crate) const LOW_LEN: u64 = 8 << 20;
pub(crate) const HIGH: u64 = 4 << 30;
pub(crate) const HIGH_LEN: u64 = 6 << 20;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD_LOW: u64 = 0x3000;
const PD_HIGH: u64 = 0x4000;
const CODE: u64 = 0x8000;

/// Where each vCPU of [`COUNT`] counts: a page each from here.
pub(crate) const COUNTERS: u64 = 0x10_0000;

/// Counts in the word at RDI, and says so on port DX each time.
pub(crate) const COUNT: &[u8] = &[
    0x48, 0xff, 0x07, // 1: inc qword [rdi]
    0xee, //          out dx, al
    0xeb, 0xfa, //    jmp 1b
];

/// Counts in the word at RDI and never leaves the guest.
pub(crate) const SPIN: &[u8] = &[
    0x48, 0xff, 0x07, // 1: inc qword [rdi]
    0xeb, 0xfb, //    jmp 1b
];

/// Adds one to a word in each of RSI pages from RDI, RBP bytes apart, then writes to port DX; repeats.
pub(crate) const SWEEP: &[u8] = &[
    0x48, 0x89, 0xfb, // 1: mov rbx, rdi
    0x48, 0x89, 0xf1, // mov rcx, rsi
    0x48, 0xff, 0x03, // 2: inc qword [rbx]
    0x48, 0x01, 0xeb, // add rbx, rbp
    0x48, 0xff, 0xc9, // dec rcx
    0x75, 0xf5, //       jnz 2b
    0xee, //             out dx, al
    0xeb, 0xec, //       jmp 1b
];

/// Reads port DX into RAX, adds it to the word at RDI, repeats.
pub(crate) const ADD_INPUT: &[u8] = &[
    0xed, //             1: in eax, dx
    0x48, 0x01, 0x07, // add qword [rdi], rax
    0xeb, 0xfa, //       jmp 1b
];

/// Faults with no handler for it: a triple fault.
pub(crate) const CRASH: &[u8] = &[0x0f, 0x0b];

pub(crate) fn host() -> Option<Host> {
    match Host::open() {
        Ok(host) => Some(host),
        Err(error @ (KvmError::NoDevice { .. } | KvmError::NoPermission { .. })) => {
            drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

pub(crate) fn layout() -> Layout {
    let regions =
        vec![Region::ram("low", 0, LOW_LEN), Region::ram("none", 0xc000_0000, 0), Region::ram("high", HIGH, HIGH_LEN)];
    Layout::new(regions).unwrap()
}

pub(crate) fn memory(backing: Backing) -> Arc<MappedMemory> {
    Arc::new(MappedMemory::new(layout(), backing).unwrap())
}

/// A machine with nothing in it.
pub(crate) fn bare(host: &Host, vcpus: u32) -> (Machine, Arc<MappedMemory>) {
    let memory = memory(Backing::Memfd);
    let machine = Machine::new(host, MachineConfig::new(host, vcpus), memory.clone()).unwrap();
    (machine, memory)
}

/// A machine about to run `code` on every vCPU, with vCPU `n`'s RDI at counter `n`.
pub(crate) fn loaded(host: &Host, vcpus: u32, code: &[u8]) -> (Machine, Arc<MappedMemory>) {
    loaded_with(host, vcpus, code, memory(Backing::Memfd))
}

/// The same over given memory.
pub(crate) fn loaded_with(
    host: &Host,
    vcpus: u32,
    code: &[u8],
    memory: Arc<MappedMemory>,
) -> (Machine, Arc<MappedMemory>) {
    let machine = Machine::new(host, MachineConfig::new(host, vcpus), memory.clone()).unwrap();
    write_tables(&memory);
    memory.write(RegionId(0), CODE, code).unwrap();
    for index in 0..vcpus {
        enter_ring_3(&machine, index, &registers(COUNTERS + u64::from(index) * 4096));
    }
    (machine, memory)
}

pub(crate) fn registers(rdi: u64) -> kvm_regs {
    // Interrupts off, I/O privilege level 3.
    kvm_regs { rip: CODE, rflags: 0x3002, rdi, rdx: 0x80, ..Default::default() }
}

fn write_tables(memory: &MappedMemory) {
    const TABLE: u64 = 0x27; // present, writable, user, accessed
    const LARGE_PAGE: u64 = 0xe7; // the same, dirty, 2 MiB
    let put = |table: u64, index: u64, entry: u64| {
        memory.write(RegionId(0), table + index * 8, &entry.to_le_bytes()).unwrap();
    };
    put(PML4, 0, PDPT | TABLE);
    put(PDPT, 0, PD_LOW | TABLE);
    put(PDPT, HIGH >> 30, PD_HIGH | TABLE);
    for index in 0..LOW_LEN >> 21 {
        put(PD_LOW, index, index << 21 | LARGE_PAGE);
    }
    for index in 0..HIGH_LEN >> 21 {
        put(PD_HIGH, index, (HIGH + (index << 21)) | LARGE_PAGE);
    }
}

pub(crate) fn enter_ring_3(machine: &Machine, index: u32, registers: &kvm_regs) {
    let segment = |type_, l, db| kvm_segment {
        limit: 0xffff_ffff,
        selector: if type_ == 0xb { 0x23 } else { 0x2b },
        type_,
        present: 1,
        dpl: 3,
        s: 1,
        g: 1,
        l,
        db,
        ..Default::default()
    };
    let vcpu = machine.vcpu(index).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cs = segment(0xb, 1, 0);
    sregs.ds = segment(3, 0, 1);
    (sregs.es, sregs.fs, sregs.gs, sregs.ss) = (sregs.ds, sregs.ds, sregs.ds, sregs.ds);
    sregs.cr3 = PML4;
    sregs.cr4 = 1 << 5; // PAE
    sregs.cr0 = 1 << 31 | 1; // paging, protection
    sregs.efer = 1 << 10 | 1 << 8; // long mode, active
    vcpu.set_sregs(&sregs).unwrap();
    vcpu.set_regs(registers).unwrap();
    let runnable = pageferry_kvm::kvm_bindings::kvm_mp_state { mp_state: 0 };
    vcpu.set_mp_state(runnable).unwrap();
}

pub(crate) fn read_u64(memory: &dyn GuestMemory, address: u64) -> u64 {
    let (region, offset) = if address >= HIGH { (RegionId(2), address - HIGH) } else { (RegionId(0), address) };
    let mut bytes = [0; 8];
    memory.read(region, offset, &mut bytes).unwrap();
    u64::from_le_bytes(bytes)
}

/// A device: counts port writes, answers reads with the next number, and can make vCPUs rest.
#[derive(Debug, Default)]
pub(crate) struct Device {
    pub(crate) outs: AtomicU64,
    pub(crate) ins: AtomicU64,
    /// While set, a vCPU that writes to the port rests until a pause comes.
    pub(crate) hold: AtomicBool,
    pub(crate) ended: Mutex<Option<Ending>>,
}

impl ExitHandler for Device {
    fn pio_out(&self, _vcpu: u32, _port: u16, _data: &[u8]) -> Reaction {
        self.outs.fetch_add(1, Ordering::SeqCst);
        if self.hold.load(Ordering::SeqCst) { Reaction::Rest(Duration::from_secs(3600)) } else { Reaction::Continue }
    }

    fn pio_in(&self, _vcpu: u32, _port: u16, data: &mut [u8]) -> Reaction {
        let number = self.ins.fetch_add(1, Ordering::SeqCst) + 1;
        data.copy_from_slice(&(number as u32).to_le_bytes()[..data.len()]);
        Reaction::Continue
    }

    fn ended(&self, _vcpu: u32, ending: &Ending) {
        *self.ended.lock().unwrap() = Some(ending.clone());
    }
}

/// Waits until something becomes true; fails the test if it does not.
pub(crate) fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    let give_up = Instant::now() + Duration::from_secs(60);
    while !is_true() {
        assert!(Instant::now() < give_up, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
