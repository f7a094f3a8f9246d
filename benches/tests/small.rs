//! Every benchmark once, with sizes at which no number means anything: they run to their end, and
//! the answers that they check are right.

use std::process::Command;

use serde_json::Value;

fn run(arguments: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"))
        .args(arguments.split(' '))
        .arg("--json")
        .output()
        .expect("the program starts");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{arguments}: {text}{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{arguments}: {error}: {text}"))
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
    assert_eq!(series(&run("kernels --size 4M --runs 1")).len(), 18);
}
