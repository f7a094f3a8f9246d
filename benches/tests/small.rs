//! Every benchmark once, with sizes at which no number means anything: they run to their end, and
//! the answers that they check are right.

use std::io::Write;
use std::process::{Command, Stdio};

use serde_json::Value;

/// The exit code that says: this machine cannot measure it.
const LACKING: i32 = 3;

fn run(arguments: &str) -> Value {
    run_if_possible(arguments).unwrap_or_else(|| panic!("{arguments}: this machine lacks something"))
}

/// `None`, with a printed reason, where the machine lacks what it takes.
fn run_if_possible(arguments: &str) -> Option<Value> {
    let program = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"))
        .args(arguments.split(' '))
        .arg("--json")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let id = program.id();
    let output = program.wait_with_output().expect("the program ends");
    assert_eq!(network_namespaces_of(id), Vec::<String>::new(), "{arguments}");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(LACKING) {
        drop(std::io::stderr().write_fmt(format_args!("skipped: {arguments}: {errors}")));
        return None;
    }
    assert!(output.status.success(), "{arguments}: {text}{errors}");
    Some(serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments}: {error}: {text}")))
}

fn network_namespaces_of(process: u32) -> Vec<String> {
    let all = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
    let names = all.map(|entry| entry.file_name().to_string_lossy().into_owned());
    names.filter(|name| name.contains(&format!("-{process}-"))).collect()
}

/// Names of the series, each of which must have a value from every run.
fn series(found: &Value) -> Vec<String> {
    let all = found["series"].as_array().expect("series");
    assert!(all.iter().all(|series| series["median"].as_f64().is_some_and(f64::is_finite)), "{found}");
    all.iter().filter_map(|series| series["name"].as_str().map(str::to_owned)).collect()
}

#[test]
fn migrations_and_plain_copies_arrive_intact() {
    let found = run("throughput --size 9M --runs 1 --lanes 2");
    let names = series(&found);
    for name in ["plain copy: throughput", "guest paused: throughput", "guest running idle: CPU, destination"] {
        assert!(names.iter().any(|found| found == name), "{name} is not in {names:?}");
    }
    assert!(found["machine"]["kernel"].is_string());
}

#[test]
fn zeros_and_holes_are_not_sent() {
    assert_eq!(series(&run("zero --size 8M --runs 1")).len(), 2);
    assert_eq!(series(&run("holes --size 4G --runs 1")).len(), 2);
}

#[test]
fn an_image_is_taken_apart() {
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("image-{}", std::process::id()));
    std::fs::write(&path, [[0; 4096], [1; 4096], [1; 4096], [2; 4096]].concat()).expect("an image");
    let found = run(&format!("image {}", path.display()));
    std::fs::remove_file(path).expect("the image is there");
    let figure =
        |name: &str| found["figures"].as_array()?.iter().find(|figure| figure["name"] == name)?["value"].as_f64();
    assert_eq!(figure("zero pages"), Some(25.0), "{found}");
    assert_eq!(figure("duplicates of an earlier page"), Some(25.0), "{found}");
}

#[test]
fn harvests_and_kernels_give_right_answers() {
    assert_eq!(series(&run("harvest --size 1G --regions 3 --runs 1")).len(), 1);
    assert_eq!(series(&run("kernels --size 4M --runs 1")).len(), 22);
}

#[test]
fn guests_move_over_a_shaped_link_and_nothing_of_it_is_left() {
    let ours = "link --rate 500mbit --guest mix --size 32M --runs 1 --goodput-seconds 1";
    let Some(found) = run_if_possible(ours) else { return };
    assert!(series(&found).iter().any(|name| name == "500mbit mix ours: wire"), "{found}");
    let Some(found) = run_if_possible(&format!("{ours} --qemu multifd-2-zstd")) else { return };
    let names = series(&found);
    assert!(names.iter().any(|name| name == "500mbit mix qemu-multifd-2-zstd: wire"), "{names:?}");
}
