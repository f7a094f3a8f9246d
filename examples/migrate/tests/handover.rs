//! A guest whose memory is handed over to another process of this host instead of being copied.

mod common;

use std::path::PathBuf;
use std::time::Duration;

use common::{Running, guest_kinds, program};

/// A socket's path.
fn socket(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("migrate-handover-{name}-{}.sock", std::process::id()))
}

/// A receiver that listens.
fn receiver(name: &str, options: &str) -> (Running, String) {
    let address = format!("unix:{}", socket(name).display());
    let mut receiver = Running::start(&format!("receive --listen {address} --linger 100ms {options}"));
    receiver.wait_for("listening");
    (receiver, address)
}

#[test]
fn a_guest_goes_on_in_the_same_memory_and_nothing_is_copied() {
    for kind in guest_kinds() {
        let (receiver, address) = receiver(kind, "");
        let sender = Running::start(&format!(
            "send --guest {kind} --to {address} --memory 256M --after 100ms --backing memfd --hand-over-memory"
        ));
        let (sent, arrived) = (sender.end(), receiver.end());
        let report = sent.report();
        assert_eq!((sent.code, &report["outcome"]), (0, &"completed".into()), "{report}");
        assert!(report["wire_bytes"].as_u64().unwrap() < 256 << 10, "{report}");
        assert_eq!((&report["pages_total"], &report["guest_bytes"]), (&0.into(), &0.into()), "{report}");
        let report = arrived.report();
        assert_eq!((arrived.code, &report["guest_self_check"]), (0, &"ok".into()), "{report}");
        assert!(report["guest_pages_checked"].as_u64().unwrap() > 60_000, "{report}");
        assert!(report["guest_heartbeats_after"].as_u64().unwrap() > 0, "{report}");
    }
}

#[test]
fn lanes_that_have_nothing_to_carry_do_no_harm() {
    let (receiver, address) = receiver("lanes", "");
    let sender = Running::start(&format!(
        "send --guest process --to {address} --memory 32M --after 50ms --backing memfd --lanes 3 --hand-over-memory"
    ));
    assert_eq!((sender.end().code, receiver.end().code), (0, 0));
}

#[test]
fn a_refused_guest_runs_on_in_its_memory() {
    for kind in guest_kinds() {
        let (receiver, address) = receiver(&format!("refused-{kind}"), "--max-memory 16M");
        let sender = Running::start(&format!(
            "send --guest {kind} --to {address} --memory 64M --after 50ms --linger 50ms --backing memfd --hand-over-memory"
        ));
        let (sent, refused) = (sender.end(), receiver.end());
        let report = sent.report();
        assert_eq!((sent.code, refused.code), (1, 1), "{report}");
        assert!(report["error"].as_str().unwrap().contains("--max-memory"), "{report}");
        assert_eq!((&report["owner"], &report["guest_self_check"]), (&"source".into(), &"ok".into()), "{report}");
    }
}

#[test]
fn a_cancelled_hand_over_leaves_the_guest_and_its_memory() {
    // A receiver that does nothing: the source waits for its first word.
    let (receiver, address) = receiver("cancelled", "");
    receiver.signal("-STOP");
    let mut sender = Running::start(&format!(
        "send --guest process --to {address} --memory 64M --on-signal --linger 50ms --backing memfd --hand-over-memory"
    ));
    sender.wait_for("note");
    sender.wait_for("note");
    sender.signal("-USR1");
    // Long enough for it to have set out, and far less than it waits for a word.
    std::thread::sleep(Duration::from_secs(2));
    sender.interrupt();
    let ended = sender.end();
    let report = ended.report();
    assert_eq!((ended.code, &report["guest_self_check"]), (3, &"ok".into()), "{report}");
    receiver.signal("-CONT");
    receiver.interrupt();
    assert_ne!(receiver.end().code, 0);
}

#[test]
fn a_destination_that_is_killed_at_any_moment_leaves_one_owner_and_sound_memory() {
    let mut outcomes = Vec::new();
    for kind in guest_kinds() {
        for delay in [0, 1, 2, 4, 6, 8, 10, 14, 20] {
            let (receiver, address) = receiver(&format!("killed-{kind}-{delay}"), "");
            let mut sender = Running::start(&format!(
                "send --guest {kind} --to {address} --memory 64M --on-signal --linger 20ms --settle-window 300ms --backing memfd \
                 --hand-over-memory"
            ));
            sender.wait_for("note");
            sender.wait_for("note");
            sender.signal("-USR1");
            std::thread::sleep(Duration::from_millis(delay));
            receiver.kill();
            let ended = sender.end();
            let report = ended.report();
            let owner = report["owner"].as_str().unwrap().to_owned();
            match owner.as_str() {
                "source" => assert_eq!(report["guest_self_check"], "ok", "{kind} after {delay} ms: {report}"),
                "destination" | "undecided" => assert!(report["guest_self_check"].is_null(), "{report}"),
                other => panic!("{other}"),
            }
            outcomes.push(owner);
            let _ = std::fs::remove_file(socket(&format!("killed-{kind}-{delay}")));
        }
    }
    assert!(outcomes.iter().any(|owner| owner == "source"), "{outcomes:?}");
}

#[test]
fn what_cannot_be_handed_over_is_explained_before_a_guest_is_started() {
    for (arguments, expected) in [
        ("--to 127.0.0.1:9 --backing memfd", "--to unix:PATH"),
        ("--to unix:/run/guest.sock", "--backing memfd"),
        ("--to unix:/run/guest.sock --backing memfd --verify full", "--verify full"),
    ] {
        let line = format!("send --guest process --hand-over-memory {arguments}");
        let output = program().args(line.split_whitespace()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(7) && told.contains(expected), "{arguments}: {told}");
        assert!(!told.contains("process guest:"), "{arguments}: {told}");
    }
}
