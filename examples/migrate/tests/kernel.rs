//! A kernel of the user's cannot be asked how it is, but that it has ended is seen.

mod common;

use std::path::PathBuf;

use common::{guest_kinds, run};

/// Where the kernel is loaded, and entered in 32-bit mode.
const ENTRY: u32 = 0x10_0000;

/// A kernel that sleeps so many times for 0.1 s, and then resets the machine.
fn kernel(name: &str, sleeps: u32) -> PathBuf {
    let mut code = vec![0xb9]; // mov ecx, sleeps
    code.extend(sleeps.to_le_bytes());
    code.extend([0xba, 0x00, 0x0e, 0, 0]); // mov edx, 0xe00: the port to rest at
    code.extend([0xb8, 0xa0, 0x86, 0x01, 0]); // mov eax, 100,000 microseconds
    code.extend([0xef, 0x49, 0x75, 0xfc]); // again: out dx, eax; dec ecx; jnz again
    code.extend([0xb0, 0xfe, 0xe6, 0x64]); // mov al, 0xfe; out 0x64, al: the keyboard controller's reset
    code.extend([0xeb, 0xfe]); // jmp here
    let path = std::env::temp_dir().join(format!("migrate-test-{}-{name}", std::process::id()));
    std::fs::write(&path, elf(&code)).unwrap();
    path
}

/// A 64-bit ELF file with a PVH entry.
fn elf(code: &[u8]) -> Vec<u8> {
    const CODE: u64 = 0x100;
    const NOTE: u64 = 0xc0;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]); // executable, x86-64
    for number in [u64::from(ENTRY), 64, 0] {
        file.extend(number.to_le_bytes());
    }
    file.extend([0, 0, 0, 0, 64, 0, 56, 0, 2, 0, 64, 0, 0, 0, 0, 0]); // two program headers
    let mut header = |kind: u32, offset: u64, address: u64, len: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for number in [offset, address, address, len, len, 4] {
            file.extend(number.to_le_bytes());
        }
    };
    header(1, CODE, ENTRY.into(), code.len() as u64);
    header(4, NOTE, 0, 20);
    file.resize(NOTE as usize, 0);
    for number in [4, 4, 18] {
        file.extend(u32::to_le_bytes(number)); // lengths of name and content, PHYS32_ENTRY
    }
    file.extend(b"Xen\0");
    file.extend(ENTRY.to_le_bytes());
    file.resize(CODE as usize, 0);
    file.extend(code);
    file
}

fn demo(kernel: &PathBuf, moment: &str) -> common::Ended {
    let ended = run(&format!("demo --kernel {} --memory 8M {moment} --linger 60s", kernel.display()));
    std::fs::remove_file(kernel).unwrap();
    ended
}

#[test]
fn a_guest_that_ends_after_the_hand_over_is_no_success_and_is_not_waited_for() {
    if guest_kinds().contains(&"kvm") {
        // On a busy machine a short life can be over before the migration.
        let lives = [40, 160, 640].into_iter();
        let mut runs = lives.map(|sleeps| demo(&kernel("late", sleeps), "--after 50ms"));
        let ended = runs.find(|ended| ended.report()["owner"] == "destination").expect("a life that is long enough");
        let report = ended.report();
        assert_eq!(ended.code, 5, "{report} {}", ended.stderr);
        assert!(report["guest_ended"].as_str().unwrap().contains("reset"), "{report}");
    }
}

#[test]
fn a_guest_that_has_ended_is_not_migrated() {
    if guest_kinds().contains(&"kvm") {
        let ended = demo(&kernel("early", 1), "--after 2s");
        let report = ended.report();
        assert_eq!((ended.code, &report["owner"]), (5, &"source".into()), "{report} {}", ended.stderr);
        assert!(report["error"].as_str().unwrap().contains("ended"), "{report}");
    }
}
