//! The harness as a whole, with guests so small that no number means anything: its answers are right, and whatever ends it,
//! nothing of it is left behind.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// The exit code that says: this machine cannot measure it.
const LACKING: i32 = 3;

/// The exit code after Ctrl-C.
const INTERRUPTED: i32 = 130;

const PATIENCE: Duration = Duration::from_secs(240);

/// A run of the harness, and its folder.
struct Harness {
    child: Child,
    folder: PathBuf,
    said: std::sync::mpsc::Receiver<String>,
    heard: Vec<String>,
}

fn start(name: &str, arguments: &str, change: impl FnOnce(&mut Command)) -> Harness {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("harness-{name}-{}", std::process::id()));
    let mut command = Command::new(env!("CARGO_BIN_EXE_pageferry-bench"));
    command.arg("harness").args(arguments.split(' '));
    if !arguments.contains("--out") {
        command.arg("--out").arg(&folder);
    }
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    change(&mut command);
    let mut child = command.spawn().expect("the program starts");
    let (tell, said) = std::sync::mpsc::channel();
    let errors = BufReader::new(child.stderr.take().expect("it is piped"));
    std::thread::spawn(move || errors.lines().map_while(Result::ok).try_for_each(|line| tell.send(line)));
    Harness { child, folder, said, heard: Vec::new() }
}

impl Harness {
    fn wait_for(&mut self, words: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.heard.iter().any(|line| line.contains(words)) {
            let left = deadline.saturating_duration_since(Instant::now());
            let line = self.said.recv_timeout(left);
            self.heard.push(line.unwrap_or_else(|_| panic!("it never says {words:?}: {:?}", self.heard)));
        }
    }

    /// Waits for its end; nothing that it has started or made may be left.
    fn end(&mut self) -> (ExitStatus, String) {
        let mut output = String::new();
        self.child.stdout.take().expect("it is piped").read_to_string(&mut output).expect("it is text");
        let status = self.child.wait().expect("it ends");
        self.heard.extend(self.said.iter());
        let id = self.child.id();
        let left = |folder: &str, mark: &str| {
            let names = fs::read_dir(folder).into_iter().flatten().flatten();
            let names = names.map(|entry| entry.file_name().to_string_lossy().into_owned());
            names.filter(|name| name.contains(mark)).collect::<Vec<_>>()
        };
        assert_eq!(left("/run/netns", &format!("pageferry-link-{id}-")), Vec::<String>::new());
        let temporary = std::env::temp_dir();
        assert_eq!(left(&temporary.to_string_lossy(), &format!("pageferry-bench-{id}-")), Vec::<String>::new());
        assert_eq!(children_of(id), Vec::<u32>::new());
        (status, output)
    }

    fn study(&self) -> Value {
        let file = fs::read_dir(&self.folder).expect("there is a folder").flatten().map(|entry| entry.path());
        let path = file.into_iter().find(|path| path.extension().is_some_and(|end| end == "json")).expect("a study");
        serde_json::from_slice(&fs::read(path).expect("it can be read")).expect("it is JSON")
    }

    /// Whether it could run; says so if not.
    fn ran(&self, status: ExitStatus) -> bool {
        if status.code() == Some(LACKING) {
            drop(std::io::stderr().write_fmt(format_args!("skipped: {:?}\n", self.heard)));
        }
        status.code() != Some(LACKING)
    }
}

impl Drop for Harness {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Processes whose parent is this one.
fn children_of(id: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    ids.filter(|process| {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse::<u32>().ok());
        parent == Some(id)
    })
    .collect()
}

fn signal(process: u32, name: &str) {
    let sent = Command::new("kill").args([name, &process.to_string()]).status().expect("there is kill");
    assert!(sent.success());
}

