//! Each kind of link that an address can ask for.

mod common;

use common::{Running, program};
use serde_json::Value;

/// Moves a small guest; `listen` is the receiver's, `send` what the sender says besides. Returns what the receiver said at first.
fn moves(listen: &str, receive: &str, send: &str) -> Value {
    let mut receiver = Running::start(&format!("receive --listen {listen} {receive} --linger 20ms --wait 60s"));
    let listening = receiver.wait_for("listening");
    let to = listening["connect"].as_str().unwrap();
    let sender = Running::start(&format!(
        "send --guest process --to {to} {send} --memory 32M --after 50ms --linger 20ms --lanes 2 --verify full"
    ));
    let (sent, arrived) = (sender.end(), receiver.end());
    let report = sent.report();
    assert_eq!((sent.code, &report["outcome"]), (0, &"completed".into()), "{listen}: {report}");
    assert_eq!((&report["digest_match"], &report["full_verify_match"]), (&true.into(), &true.into()), "{report}");
    assert_eq!((arrived.code, &arrived.report()["guest_self_check"]), (0, &"ok".into()), "{}", arrived.report());
    listening
}

#[test]
fn a_guest_moves_over_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("migrate-links-{}.sock", std::process::id()));
    let address = format!("unix:{}", path.display());
    let listening = moves(&address, "", "");
    assert_eq!((&listening["address"], &listening["connect"]), (&address.clone().into(), &address.into()));
    assert!(!path.exists(), "the socket goes with its listener");
}

#[test]
fn two_hosts_pair_with_what_the_receiver_prints() {
    for scheme in ["tls", "quic"] {
        let listening = moves(&format!("{scheme}://127.0.0.1:0"), "", "");
        let (address, connect) = (listening["address"].as_str().unwrap(), listening["connect"].as_str().unwrap());
        assert!(address.starts_with(&format!("{scheme}://127.0.0.1:")) && !address.contains("pair-"), "{address}");
        assert!(connect.starts_with(address) && connect.contains("/pair-"), "{connect}");
    }
}

#[test]
fn a_demonstration_of_each_transport_ends_well() {
    for transport in ["tls", "quic", "unix", "memfd", "file", "paths"] {
        let arguments = format!("demo --transport {transport} --memory 48M --after 50ms --linger 50ms");
        let ended = Running::start(&arguments).end();
        let report = ended.report();
        assert_eq!((ended.code, &report["outcome"]), (0, &"completed".into()), "{transport}: {report}");
        assert_eq!(report["guest_self_check"], "ok", "{transport}: {report}");
    }
}

#[test]
fn a_demonstration_leaves_no_file_behind_however_it_ends() {
    let folder = tempfile::TempDir::with_prefix("migrate-links-left-").unwrap();
    for (transport, dies) in [("unix", false), ("unix", true), ("memfd", false), ("file", false)] {
        let linger = if dies { "60s" } else { "20ms" };
        let arguments = format!("demo --transport {transport} --memory 16M --after 20ms --linger {linger}");
        let mut command = program();
        command.args(arguments.split_whitespace()).env("TMPDIR", folder.path());
        let mut demo = Running::of(command);
        if dies {
            demo.wait_for("handed_over");
            demo.kill_children();
        }
        assert_eq!(demo.end().code, if dies { 6 } else { 0 }, "{transport}");
        let left: Vec<_> = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(left.is_empty(), "{transport}: {left:?}");
    }
}

#[test]
fn what_leaves_the_host_is_encrypted_unless_somebody_insists() {
    // All of this host's addresses: it might leave.
    let listening = moves("0.0.0.0:0", "", "");
    assert!(listening["connect"].as_str().unwrap().starts_with("tls://"), "{listening}");
    let listening = moves("0.0.0.0:0", "--insecure-plaintext", "--insecure-plaintext");
    assert_eq!(listening["connect"], listening["address"]);
    for (arguments, expected) in [
        ("receive --listen tcp://0.0.0.0:0", "--insecure-plaintext"),
        ("send --to tcp://192.0.2.7:7000", "--insecure-plaintext"),
        ("send --to 192.0.2.7:7000", "/pair-..."),
        ("send --to tls://192.0.2.7:7000", "/pair-..."),
        ("send --to 192.0.2.7:1,192.0.2.8:1", "/pair-..."),
    ] {
        refused(arguments, expected);
    }
}

#[test]
fn a_guest_moves_over_two_paths() {
    moves("127.0.0.1:0,127.0.0.2:0", "", "");
    moves("127.0.0.1:0,127.0.0.2:0", "", "--bind 127.0.0.1,127.0.0.2");
    moves("tls://127.0.0.1:0,127.0.0.2:0", "", "");
    moves("quic://127.0.0.1:0,tls://127.0.0.2:0", "", "");
    refused("send --to 127.0.0.1:1,127.0.0.2:1,127.0.0.3:1 --bind 127.0.0.1,127.0.0.2", "2 addresses for 3 paths");
}

