//! Whole guests under KVM: booted, stopped, taken over by a second machine of this process, and run on.
//!
//! The Linux test needs a KVM with hardware semantics, a kernel and an initial RAM disk:
//! `examples/migrate/nested/linux-in-process.sh` brings all three.

use std::borrow::Cow;
use std::fs::File;
use std::io::{PipeWriter, Write, pipe};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use pageferry::memory::{GuestMemory, Layout, RegionId};
use pageferry::vm::{DestinationVm, SourceVm};
use pageferry_kvm::{DirtyLogMode, Host};

use super::*;
use crate::guest::{Guest, SelfCheck};
use crate::workload::params::{Params, Writes};

/// Everything is slow in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(240);

fn copy(from: &dyn GuestMemory, to: &dyn GuestMemory) {
    let mut buffer = vec![0; 1 << 20];
    for (id, region) in from.layout().iter() {
        for offset in (0..region.len).step_by(buffer.len()) {
            let chunk = buffer.len().min((region.len - offset) as usize);
            from.read(id, offset, &mut buffer[..chunk]).unwrap();
            to.write(id, offset, &buffer[..chunk]).unwrap();
        }
    }
}

/// A console that the test types to.
fn console() -> (PipeWriter, ConsoleEnds) {
    let (terminal, typist) = pipe().unwrap();
    (typist, ConsoleEnds { output: None, input: Some(File::from(OwnedFd::from(terminal))) })
}

fn boot_with_console(ram_bytes: u64, boots: Boots) -> (PipeWriter, LiveGuest) {
    let (typist, console) = console();
    let vcpus = if let Boots::Payload(params) = &boots { params.vcpus } else { 2 };
    let (backing, dirty_log) = (GuestBacking::Anonymous, DirtyLogMode::Best);
    let config = GuestConfig { ram_bytes, vcpus, backing, boots, console, dirty_log };
    (typist, LiveGuest::boot(config).unwrap())
}

/// Stops a guest and runs it on in another machine: what the engine does, without the engine.
fn move_over(mut source: LiveGuest) -> (PipeWriter, LiveGuest, Receiver<String>) {
    let (typist, console) = console();
    let mut destination = ArrivingGuest::new(ArrivalConfig { console, ..ArrivalConfig::default() });
    let mut description = Vec::new();
    source.describe(&mut description).unwrap();
    let memory = source.memory();
    let arrived = destination.prepare(&description, memory.layout()).unwrap();
    source.pause().unwrap();
    let mut state = Vec::new();
    source.save(&mut state).unwrap();
    let (bytes, estimate) = (state.len() as u64, source.state_bytes_estimate());
    println!("{bytes} bytes of state, {estimate} expected");
    assert!((estimate / 2..=estimate * 2).contains(&bytes), "{bytes} bytes of state, {estimate} expected");
    copy(&*memory, &*arrived);
    destination.load(&mut &state[..]).unwrap();
    drop(source);
    let lines = destination.handle().unwrap().lines();
    destination.commit(true).unwrap();
    (typist, destination.into_live().unwrap(), lines)
}

fn wait_for(lines: &Receiver<String>, wanted: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let line = lines.recv_deadline(deadline).expect("the guest went on printing");
        println!("guest: {line}");
        if wanted(&line) {
            return line;
        }
    }
}

/// The number after `COUNT`, when the guest's own checks (`bad`, `oops`) found nothing wrong.
fn healthy_count(line: &str) -> u64 {
    let fields: Vec<&str> = line.split_whitespace().collect();
    assert!(fields.contains(&"bad=0") && fields.contains(&"oops=0"), "the guest is ill: {line}");
    fields[1].parse().unwrap()
}

