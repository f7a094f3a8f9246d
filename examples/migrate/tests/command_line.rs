//! A wrong command line is refused with the reason, and nothing is started.

mod common;

use common::program;

/// Runs the program without `--json`: its exit code, and what it printed.
fn plain(arguments: &str) -> (i32, String, String) {
    let output = program().args(arguments.split_whitespace()).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn a_bad_argument_ends_with_code_2_and_says_what_would_be_right() {
    for (arguments, told) in [
        ("demo --memory lots", "512M"),
        ("demo --downtime-limit 300", "300ms"),
        ("demo --bandwidth fast", "100Mbit/s"),
        ("demo --lanes 0", "1..=128"),
        ("demo --compress best", "auto, off, or a zstd level"),
        ("demo --compress 20", "1 to 19"),
        ("demo --compress -8", "-7 (fastest)"),
        ("demo --encoders 0", "1..=128"),
        ("demo --encoder-nice 20", "0..=19"),
        ("demo --delta-cache much", "512M"),
        ("demo --mix zero=50", "not 100"),
        ("demo --max-throttle 100", "0..=99"),
        ("demo --tracker magic", "auto, kernel, faults"),
        ("demo --rdma-locked-memory some", "512M"),
        ("receive --listen [::]:1 --rdma-pin-all --rdma-locked-memory 8M", "cannot be used with"),
        ("send", "--to"),
        ("send --to nowhere", "192.0.2.7:7000"),
        ("send --to [::1]:1 --initrd x", "--kernel"),
        ("demo --image x --mix zero=100", "cannot be used with"),
        ("send --to [::1]:1 --on-key --on-signal", "cannot be used with"),
        ("receive", "--listen"),
        ("export memory", "<FILE>"),
        ("export dreams /dev/null", "program, memory"),
        ("fly", "subcommand"),
    ] {
        let (code, _, stderr) = plain(arguments);
        assert_eq!(code, 2, "{arguments}: {stderr}");
        assert!(stderr.contains(told), "{arguments}: {stderr}");
    }
}

#[test]
fn help_explains_options_and_exit_codes_with_examples() {
    for command in ["demo", "receive", "send", "save", "restore", "export"] {
        let (code, help, _) = plain(&format!("{command} --help"));
        assert_eq!(code, 0);
        for told in ["Examples:", "Exit codes:", &format!("migrate {command} ")] {
            assert!(help.contains(told), "{command}: no {told:?} in {help}");
        }
        assert_eq!(help.contains("--json"), command != "export", "{help}");
    }
}

#[test]
fn only_the_sides_that_encode_offer_encoding() {
    let options = ["--compress", "--encoders", "--encoder-nice", "--delta-cache", "--no-duplicates"];
    for (command, encodes) in [("demo", true), ("send", true), ("save", true), ("receive", false), ("restore", false)] {
        let (_, help, _) = plain(&format!("{command} --help"));
        assert_eq!(help.contains("\nEncoding:\n"), encodes, "{command}: {help}");
        for option in options {
            assert_eq!(help.contains(option), encodes, "{command} {option}: {help}");
        }
    }
}

#[test]
fn an_address_that_cannot_be_listened_on_ends_with_code_7() {
    let (code, _, stderr) = plain("receive --listen 192.0.2.1:7000");
    assert_eq!(code, 7, "{stderr}");
    assert!(stderr.contains("192.0.2.1:7000"), "{stderr}");
}

#[test]
fn more_memory_than_the_host_has_is_refused_before_any_of_it_is_touched() {
    for kind in common::guest_kinds() {
        let (code, _, stderr) = plain(&format!("demo --guest {kind} --memory 400000G"));
        assert_eq!(code, 7, "{stderr}");
        assert!(stderr.contains("both copies") && stderr.contains("--overcommit"), "{stderr}");
    }
    if common::guest_kinds().contains(&"kvm") {
        let (code, _, stderr) = plain("demo --guest kvm --memory 600G --overcommit");
        assert_eq!(code, 7, "{stderr}");
        assert!(stderr.contains("511 GiB") && !stderr.contains("KVM guest"), "{stderr}");
    }
}

#[test]
fn a_kernel_that_cannot_be_read_is_named() {
    if common::guest_kinds().contains(&"kvm") {
        let (code, _, stderr) = plain("send --to 127.0.0.1:9 --guest kvm --kernel /no/such/kernel");
        assert_eq!(code, 7, "{stderr}");
        assert!(stderr.contains("/no/such/kernel"), "{stderr}");
    }
    let (code, _, stderr) = plain("send --to 127.0.0.1:9 --guest process --kernel /no/such/kernel");
    assert_eq!(code, 7, "{stderr}");
    assert!(stderr.contains("KVM"), "{stderr}");
}
