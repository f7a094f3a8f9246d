//! `migrate demo` moves a guest that keeps writing, proves it, and tells the whole truth in one object.

mod common;

use common::{Running, assert_guest_is_well_at_the_source, guest_kinds, program, run};
use serde_json::Value;

const SMALL: &str = "--memory 64M --after 200ms --linger 200ms";

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is not a number"))
}

fn assert_proven(report: &Value) {
    assert_eq!((&report["outcome"], &report["owner"]), (&"completed".into(), &"destination".into()), "{report}");
    assert_eq!(report["error"], Value::Null, "{report}");
    assert_eq!(report["digest_match"], true, "{report}");
    assert_eq!(report["guest_self_check"], "ok", "{report}");
    assert!(report["guest_heartbeats_after"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn a_guest_that_keeps_writing_arrives_whole() {
    for kind in guest_kinds() {
        let ended = run(&format!("demo --guest {kind} {SMALL}"));
        assert_eq!(ended.code, 0, "{kind}: {}", ended.stderr);
        assert_proven(ended.report());
        assert_eq!(ended.report()["full_verify_match"], Value::Null);
    }
}

#[test]
fn whole_pages_at_full_speed_over_several_lanes_arrive_whole() {
    for kind in guest_kinds() {
        let load = "--writes full --rate max --working-set 8M --lanes 3 --vcpus 3 --verify full --downtime-limit 2s";
        let ended = run(&format!("demo --guest {kind} {SMALL} {load}"));
        assert_eq!(ended.code, 0, "{kind}: {}", ended.stderr);
        assert_proven(ended.report());
        assert_eq!(ended.report()["full_verify_match"], true, "{kind}");
    }
}

#[test]
fn a_process_guest_arrives_whole_whoever_tracks_its_writes() {
    let load = "--writes full --rate max --working-set 8M --lanes 2 --verify full --downtime-limit 2s";
    for tracker in ["auto", "faults"] {
        for load in ["--rate 50M/s", load] {
            let ended = run(&format!("demo --guest process --tracker {tracker} {SMALL} {load}"));
            assert_eq!(ended.code, 0, "{tracker}: {}", ended.stderr);
            assert_proven(ended.report());
        }
    }
}

#[test]
fn a_guest_whose_faults_were_tracked_goes_on_where_it_was() {
    let ended =
        run(&format!("demo --guest process --tracker faults {SMALL} --rate max --timeout 100ms --bandwidth 10Mbit/s"));
    assert_ne!(ended.code, 0);
    assert_guest_is_well_at_the_source(ended.report());
}

#[test]
fn the_report_is_complete_and_its_numbers_agree() {
    let ended = run(&format!("demo --guest process {SMALL}"));
    let report = ended.report();
    let parts = report["downtime_parts_ms"].as_object().unwrap();
    assert_eq!(parts.len(), 7);
    let sum: f64 = parts.values().map(number).sum();
    assert!((sum - number(&report["downtime_ms"])).abs() < 0.001, "{report}");
    assert!(number(&report["total_ms"]) >= number(&report["downtime_ms"]), "{report}");
    assert!(number(&report["guest_longest_stall_ms"]) > 0.0, "{report}");
    assert!(number(&report["guest_pages_per_second"]) > 0.0, "{report}");

    let rounds = report["rounds"].as_array().unwrap();
    let count = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{value} is not a count"));
    let total = |field: &str| rounds.iter().map(|round| count(&round[field])).sum::<u64>();
    assert!(rounds.len() >= 2 && rounds.last().unwrap()["stopped"] == true, "{report}");
    assert_eq!(count(&report["pages_total"]), 16384);
    let unchanged = count(&report["stages"]["unchanged"]["pages"]);
    assert_eq!(count(&report["pages_sent"]) + count(&report["pages_zero"]) + unchanged, total("pages"), "{report}");
    assert_eq!(count(&report["pages_zero"]), total("zero_pages"), "{report}");
    assert!(count(&report["wire_bytes"]) >= total("wire_bytes"), "{report}");
    // Tracked by faults, as on kernels before Linux 6.7, a guest's memory is mapped twice at the source.
    let by_faults = ended.lines.iter().any(|line| line["text"].as_str().is_some_and(|text| text.contains("by faults")));
    for side in ["source", "destination"] {
        assert!(number(&report["cpu_seconds"][side]) > 0.0, "{report}");
        assert!(number(&report["cpu_seconds_per_gib"][side]) > number(&report["cpu_seconds"][side]), "{report}");
        assert!(number(&report["peak_rss_bytes"][side]) > 1e6, "{report}");
        let guest = number(&report["peak_rss_bytes"][side]) - number(&report["overhead_rss_bytes"][side]);
        let most = if by_faults && side == "source" { 128 << 20 } else { 64 << 20 };
        assert!((1e6..=f64::from(most)).contains(&guest), "{report}");
    }
}

const STAGES: [&str; 6] = ["zero", "unchanged", "pattern", "delta", "duplicate", "packing"];

fn saved(stages: &Value, stage: &str) -> u64 {
    stages[stage]["saved_bytes"].as_u64().unwrap_or_else(|| panic!("no {stage} in {stages}"))
}

#[test]
fn the_report_tells_what_each_stage_saved_and_it_adds_up_to_the_guests_memory() {
    let ended = run(&format!("demo --guest process {SMALL} --compress 1 --encoders 2 --encoder-nice 5"));
    let report = ended.report();
    assert_proven(report);
    let rounds = report["rounds"].as_array().unwrap().iter().map(|round| (&round["stages"], &round["bytes"]));
    for (stages, bytes) in rounds.chain([(&report["stages"], &report["guest_bytes"])]) {
        assert_eq!(&stages["guest_bytes"], bytes, "{stages}");
        let kept_off: u64 = STAGES.iter().map(|stage| saved(stages, stage)).sum();
        let packed = stages["packed_bytes"].as_u64().unwrap();
        assert_eq!(kept_off + packed, bytes.as_u64().unwrap(), "{stages}");
    }
    let stages = &report["stages"];
    let frames = number(&stages["packed_bytes"]) + number(&stages["head_bytes"]);
    assert!(number(&report["wire_bytes"]) > frames && frames > 0.0, "{report}");
    // The guest's mix: every tenth page is a duplicate, four of ten are text.
    for stage in ["duplicate", "packing"] {
        assert!(saved(stages, stage) > 1 << 20, "{stage}: {stages}");
    }
    assert!(number(&stages["encoder_ms"]["scan"]) > 0.0 && number(&stages["encoder_ms"]["pack"]) > 0.0, "{stages}");
}

#[test]
fn with_all_stages_off_pages_with_content_are_sent_whole() {
    let off = "--compress off --delta-cache 0 --no-duplicates";
    let ended = run(&format!("demo --guest process {SMALL} {off}"));
    let report = ended.report();
    assert_proven(report);
    let stages = &report["stages"];
    for stage in ["delta", "duplicate", "packing"] {
        assert_eq!(saved(stages, stage), 0, "{stages}");
    }
    let pages = |stage: &str| stages[stage]["pages"].as_u64().unwrap();
    assert_eq!((pages("delta"), pages("duplicate")), (0, 0), "{stages}");
    let (literal, sent) = (stages["literal_pages"].as_u64().unwrap(), report["pages_sent"].as_u64().unwrap());
    assert_eq!(literal + pages("pattern"), sent, "{report}");
    assert_eq!(stages["packed_bytes"], literal * 4096 + pages("pattern") * 8, "{stages}");
    assert!(literal > 16384 / 2, "{stages}");
}

#[test]
fn progress_comes_as_json_lines_before_the_report() {
    let ended = run(&format!("demo --guest process {SMALL} --bandwidth 40M/s"));
    let events: Vec<&str> = ended.lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    for event in ["note", "accepted", "progress", "round", "paused", "handed_over", "report"] {
        assert!(events.contains(&event), "no {event} in {events:?}");
    }
    assert_eq!(events.iter().filter(|&&event| event == "report").count(), 1);
}

#[test]
fn a_bandwidth_cap_holds_over_all_lanes_together() {
    let ended = run(&format!("demo --guest process {SMALL} --idle --lanes 4 --bandwidth 30M/s"));
    let report = ended.report();
    assert_proven(report);
    let seconds = number(&report["total_ms"]) / 1e3;
    // Twice the cap: never a limit on the machine's speed, only on the program's greed.
    assert!(number(&report["wire_bytes"]) / seconds < 60.0 * 1024.0 * 1024.0, "{report}");
}

#[test]
fn people_get_tables_the_downtime_and_the_proof_without_colours() {
    let output = program().args(["demo", "--guest", "process"]).args(SMALL.split(' ')).output().unwrap();
    let (text, notes) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(text.ends_with("16384 pages identical, guest self-check OK\n"), "{text}");
    for part in ["\nstage ", "\nduplicate ", "\n= sent ", "\nencoding ", "\ndowntime ", "\ncost "] {
        assert!(text.starts_with("round ") && text.contains(part), "no {part:?} in {text}");
    }
    assert!(notes.contains("process guest: 64 MiB, 2 vCPUs"), "{notes}");
    assert!(!text.contains('\x1b') && !notes.contains('\x1b'));
}

#[test]
fn a_destination_that_dies_with_the_guest_is_no_success() {
    for kind in guest_kinds() {
        let mut demo = Running::start(&format!("demo --guest {kind} --memory 32M --after 50ms --linger 60s"));
        demo.wait_for("handed_over");
        demo.kill_children();
        let ended = demo.end();
        assert_eq!(ended.code, 6, "{kind}: {:?}", ended.lines.last());
        assert_eq!(ended.report()["outcome"], "failed", "{kind}");
        assert!(ended.report()["error"].as_str().unwrap().contains("destination"), "{kind}");
    }
}

#[test]
fn a_link_that_cannot_be_opened_leaves_the_guest_where_it_is() {
    for link in ["--interface nosuch0", "--bind 203.0.113.99"] {
        let ended = run(&format!("demo --guest process {SMALL} {link}"));
        assert_eq!(ended.code, 1, "{link}: {:?}", ended.lines.last());
        assert_guest_is_well_at_the_source(ended.report());
    }
}

#[test]
fn an_interrupt_before_the_guest_is_ready_ends_the_program() {
    for kind in guest_kinds() {
        let mut demo = Running::start(&format!("demo --guest {kind} --memory 512M --after 1h"));
        demo.wait_for("note");
        demo.interrupt();
        assert_eq!(demo.end().code, 3, "{kind}");
    }
}

#[test]
fn memory_that_a_guest_never_touched_is_not_sent() {
    let ended = run("demo --guest process --memory 256M --mix zero=100 --idle --after 50ms --linger 50ms");
    assert_proven(ended.report());
    let first = &ended.report()["rounds"][0];
    assert!(first["pages"].as_u64().unwrap() < 65536 / 8, "{first}");
}