#[test]
fn a_running_linux_guest_goes_on_in_another_machine() {
    let file = |variable| std::env::var(variable).ok().map(|path| std::fs::read(path).unwrap());
    let (Some(kernel), Some(initrd)) = (file("PAGEFERRY_TEST_KERNEL"), file("PAGEFERRY_TEST_INITRD")) else {
        println!(
            "skipped: PAGEFERRY_TEST_KERNEL and PAGEFERRY_TEST_INITRD are not set (examples/migrate/nested sets them)"
        );
        return;
    };
    let image = BootImage {
        kernel: Cow::Owned(kernel),
        initrd: Some(initrd),
        command_line: "console=ttyS0 reboot=k panic=-1 pci=off".to_owned(),
    };
    let (mut typist, mut guest) = boot_with_console(256 << 20, Boots::Image(image));
    let mut lines = guest.handle().lines();
    guest.resume().unwrap();
    let counts = |line: &str| line.starts_with("COUNT");
    wait_for(&lines, counts);
    for hop in 0..4 {
        let mut count = 0;
        for _ in 0..10 {
            count = healthy_count(&wait_for(&lines, counts));
        }
        (typist, guest, lines) = move_over(guest);
        println!("moved after {count}");
        assert_eq!(healthy_count(&wait_for(&lines, counts)), count + 1);
        writeln!(typist, "hop {hop}").unwrap();
        wait_for(&lines, |line| line == format!("HEARD hop {hop}"));
    }
    writeln!(typist, "reboot").unwrap();
    while lines.recv_timeout(PATIENCE).is_ok() {}
    assert_eq!(guest.handle().ended().as_deref(), Some("it asked for a reset or to be switched off"));
}

fn have_kvm() -> bool {
    let host = Host::open();
    if let Err(error) = &host {
        drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {error}\n")));
    }
    host.is_ok()
}

fn payload(vcpus: u32) -> LiveGuest {
    let params = Params { working_set: 4 << 20, writes: Writes::Full, vcpus, ..Params::default() };
    let (_, mut guest) = boot_with_console(32 << 20, Boots::Payload(params));
    guest.resume().unwrap();
    guest.wait_ready(&|| true).unwrap();
    guest
}

#[test]
fn a_payload_that_goes_on_in_another_machine_finds_every_byte_right() {
    if !have_kvm() {
        return;
    }
    let mut guest = payload(2);
    for _ in 0..3 {
        (_, guest, _) = move_over(guest);
        assert!(matches!(guest.self_check().unwrap(), SelfCheck::Ok { .. }));
        assert!(guest.longest_stall().unwrap().is_some());
    }
}

#[test]
fn a_byte_that_arrives_wrong_is_found_by_the_payload() {
    if !have_kvm() {
        return;
    }
    let mut guest = payload(1);
    guest.pause().unwrap();
    let memory = guest.memory();
    let (region, address) = (RegionId(0), 20 << 20);
    let mut byte = [0];
    memory.read(region, address, &mut byte).unwrap();
    memory.write(region, address, &[byte[0] ^ 1]).unwrap();
    guest.resume().unwrap();
    let answer = guest.self_check().unwrap();
    assert!(matches!(&answer, SelfCheck::Wrong(page) if page.contains("page=1400000")), "{answer:?}");
}

/// What a destination with these options says to a description and a layout.
fn refusal(config: ArrivalConfig, description: &[u8], layout: &Layout) -> String {
    ArrivingGuest::new(config).prepare(description, layout).err().expect("it is refused").to_string()
}

#[test]
fn a_destination_refuses_what_it_cannot_take_and_says_why() {
    if !have_kvm() {
        return;
    }
    let mut guest = payload(1);
    let mut description = Vec::new();
    guest.describe(&mut description).unwrap();
    let layout = guest.memory().layout().clone();
    let small =
        ArrivalConfig { allowance: Allowance { limit: Some(16 << 20), overcommit: false }, ..ArrivalConfig::default() };
    let text = refusal(small, &description, &layout);
    assert!(text.contains("32 MiB") && text.contains("allows 16 MiB"), "{text}");
    let text = refusal(ArrivalConfig::default(), &description, &ram::layout(64 << 20).unwrap());
    assert!(text.contains("memory layout"), "{text}");
    let text = refusal(ArrivalConfig::default(), &description[..description.len() / 2], &layout);
    assert!(text.contains("cannot be understood"), "{text}");
    let mut empty_place = ArrivingGuest::new(ArrivalConfig::default());
    assert!(empty_place.commit(true).is_err(), "nothing can run that was not prepared");
}