#[test]
fn one_address_against_several_is_explained_and_the_guest_stays() {
    let (single, several) = ("127.0.0.1:0", "127.0.0.1:0,127.0.0.2:0");
    for (listen, expected) in
        [(single, "the other must name the same ones"), (several, "all the addresses that it has printed")]
    {
        let mut receiver = Running::start(&format!("receive --listen {listen} --linger 20ms --wait 60s"));
        let listening = receiver.wait_for("listening")["connect"].as_str().unwrap().to_owned();
        let to = match listening.split_once(',') {
            Some((first, _)) => first.to_owned(),
            // A second path, on which nobody listens.
            None => format!("{listening},127.0.0.2:1"),
        };
        let send = format!("send --guest process --to {to} --memory 16M --after 20ms --linger 20ms");
        let ended = Running::start(&send).end();
        let report = ended.report();
        assert_eq!((ended.code, &report["owner"]), (1, &"source".into()), "{report}");
        assert!(report["error"].as_str().unwrap().contains(expected), "{report}");
        receiver.interrupt();
        receiver.end();
    }
}

#[test]
fn a_pairing_may_come_from_a_file_or_from_standard_input() {
    let folder = std::env::temp_dir().join(format!("migrate-pairing-{}", std::process::id()));
    for (whole, from_stdin) in [(true, false), (false, false), (false, true)] {
        let mut receiver = Running::start("receive --listen tls://127.0.0.1:0 --linger 20ms --wait 60s");
        let listening = receiver.wait_for("listening");
        let (address, connect) = (listening["address"].as_str().unwrap(), listening["connect"].as_str().unwrap());
        let pairing = if whole { connect } else { connect.rsplit_once('/').unwrap().1 };
        std::fs::write(&folder, format!("{pairing}\n")).unwrap();
        let name = if from_stdin { "-".to_owned() } else { folder.display().to_string() };
        let send = format!(
            "send --guest process --to {address} --pairing-file {name} --memory 16M --after 20ms --linger 20ms"
        );
        let mut sender = program();
        sender.args(send.split_whitespace()).arg("--json").stdin(std::fs::File::open(&folder).unwrap());
        let output = sender.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(receiver.end().code, 0);
    }
    std::fs::write(&folder, "pear-AAAA").unwrap();
    let file = folder.display();
    refused(&format!("send --to tls://192.0.2.7:1 --pairing-file {file}"), "holds no pairing");
    refused("send --to tls://192.0.2.7:1 --pairing-file /nonexistent", "/nonexistent");
    std::fs::write(&folder, format!("pair-{}", "A".repeat(64))).unwrap();
    refused(&format!("send --to tcp://127.0.0.1:1 --pairing-file {file}"), "tcp://127.0.0.1:1");
    std::fs::remove_file(&folder).unwrap();
}

#[test]
fn links_that_cannot_be_are_explained_before_a_guest_is_started() {
    let pairing = format!("pair-{}", "A".repeat(64));
    for (arguments, expected) in [
        ("send --to carrier-pigeon://host:1", "carrier-pigeon"),
        ("send --to unix:", "no path"),
        ("send --to unix:/run/guest.sock --interface lo", "unix:/run/guest.sock has none"),
        ("receive --listen unix:/run/guest.sock --interface lo", "unix:/run/guest.sock has none"),
        ("receive --listen unix:/proc/guest.sock", "/proc/guest.sock"),
        ("receive --listen file:/nonexistent/guest.save", "/nonexistent/guest.save"),
        ("send --to file:/nonexistent/guest.save", "/nonexistent"),
        ("send --to file:guest.save --verify full", "--verify full"),
        ("receive --listen tls://127.0.0.1:0 --tls-dir /nonexistent", "/nonexistent"),
        ("send --to tls://127.0.0.1:1 --tls-dir /nonexistent", "/nonexistent"),
        (&format!("receive --listen tls://127.0.0.1:0/{pairing}"), "the receiver makes its own"),
        ("send --to tls://127.0.0.1:1/pair-abc", "copy all"),
        ("send --to tls://127.0.0.1:1", "within this host tcp:// needs neither"),
    ] {
        refused(arguments, expected);
    }
}

#[test]
fn a_mistaken_address_is_not_repeated_with_its_secret() {
    let secret = "A".repeat(64);
    for address in
        ["tls://192.0.2.7:7000/pair-A", "tls://192.0.2.7/pair-", "tsl://192.0.2.7:1/pair-", "192.0.2.7:1/pair-"]
    {
        let output = program().args(["send", "--to", &format!("{address}{secret}")]).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && told.contains("192.0.2.7") && !told.contains("AAAA"), "{told}");
    }
}

#[track_caller]
fn refused(arguments: &str, expected: &str) {
    let output = program().args(arguments.split_whitespace()).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && told.contains(expected), "{arguments}: {told}");
}
