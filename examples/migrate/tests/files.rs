//! A guest that is saved to a file and restored from it.

mod common;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use common::{Running, guest_kinds, program};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("migrate-files-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self) -> String {
        self.0.join("guest.ferry").display().to_string()
    }

    fn files(&self) -> usize {
        fs::read_dir(&self.0).unwrap().count()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_guest_that_was_saved_goes_on_where_it_was() {
    for kind in guest_kinds() {
        let folder = Folder::new(kind);
        let file = folder.file();
        let save = format!("save {file} --guest {kind} --memory 32M --after 50ms --linger 20ms");
        let saved = Running::start(&save).end();
        let report = saved.report();
        assert_eq!(
            (saved.code, &report["role"], &report["outcome"]),
            (0, &"save".into(), &"completed".into()),
            "{report}"
        );
        assert!(report["downtime_ms"].as_f64().unwrap() > 0.0, "{report}");
        // Twice: the file stays.
        for _ in 0..2 {
            let restored = Running::start(&format!("restore {file} --linger 20ms")).end();
            let report = restored.report();
            assert_eq!((restored.code, &report["role"]), (0, &"restore".into()), "{report}");
            assert_eq!(
                (&report["digest_match"], &report["guest_self_check"]),
                (&true.into(), &"ok".into()),
                "{report}"
            );
            assert!(report["guest_heartbeats_after"].as_u64().unwrap() > 0, "{report}");
        }
        let again = Running::start(&save).end();
        assert_eq!(again.code, 7);
        assert!(again.report()["error"].as_str().unwrap().contains("exists already"), "{}", again.report());
        let replaced = Running::start(&format!("{save} --overwrite --lanes 3 --compress off")).end();
        assert_eq!(replaced.code, 0, "{}", replaced.report());
        let restored = Running::start(&format!("restore {file} --linger 20ms --backing memfd --prefault")).end();
        assert_eq!((restored.code, &restored.report()["guest_self_check"]), (0, &"ok".into()), "{}", restored.report());
        assert_eq!(folder.files(), 1);
    }
}

#[test]
fn a_cancelled_save_leaves_the_guest_running_and_no_file() {
    let folder = Folder::new("cancelled");
    let mut saving = Running::start(&format!(
        "save {} --guest process --memory 64M --mix random=100 --bandwidth 1M/s --after 10ms --linger 20ms",
        folder.file()
    ));
    saving.wait_for("progress");
    saving.interrupt();
    let ended = saving.end();
    let report = ended.report();
    assert_eq!((ended.code, &report["owner"]), (3, &"source".into()), "{report}");
    assert_eq!(report["guest_self_check"], "ok", "{report}");
    assert_eq!(folder.files(), 0);
}

#[test]
fn a_killed_save_leaves_no_file_under_its_name_and_does_not_disturb_the_next() {
    let folder = Folder::new("killed");
    let save =
        format!("save {} --guest process --memory 64M --mix random=100 --after 10ms --linger 20ms", folder.file());
    let mut saving = Running::start(&format!("{save} --bandwidth 1M/s"));
    saving.wait_for("progress");
    saving.kill();
    saving.end();
    assert!(!fs::exists(folder.file()).unwrap());
    assert_eq!(folder.files(), 1, "the unfinished file stays");
    let next = Running::start(&save).end();
    assert_eq!(next.code, 0, "{}", next.report());
    assert_eq!(folder.files(), 1, "and goes with the next");
    assert!(fs::exists(folder.file()).unwrap());
}

#[test]
fn a_save_that_is_killed_at_any_moment_leaves_a_whole_guest_or_none() {
    let folder = Folder::new("moments");
    let mut whole = 0;
    let moments = [0, 10, 20, 30, 40, 50, 60, 70, 80, 100, 130, 160, 200];
    // A loaded machine may need longer for a save that is done.
    let later = std::iter::successors(Some(400), |delay| Some(delay * 2)).take(8);
    for delay in moments.into_iter().chain(later) {
        if whole > 0 && delay > 200 {
            break;
        }
        let file = folder.file();
        let mut saving = Running::start(&format!(
            "save {file} --overwrite --guest process --memory 64M --mix random=100 --on-signal --linger 20ms"
        ));
        saving.wait_for("note");
        saving.wait_for("note");
        saving.signal("-USR1");
        std::thread::sleep(Duration::from_millis(delay));
        saving.kill();
        saving.end();
        if fs::exists(&file).unwrap() {
            whole += 1;
            let restored = Running::start(&format!("restore {file} --linger 20ms")).end();
            let report = restored.report();
            assert_eq!((restored.code, &report["guest_self_check"]), (0, &"ok".into()), "{delay} ms: {report}");
            fs::remove_file(&file).unwrap();
        }
    }
    assert!(whole > 0, "no save was ever done in time");
}

#[test]
fn what_cannot_be_saved_or_restored_is_explained_before_a_guest_is_started() {
    let folder = Folder::new("explained");
    let file = folder.file();
    fs::write(&file, "no guest").unwrap();
    for (arguments, code, expected) in [
        (format!("save {file} --guest process"), 7, "exists already"),
        (format!("save {file}.2 --guest process --verify full"), 7, "--verify full"),
        ("save /nowhere/at/all/guest --guest process".to_owned(), 7, "/nowhere/at/all"),
        (format!("restore {file}"), 7, "no saved guest"),
        (format!("restore {file}.3"), 7, "No such file"),
        ("save".to_owned(), 2, "<FILE>"),
        ("restore".to_owned(), 2, "<FILE>"),
    ] {
        let output = program().args(arguments.split_whitespace()).output().unwrap();
        let told = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(code) && told.contains(expected), "{arguments}: {told}");
    }
}

#[test]
fn a_guest_that_finds_no_room_stays_in_the_file() {
    let folder = Folder::new("room");
    let file = folder.file();
    let saved = Running::start(&format!("save {file} --guest process --memory 32M --after 10ms")).end();
    assert_eq!(saved.code, 0, "{}", saved.report());
    let restored = Running::start(&format!("restore {file} --max-memory 16M --linger 20ms")).end();
    let report = restored.report();
    assert_eq!((restored.code, &report["owner"]), (1, &"file".into()), "{report}");
    assert!(report["error"].as_str().unwrap().contains("--max-memory"), "{report}");
}
