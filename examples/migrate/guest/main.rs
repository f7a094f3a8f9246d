//! The guest: a program for an x86-64 virtual machine without an operating system, that fills its
//! memory, writes it at a chosen pace, and checks every byte of it on request.
//!
//! It is an ELF file with a PVH entry, so our own VMM and QEMU's `-kernel` start it alike. The command line
//! says what to do ([`workload::params`]); it talks through a serial port ([`workload::line`]) and a few
//! I/O ports ([`workload::ports`]). `memory.rs` has the memory map. All work is done in ring 3, which runs at
//! native speed even where the hypervisor emulates ring 0.
//!
//! vCPU 0 leads: it starts the others, gives the orders that all carry out together, looks at the clock, prints.
//! What a check covers: all RAM that the loader's map reports except the stacks, 28 KiB per vCPU. The map does not report
//! 0x9f000 to 0x100000 (the firmware's area on a PC): memory that migrates like all other, but is never checked here.
#![no_std]
#![no_main]

mod crew;
mod hardware;
mod heart;
mod ledger;
mod member;
mod memory;
mod pvh;
#[allow(dead_code)] // the host's half
#[path = "../src/workload/mod.rs"]
mod workload;

use core::fmt::Write;
use core::panic::PanicInfo;

use hardware::print_byte;
use heart::MICROS_FOREVER;

/// Where boot.s leads every vCPU, on its own stack in ring 3.
#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64, vcpu: u64) -> ! {
    if vcpu == 0 { crew::lead(start_info) } else { crew::follow(vcpu) }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    struct Serial;
    impl Write for Serial {
        fn write_str(&mut self, text: &str) -> core::fmt::Result {
            text.bytes().for_each(print_byte);
            Ok(())
        }
    }
    // Writing to the port cannot fail, and there is nothing left to do if formatting does.
    let _ = writeln!(Serial, "panic {}", info.message());
    loop {
        hardware::port_write(workload::ports::REST, MICROS_FOREVER);
    }
}