#[test]
fn a_tiny_matrix_has_right_answers() {
    let mut harness = start("tiny", "--test", |_| ());
    let (status, output) = harness.end();
    if !harness.ran(status) {
        return;
    }
    assert!(status.success(), "{output} {:?}", harness.heard);
    let study = harness.study();
    let runs = study["runs"].as_array().expect("runs").len();
    assert!(runs >= 2 && output.contains("ours"), "{output}");
    for extension in ["json", "csv", "html", "svg"] {
        let text =
            fs::read_to_string(harness.folder.join(format!("harness-tiny.{extension}"))).expect("it was written");
        assert!(!text.contains("NaN"), "{extension}");
        if extension == "csv" {
            assert_eq!(text.lines().count(), runs + 1);
        }
    }
}

#[test]
fn without_tools_a_relay_stands_in_for_shaped_links_and_says_so() {
    // An address space in which nothing is installed.
    let mut harness = start("relay", "--test", |command| {
        command.env("PATH", "");
    });
    let (status, output) = harness.end();
    if !harness.ran(status) {
        return;
    }
    assert!(status.success(), "{output} {:?}", harness.heard);
    let study = harness.study();
    assert_eq!(study["links"][0]["shaper"], "relay");
    let notes = study["notes"].to_string();
    assert!(notes.contains("a relay in the harness stood in") && notes.contains("iproute2"), "{notes}");
    assert!(notes.contains("nothing was run beside ours") && notes.contains("qemu-system-x86"), "{notes}");
}

/// Every file of this folder and of those above may be reached by anybody.
fn is_open_to_all(path: &Path) -> bool {
    path.ancestors().skip(1).all(|folder| fs::metadata(folder).is_ok_and(|facts| facts.permissions().mode() & 0o1 != 0))
}

#[test]
fn a_user_who_may_not_use_kvm_is_told_what_to_do() {
    const NOBODY: u32 = 65_534;
    let reachable = is_open_to_all(Path::new(env!("CARGO_BIN_EXE_pageferry-bench")));
    let forbidden = fs::metadata("/dev/kvm").is_ok_and(|facts| facts.permissions().mode() & 0o6 != 0o6);
    // Only root may become somebody else.
    let root = fs::metadata("/proc/self").is_ok_and(|facts| facts.uid() == 0);
    if !reachable || !forbidden || !root {
        let why = format!("program reachable {reachable}, KVM forbidden {forbidden}, started by root {root}");
        drop(std::io::stderr().write_fmt(format_args!("skipped: this needs another user without KVM ({why})\n")));
        return;
    }
    let mut harness = start("nobody", "--test --no-qemu --out /nowhere", |command| {
        command.uid(NOBODY).gid(NOBODY);
    });
    let (status, _) = harness.end();
    let heard = harness.heard.join("\n");
    assert_eq!(status.code(), Some(LACKING), "{heard}");
    assert!(heard.contains("/dev/kvm") && heard.contains("usermod -aG kvm"), "{heard}");
}

#[test]
fn distance_is_added_by_a_relay() {
    let arguments = "--link 500mbit+30ms --guest mix --size 8M --turns 1 --no-qemu";
    let mut harness = start("far", arguments, |_| ());
    let (status, output) = harness.end();
    if !harness.ran(status) {
        return;
    }
    assert!(status.success(), "{output} {:?}", harness.heard);
    let (study, run) = (harness.study(), harness.study()["runs"][0].clone());
    assert_eq!((&study["links"][0]["rtt_ms"], &run["end"]), (&30.0.into(), &"completed".into()));
    // The hand-over alone takes two round trips.
    assert!(run["downtime_ms"].as_f64().is_some_and(|downtime| downtime > 59.0), "{run}");
}

#[test]
fn after_ctrl_c_what_was_measured_is_kept_and_nothing_else() {
    let mut harness =
        start("interrupted", "--link 50mbit --guest mix,random --size 64M --turns 9 --no-qemu --relay", |_| ());
    harness.wait_for("MiB on the wire");
    signal(harness.child.id(), "-INT");
    let (status, _) = harness.end();
    if !harness.ran(status) {
        return;
    }
    assert_eq!(status.code(), Some(INTERRUPTED), "{:?}", harness.heard);
    assert!(harness.heard.iter().any(|line| line.contains("1 run(s) are kept in")), "{:?}", harness.heard);
    let study = harness.study();
    assert_eq!((&study["interrupted"], study["runs"].as_array().map(Vec::len)), (&true.into(), Some(1)));
    assert!(harness.folder.join("harness-custom-interrupted.html").exists());
}

