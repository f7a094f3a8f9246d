//! Each kind of link that an address can ask for.

mod common;

use common::{Running, program};

#[test]
fn a_guest_moves_over_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("migrate-links-{}.sock", std::process::id()));
    let address = format!("unix:{}", path.display());
    let mut receiver = Running::start(&format!("receive --listen {address} --linger 20ms"));
    assert_eq!(receiver.wait_for("listening")["address"], *address);
    let sender = Running::start(&format!(
        "send --guest process --to {address} --memory 32M --after 50ms --linger 20ms --lanes 2 --verify full"
    ));
    let (sent, arrived) = (sender.end(), receiver.end());
    let report = sent.report();
    assert_eq!((sent.code, &report["outcome"]), (0, &"completed".into()), "{report}");
    assert_eq!((&report["digest_match"], &report["full_verify_match"]), (&true.into(), &true.into()), "{report}");
    assert_eq!((arrived.code, &arrived.report()["guest_self_check"]), (0, &"ok".into()), "{}", arrived.report());
    assert!(!path.exists(), "the socket goes with its listener");
}

#[test]
fn links_that_cannot_be_are_explained_before_a_guest_is_started() {
    for (arguments, expected) in [
        ("send --to quic://host:1", "quic"),
        ("send --to unix:", "no path"),
        ("send --to unix:/run/guest.sock --interface lo", "unix:/run/guest.sock has none"),
        ("receive --listen unix:/run/guest.sock --interface lo", "unix:/run/guest.sock has none"),
        ("receive --listen unix:/proc/guest.sock", "/proc/guest.sock"),
    ] {
        let output = program().args(arguments.split_whitespace()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && told.contains(expected), "{arguments}: {told}");
    }
}
