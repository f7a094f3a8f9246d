//! What only assembly can do, and the functions that compiled code takes for granted.

use core::arch::x86_64::{__cpuid, _rdtsc, CpuidResult};
use core::arch::{asm, global_asm};
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::memory::BLOCK_BYTES;
use crate::workload::ports;

global_asm!(include_str!("boot.s"), block_bytes = const BLOCK_BYTES, options(att_syntax));

/// Where the other vCPUs start in real mode: page 8, in memory that every PC has.
const TRAMPOLINE_PAGE: u32 = 8;
const APIC_COMMAND: *mut u32 = 0xfee0_0300 as *mut u32;
const INIT_ALL_OTHERS: u32 = 0x000c_4500;
const START_ALL_OTHERS: u32 = 0x000c_4600 | TRAMPOLINE_PAGE;

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_end: u8;
    static others_arrived: AtomicU32;
    static others_wanted: AtomicU32;
}

/// The time stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has it and nothing forbids ring 3 to read it.
    unsafe { _rdtsc() }
}

/// The frequency of the time stamp counter as CPUID tells it, if it does.
pub(crate) fn tsc_khz() -> Option<u64> {
    let hypervisor = cpuid(0x4000_0000);
    if (0x4000_0010..0x4001_0000).contains(&hypervisor.eax) {
        return Some(u64::from(cpuid(0x4000_0010).eax)).filter(|&khz| khz > 0);
    }
    let crystal = (cpuid(0).eax >= 0x15).then(|| cpuid(0x15))?;
    let hertz = u64::from(crystal.ecx) * u64::from(crystal.ebx) / u64::from(crystal.eax.max(1));
    Some(hertz / 1000).filter(|&khz| khz > 0)
}

#[allow(unused_unsafe)] // newer versions of Rust call it safe
fn cpuid(leaf: u32) -> CpuidResult {
    // SAFETY: every x86-64 CPU has the instruction.
    unsafe { __cpuid(leaf) }
}

/// Prints one byte on the serial port, which always takes it in a virtual machine.
pub(crate) fn print_byte(byte: u8) {
    // SAFETY: IOPL is 3, and the port has no effect on memory.
    unsafe { asm!("out dx, al", in("dx") ports::SERIAL_DATA, in("al") byte, options(nostack, preserves_flags)) }
}

/// A byte that waits on the serial port.
pub(crate) fn read_byte() -> Option<u8> {
    // A port that is not there has all bits set, more than any that is.
    let status = port_read_byte(ports::SERIAL_STATUS);
    (status != u8::MAX && status & ports::SERIAL_RECEIVED != 0).then(|| port_read_byte(ports::SERIAL_DATA))
}

fn port_read_byte(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags)) }
    value
}

/// Writes a 32-bit port. Memory is complete and up to date before and after.
pub(crate) fn port_write(port: u16, value: u32) {
    // SAFETY: as above.
    unsafe { asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags)) }
}

/// Reads a 32-bit port.
pub(crate) fn port_read(port: u16) -> u32 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags)) }
    value
}

/// Starts all other vCPUs; the first `wanted` of them run `guest_main` in the end, the others halt.
pub(crate) fn start_other_vcpus(wanted: u32) {
    // SAFETY: the symbols enclose the trampoline; its page is RAM that holds nothing we still need;
    // the local APIC is mapped like everything below 4 GiB.
    unsafe {
        let code = &raw const trampoline;
        let len = (&raw const trampoline_end).offset_from_unsigned(code);
        ptr::copy_nonoverlapping(code, (TRAMPOLINE_PAGE << 12) as *mut u8, len);
        others_wanted.store(wanted, Ordering::Release);
        APIC_COMMAND.write_volatile(INIT_ALL_OTHERS);
        APIC_COMMAND.write_volatile(START_ALL_OTHERS);
    }
}

/// How many other vCPUs have started.
pub(crate) fn arrived() -> u32 {
    // SAFETY: boot.s defines it with this size and alignment and changes it atomically.
    unsafe { others_arrived.load(Ordering::Acquire) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(target: *mut u8, source: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's, as for C's function of this name; so too below.
    unsafe { asm!("rep movsb", inout("rcx") len => _, inout("rdi") target => _, inout("rsi") source => _) }
    target
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(target: *mut u8, source: *const u8, len: usize) -> *mut u8 {
    if (target as usize).wrapping_sub(source as usize) >= len {
        // SAFETY: an ascending copy reads each byte before it is overwritten.
        return unsafe { memcpy(target, source, len) };
    }
    let (last_target, last_source) = (target.wrapping_add(len - 1), source.wrapping_add(len - 1));
    // SAFETY: a descending copy reads each byte before it is overwritten.
    unsafe {
        asm!("std", "rep movsb", "cld", inout("rcx") len => _, inout("rdi") last_target => _, inout("rsi") last_source => _);
    }
    target
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memset(target: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: see memcpy.
    unsafe { asm!("rep stosb", inout("rcx") len => _, inout("rdi") target => _, in("al") byte as u8) }
    target
}

#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    for index in 0..len {
        // SAFETY: see memcpy.
        let (left, right) = unsafe { (left.add(index).read_volatile(), right.add(index).read_volatile()) };
        if left != right {
            return i32::from(left) - i32::from(right);
        }
    }
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(left: *const u8, right: *const u8, len: usize) -> i32 {
    // SAFETY: see memcpy.
    unsafe { memcmp(left, right, len) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn strlen(text: *const u8) -> usize {
    let mut len = 0;
    // SAFETY: see memcpy.
    while unsafe { text.add(len).read_volatile() } != 0 {
        len += 1;
    }
    len
}