#[test]
fn ctrl_c_before_anything_was_measured_leaves_an_earlier_study_alone() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("harness-earlier-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let earlier = folder.join("harness-custom.json");
    fs::write(&earlier, "an earlier study").expect("it can be written");
    let mut harness = start("earlier", "--link 20mbit --guest random --size 64M --turns 9 --no-qemu --relay", |_| ());
    harness.wait_for("a plain copy gets");
    signal(harness.child.id(), "-INT");
    let (status, _) = harness.end();
    if !harness.ran(status) {
        return;
    }
    assert_eq!(status.code(), Some(INTERRUPTED), "{:?}", harness.heard);
    assert_eq!(fs::read_to_string(&earlier).expect("it is there"), "an earlier study");
    assert_eq!(fs::read_dir(&folder).expect("it is there").count(), 1);
}

#[test]
fn a_peer_that_dies_is_a_failed_run_and_the_others_go_on() {
    let arguments = "--link 50mbit --guest random --size 64M --turns 1 --ours first --ours second --no-qemu --relay";
    let mut harness = start("crashed", arguments, |_| ());
    harness.wait_for("a plain copy gets");
    let deadline = Instant::now() + PATIENCE;
    let receiver = loop {
        let command = |id: &u32| fs::read_to_string(format!("/proc/{id}/cmdline")).unwrap_or_default();
        let found = children_of(harness.child.id()).into_iter().find(|id| command(id).contains("\0receive\0--json"));
        match found {
            Some(receiver) => break receiver,
            None if Instant::now() > deadline || harness.child.try_wait().is_ok_and(|ended| ended.is_some()) => {
                let (status, _) = harness.end();
                assert!(!harness.ran(status), "nobody receives: {:?}", harness.heard);
                return;
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    std::thread::sleep(Duration::from_millis(500));
    signal(receiver, "-KILL");
    let (status, output) = harness.end();
    assert!(status.success(), "{output} {:?}", harness.heard);
    let study = harness.study();
    assert!(study["runs"][0]["end"]["failed"].is_string(), "{}", study["runs"][0]["end"]);
    assert_eq!(study["runs"][1]["end"], "completed", "{:?}", harness.heard);
}

#[test]
fn a_folder_that_cannot_be_written_is_told_before_anything_runs() {
    let mut harness = start("full", "--test --out /dev/full/here", |_| ());
    let (status, _) = harness.end();
    if !harness.ran(status) {
        return;
    }
    let said = harness.heard.join(" ");
    assert!(!status.success() && said.contains("cannot write") && said.contains("/dev/full/here"), "{said}");
}

#[test]
fn a_full_disk_loses_no_measurement_silently() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("harness-tmpfs-{}", std::process::id()));
    fs::create_dir_all(&folder).expect("a folder");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4k", "tmpfs"]).arg(&folder).status();
    if !mounted.is_ok_and(|status| status.success()) {
        drop(std::io::stderr().write_all(b"skipped: no file system can be mounted here\n"));
        return;
    }
    let filled = fs::write(folder.join("filler"), [7; 4096]);
    let arguments =
        format!("--link 500mbit --guest mix --size 8M --turns 1 --no-qemu --relay --out {}", folder.display());
    let mut harness = start("tmpfs", &arguments, |_| ());
    let (status, _) = harness.end();
    let unmounted = Command::new("umount").arg(&folder).status();
    let _ = fs::remove_dir_all(&folder);
    assert!(filled.is_ok() && unmounted.is_ok_and(|status| status.success()));
    if !harness.ran(status) {
        return;
    }
    let said = harness.heard.join(" ");
    assert_eq!(status.code(), Some(1), "{said}");
    assert!(said.contains("warning: cannot write") && said.contains("No space left on device"), "{said}");
    // The table is all that is left of it.
    assert!(said.contains("downtime") && said.contains("mix"), "{said}");
}
