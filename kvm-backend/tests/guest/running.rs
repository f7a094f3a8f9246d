//! Pause, resume, rest, throttle and the guest's end.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pageferry_kvm::{Ending, KvmError};

use crate::fixture::*;

#[test]
fn nothing_is_written_while_paused_and_everything_goes_on_after() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 3, SPIN);
    let counters = || [0, 1, 2].map(|index| read_u64(&*memory, COUNTERS + index * 4096));
    machine.start(Arc::new(Device::default())).unwrap();
    assert_eq!(counters(), [0; 3], "started means parked");
    for _ in 0..20 {
        let before = counters();
        machine.resume().unwrap();
        until("all vCPUs count", || counters().iter().zip(before).all(|(now, before)| *now > before));
        machine.pause().unwrap();
        let stopped = counters();
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!(counters(), stopped);
    }
}

#[test]
fn pause_right_after_resume_is_never_missed() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 2, COUNT);
    machine.start(Arc::new(Device::default())).unwrap();
    for round in 0..2000 {
        machine.resume().unwrap();
        if round % 3 == 0 {
            std::thread::yield_now();
        }
        machine.pause().unwrap();
        let stopped = read_u64(&*memory, COUNTERS);
        assert_eq!(read_u64(&*memory, COUNTERS), stopped);
    }
}

#[test]
fn an_instruction_that_left_for_input_has_its_result_when_paused() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 1, ADD_INPUT);
    let device = Arc::new(Device::default());
    machine.start(device.clone()).unwrap();
    for _ in 0..200 {
        machine.resume().unwrap();
        let before = device.ins.load(Ordering::SeqCst);
        until("the guest reads", || device.ins.load(Ordering::SeqCst) > before);
        machine.pause().unwrap();
        let registers = machine.vcpu(0).unwrap().get_regs().unwrap();
        let answered = device.ins.load(Ordering::SeqCst);
        assert_eq!(registers.rax, answered, "the last answer has reached its register");
        let sum = read_u64(&*memory, COUNTERS);
        let added = answered * (answered + 1) / 2;
        assert!(sum == added || sum == added - answered, "{sum} of {added}");
    }
}

#[test]
fn a_pause_ends_a_rest_and_registers_cannot_be_had_while_running() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 1, COUNT);
    let device = Arc::new(Device::default());
    device.hold.store(true, Ordering::SeqCst);
    machine.start(device.clone()).unwrap();
    for round in 1..=50 {
        machine.resume().unwrap();
        until("the guest rests", || device.outs.load(Ordering::SeqCst) == round);
        assert!(matches!(machine.vcpu(0), Err(KvmError::Running { index: 0 })));
        machine.pause().unwrap();
        assert_eq!(read_u64(&*memory, COUNTERS), round, "one step per rest");
        machine.vcpu(0).unwrap();
    }
}

#[test]
fn a_throttled_guest_gets_on_slower_and_at_full_speed_again_after() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 1, SPIN);
    machine.start(Arc::new(Device::default())).unwrap();
    machine.resume().unwrap();
    // The best and the worst of several stretches, for a host that is busy with other things.
    let stretches = || -> Vec<u64> {
        let stretch = || {
            let before = read_u64(&*memory, COUNTERS);
            std::thread::sleep(Duration::from_millis(100));
            read_u64(&*memory, COUNTERS) - before
        };
        (0..5).map(|_| stretch()).collect()
    };
    // And all of it again where the host was too busy to tell: without a throttle, all stretches of a quiet one are alike.
    let mut seen = Vec::new();
    let told_apart = (0..20).any(|_| {
        let free = stretches().into_iter().max();
        machine.throttle(95).unwrap();
        let before = read_u64(&*memory, COUNTERS);
        until("even a throttled guest gets on", || read_u64(&*memory, COUNTERS) > before);
        let throttled = stretches();
        machine.throttle(0).unwrap();
        let free_again = stretches().into_iter().max();
        let slowest = throttled.into_iter().min().map(|steps| steps * 3);
        seen.push((free, slowest, free_again));
        slowest < free && slowest < free_again
    });
    assert!(told_apart, "free, 3 times throttled, free again: {seen:?}");
    assert!(machine.throttle(100).is_err());
}

#[test]
fn pauses_and_changes_come_through_a_throttle() {
    let Some(host) = host() else { return };
    let (mut machine, memory) = loaded(&host, 2, SPIN);
    machine.start(Arc::new(Device::default())).unwrap();
    machine.throttle(99).unwrap();
    for percent in [99, 10, 99, 0, 99, 50, 99] {
        machine.resume().unwrap();
        let before = read_u64(&*memory, COUNTERS);
        until("the guest gets on", || read_u64(&*memory, COUNTERS) > before);
        machine.pause().unwrap();
        let stopped = read_u64(&*memory, COUNTERS);
        machine.throttle(percent).unwrap();
        std::thread::sleep(Duration::from_millis(15));
        assert_eq!(read_u64(&*memory, COUNTERS), stopped, "a throttle does not wake a paused guest");
    }
}

#[test]
fn a_crash_ends_the_run_with_a_reason_and_no_panic() {
    let Some(host) = host() else { return };
    let (mut machine, _memory) = loaded(&host, 2, CRASH);
    let device = Arc::new(Device::default());
    machine.start(device.clone()).unwrap();
    machine.resume().unwrap();
    until("the guest has ended", || device.ended.lock().unwrap().is_some());
    assert!(!machine.is_running());
    assert_eq!(machine.ended(), device.ended.lock().unwrap().clone());
    assert!(matches!(machine.ended(), Some(Ending::Shutdown | Ending::InternalError { .. })), "{:?}", machine.ended());
    assert!(matches!(machine.pause(), Err(KvmError::Ended(_))));
    assert!(matches!(machine.resume(), Err(KvmError::Ended(_))));
}

#[test]
fn a_running_machine_can_be_dropped() {
    let Some(host) = host() else { return };
    for _ in 0..5 {
        let (mut machine, memory) = loaded(&host, 2, SPIN);
        machine.start(Arc::new(Device::default())).unwrap();
        machine.resume().unwrap();
        machine.throttle(50).unwrap();
        until("the guest gets on", || read_u64(&*memory, COUNTERS) > 0);
        drop(machine);
        let stopped = read_u64(&*memory, COUNTERS);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(read_u64(&*memory, COUNTERS), stopped);
    }
}

#[test]
fn a_panic_in_the_handler_is_the_guests_end_and_not_the_vmms() {
    struct Clumsy;
    impl pageferry_kvm::ExitHandler for Clumsy {
        fn pio_out(&self, _vcpu: u32, _port: u16, _data: &[u8]) -> pageferry_kvm::Reaction {
            panic!("as the test wants it");
        }
    }
    let Some(host) = host() else { return };
    let (mut machine, _memory) = loaded(&host, 1, COUNT);
    machine.start(Arc::new(Clumsy)).unwrap();
    machine.resume().unwrap();
    until("the guest has ended", || machine.ended().is_some());
    assert_eq!(machine.ended(), Some(Ending::HandlerPanicked));
    assert!(matches!(machine.pause(), Err(KvmError::Ended(_))));
}
