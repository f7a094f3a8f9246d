//! A guest made of a memory image: what the file holds arrives, and what it leaves out is not sent.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use common::{Ended, program, run};

const MIB: u64 = 1 << 20;
const SHORT: &str = "--after 20ms --linger 20ms";

/// A file of its own for each test.
fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
}

/// A sparse image of this many bytes with content at these offsets.
fn image(name: &str, bytes: u64, content: &[(u64, &[u8])]) -> PathBuf {
    let path = path(name);
    let file = File::create(&path).unwrap();
    file.set_len(bytes).unwrap();
    for (offset, bytes) in content {
        file.write_all_at(bytes, *offset).unwrap();
    }
    path
}

fn demo(image: &PathBuf, options: &str) -> Ended {
    let ended = run(&format!("demo {SHORT} --image {} {options}", image.display()));
    drop(std::fs::remove_file(image));
    ended
}

fn assert_proven(ended: &Ended, pages: u64) {
    let report = ended.lines.last().unwrap_or_else(|| panic!("{}", ended.stderr));
    assert_eq!((ended.code, &report["outcome"]), (0, &"completed".into()), "{report}");
    assert_eq!((&report["digest_match"], &report["guest_self_check"]), (&true.into(), &"ok".into()), "{report}");
    assert_eq!((&report["pages_total"], &report["guest_pages_checked"]), (&pages.into(), &pages.into()), "{report}");
}

fn refusal(arguments: &str) -> String {
    let output = program().args(arguments.split_whitespace()).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(7), "{arguments}: {told}");
    told
}

#[test]
fn an_image_of_odd_length_arrives_in_memory_rounded_up_to_2_mib() {
    let text: Vec<u8> = (0..3 * MIB + 4097).map(|at| ((at * at) >> 9) as u8 | 1).collect();
    let ended = demo(&image("odd", 3 * MIB + 4097, &[(0, &text)]), "--vcpus 3 --verify full");
    assert_proven(&ended, 1024);
    assert_eq!(ended.report()["full_verify_match"], true);
    let first = &ended.report()["rounds"][0];
    assert!(first["pages"].as_u64().unwrap() - first["zero_pages"].as_u64().unwrap() >= 770, "{first}");
}

#[test]
fn what_a_sparse_image_leaves_out_and_memory_past_its_end_is_not_sent() {
    let content: [(u64, &[u8]); 3] = [(0, b"first"), (20 * MIB + 7, b"middle"), (64 * MIB - 1, b"!")];
    let ended = demo(&image("sparse", 64 * MIB, &content), "--memory 128M");
    assert_proven(&ended, 32768);
    // Where the host backs memory by huge pages, each touched page brings 511 more.
    assert!(ended.report()["rounds"][0]["pages"].as_u64().unwrap() <= 3 * 512, "{}", ended.report());
}

#[test]
fn zero_pages_of_an_image_are_touched_on_demand() {
    let ended = demo(&image("touched", 4 * MIB, &[(MIB, b"content")]), "--touch-zero --memory 8M");
    assert_proven(&ended, 2048);
    let first = &ended.report()["rounds"][0];
    assert_eq!((&first["pages"], &first["zero_pages"]), (&2048.into(), &2047.into()), "{first}");
}

#[test]
fn a_file_that_holds_no_image_is_refused_by_name() {
    let empty = image("empty", 0, &[]);
    let folder = env!("CARGO_TARGET_TMPDIR");
    for file in ["/no/such/image", empty.to_str().unwrap(), folder] {
        let told = refusal(&format!("send --to 127.0.0.1:9 --image {file}"));
        assert!(told.contains(file), "{told}");
    }
    assert!(refusal(&format!("demo --image {}", empty.display())).contains("empty"));
    std::fs::remove_file(empty).unwrap();
}

#[test]
fn memory_smaller_than_the_image_is_refused() {
    let large = image("large", 2 * MIB + 1, &[]);
    let told = refusal(&format!("demo --image {} --memory 2M", large.display()));
    assert!(told.contains("--memory 2 MiB"), "{told}");
    std::fs::remove_file(large).unwrap();
}

#[test]
fn an_image_without_its_cpus_is_not_run_by_a_machine() {
    for machine in ["--guest kvm", "--kernel vmlinux"] {
        let told = refusal(&format!("send --to 127.0.0.1:9 --image x {machine}"));
        assert!(told.contains(&format!("leave out {machine}").replace(" vmlinux", "")), "{told}");
    }
}
