//! Whole guests under KVM: booted, stopped, taken over by a second machine of this process, and run on.
//!
//! The Linux test needs a KVM with hardware semantics, a kernel and an initial RAM disk:
//! `tools/nested/linux-in-process.sh` brings all three.

use std::borrow::Cow;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use pageferry::memory::GuestMemory;
use pageferry::vm::{DestinationVm, SourceVm};
use pageferry_kvm::DirtyLogMode;

use super::*;

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

/// Stops a guest and runs it on in another machine: what the engine does, without the engine.
fn move_over(mut source: LiveGuest, output: ConsoleEnds) -> (LiveGuest, Receiver<GuestLine>) {
    let mut destination = ArrivingGuest::new(ArrivalConfig { console: output, ..ArrivalConfig::default() });
    let mut description = Vec::new();
    source.describe(&mut description).unwrap();
    let memory = source.memory();
    let arrived = destination.prepare(&description, memory.layout()).unwrap();
    source.pause().unwrap();
    let mut state = Vec::new();
    source.save(&mut state).unwrap();
    copy(&*memory, &*arrived);
    destination.load(&mut &state[..]).unwrap();
    drop(source);
    let lines = destination.handle().unwrap().lines();
    destination.commit(true).unwrap();
    (destination.into_live().unwrap(), lines)
}

fn wait_for(lines: &Receiver<GuestLine>, wanted: impl Fn(&str) -> bool) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let line = lines.recv_deadline(deadline).expect("the guest went on printing").text;
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
        println!("skipped: PAGEFERRY_TEST_KERNEL and PAGEFERRY_TEST_INITRD are not set (tools/nested sets them)");
        return;
    };
    let image = BootImage {
        kernel: Cow::Owned(kernel),
        initrd: Some(initrd),
        command_line: "console=ttyS0 reboot=k panic=-1 pci=off".to_owned(),
    };
    let config = GuestConfig {
        ram_bytes: 256 << 20,
        vcpus: 2,
        backing: GuestBacking::Anonymous,
        boots: Boots::Image(image),
        console: ConsoleEnds::default(),
        dirty_log: DirtyLogMode::Best,
    };
    let mut guest = LiveGuest::boot(config).unwrap();
    let mut lines = guest.handle().lines();
    guest.resume().unwrap();
    let counts = |line: &str| line.starts_with("COUNT");
    let mut count = 0;
    wait_for(&lines, counts);
    for _ in 0..4 {
        for _ in 0..10 {
            count = healthy_count(&wait_for(&lines, counts));
        }
        (guest, lines) = move_over(guest, ConsoleEnds::default());
        println!("moved after {count}");
        assert_eq!(healthy_count(&wait_for(&lines, counts)), count + 1);
    }
    assert!(guest.handle().is_running() && guest.handle().ended().is_none());
}
