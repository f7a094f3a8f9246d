//! What is made from a study, by the program as people call it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

/// A folder for a test, empty.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("report-{name}-{}", std::process::id()));
    // It may not be there.
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

fn bench(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pageferry-bench")).args(arguments).output().expect("the program runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn complained(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn run(mover: &str, turn: u32, seconds: f64) -> Value {
    json!({
        "link": "1gbit", "guest": "idle", "mover": mover, "turn": turn, "end": "completed", "seconds": seconds,
        "downtime_ms": 4.0, "stalls": {"before_ms": 1.0, "during_ms": 9.0, "after_ms": 2.0}, "rounds": 2,
        "remaining": [{"seconds": 0.0, "bytes": 1 << 30, "round": 0}, {"seconds": seconds, "bytes": 0, "round": 1}],
        "wire_bytes": 400_000_000, "source": {"cpu_seconds": 1.0, "peak_rss_bytes": 1 << 30, "beside_guest_bytes": null},
        "destination": {"cpu_seconds": 0.5, "peak_rss_bytes": 1 << 30, "beside_guest_bytes": null},
        "throttle_percent": 0.0, "verified": ["digest"], "stages": [],
    })
}

/// Two runs of ours and of QEMU, in which ours took so many times as long as 4 s.
fn study(slower: f64, kernel: &str) -> Value {
    json!({
        "format": 1, "preset": "tiny", "command": "pageferry-bench harness --preset tiny",
        "machine": {"date": "2026-11-22", "cpu": "a CPU", "cpus": 2, "memory_gib": 24.0, "kernel": kernel,
            "tcp_congestion_control": "bbr", "transparent_huge_pages": "madvise", "load_before": null, "optimised_build": true},
        "links": [{"name": "1gbit", "bits_per_second": 1_000_000_000, "rtt_ms": 0.0, "shaper": "token_bucket",
            "goodputs": [117_000_000.0, 118_000_000.0]}],
        "guests": [{"name": "idle", "bytes": 1 << 30, "content": "zeros", "writes": "idle", "dirty_bytes_per_second": 0,
            "working_set": 0, "runs": true}],
        "movers": [{"name": "ours", "engine": "pageferry", "version": "1", "settings": "as they are"},
            {"name": "qemu-plain", "engine": "qemu", "version": "7", "settings": "as they are"}],
        "runs": [run("ours", 1, 4.0 * slower), run("qemu-plain", 1, 7.0), run("ours", 2, 4.1 * slower),
            run("qemu-plain", 2, 7.1)],
        "notes": [], "interrupted": false,
    })
}

fn kept(folder: &Path, name: &str, study: &Value) -> String {
    let path = folder.join(name);
    std::fs::write(&path, study.to_string()).expect("a study");
    path.to_str().expect("a path in UTF-8").to_owned()
}

#[test]
fn a_kept_study_is_drawn_again_in_every_form() {
    let folder = folder("draw");
    let study = kept(&folder, "study.json", &study(1.0, "6.18"));
    let files = ["report.html", "runs.csv", "summary.svg"].map(|name| folder.join(name).display().to_string());
    let output = bench(&["report", &study, "--html", &files[0], "--csv", &files[1], "--svg", &files[2]]);
    assert!(output.status.success(), "{}", complained(&output));
    assert!(said(&output).contains("4.05 s") && said(&output).contains("7.05 s"), "{}", said(&output));
    let [html, csv, svg] = files.map(|file| std::fs::read_to_string(file).expect("a file"));
    assert!(html.starts_with("<!doctype html>") && html.contains("4.05 s over 1 Gbit/s"));
    assert_eq!((csv.lines().count(), svg.contains("<svg ")), (5, true));
    let found: Value = serde_json::from_slice(&bench(&["report", &study, "--json"]).stdout).expect("JSON");
    assert_eq!(found["groups"][0]["quantities"][0]["median"].as_f64(), Some(4.05));
    assert_eq!((found["better"].as_u64(), found["behind"].as_array().map(Vec::len)), (Some(1), Some(0)));
    std::fs::remove_dir_all(folder).expect("the folder is there");
}

#[test]
fn what_cannot_be_read_or_written_is_told_in_a_line() {
    let folder = folder("errors");
    let study = kept(&folder, "study.json", &study(1.0, "6.18"));
    let newer = kept(&folder, "newer.json", &json!({"format": 999}));
    let other = kept(&folder, "other.json", &json!(["no", "study"]));
    let nowhere = folder.join("nowhere.json").display().to_string();
    let cases: [(&[&str], &str); 6] = [
        (&["report", &nowhere], "cannot read"),
        (&["report", &newer], "form 999"),
        (&["report", &other], "no study"),
        (&["report", &study, "--html", "/dev/full"], "cannot write /dev/full: "),
        (&["compare", &study, &other], "neither a study nor a record"),
        (&["report", &study, "--record", "class"], "--record"),
    ];
    for (arguments, expected) in cases {
        let output = bench(arguments);
        let words = complained(&output);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(words.contains(expected) && words.trim_end().lines().count() == 1, "{arguments:?}: {words}");
    }
    std::fs::remove_dir_all(folder).expect("the folder is there");
}

#[test]
fn comparing_tells_a_change_from_noise_and_one_machine_from_another() {
    let folder = folder("compare");
    let before = kept(&folder, "before.json", &study(1.0, "6.18"));
    let same = kept(&folder, "same.json", &study(1.01, "6.18"));
    let after = kept(&folder, "after.json", &study(2.0, "7.0"));
    let text = said(&bench(&["compare", &before, &same]));
    assert!(text.contains("no change beyond noise") && text.contains("the same machine"), "{text}");
    let text = said(&bench(&["compare", &before, &after]));
    assert!(text.contains("kernel: A 6.18, B 7.0") && text.contains("2.00×") && text.contains("WORSE"), "{text}");
    let found: Value = serde_json::from_slice(&bench(&["compare", &before, &after, "--json"]).stdout).expect("JSON");
    assert_eq!(found["changes"][0]["name"], "1gbit idle ours: total time");
    assert_eq!(found["changes"][0]["noise"], "beyond_noise");
    let mut disturbed = study(2.0, "6.18");
    disturbed["runs"][0]["stolen_share"] = json!(0.3);
    let disturbed = kept(&folder, "disturbed.json", &disturbed);
    let text = said(&bench(&["compare", &before, &disturbed]));
    assert!(text.contains("WORSE  (disturbed: 1 of B)"), "{text}");
    std::fs::remove_dir_all(folder).expect("the folder is there");
}

#[test]
fn records_of_single_benchmarks_compare_too() {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
    let [one, other] =
        ["2026-11-22-2cpu-xeon", "2026-11-22-2cpu-xeon-cubic"].map(|class| results.join(class).display().to_string());
    let text = said(&bench(&["compare", &one, &other]));
    assert!(text.contains("tcp congestion control: A bbr, B cubic") && text.contains("only in A"), "{text}");
    let text = said(&bench(&["compare", &one, &one, "--all"]));
    assert!(text.contains("no change beyond noise") && text.contains("1.00×"), "{text}");
}
