//! Runs the built program and reads what it says.
#![allow(dead_code)] // Each test file uses its part.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use serde_json::Value;

/// A program that says nothing for this long hangs.
const PATIENCE: Duration = Duration::from_secs(120);

/// Kinds of guest that this host can run; says which one it cannot.
pub(crate) fn guest_kinds() -> Vec<&'static str> {
    if std::path::Path::new("/dev/kvm").exists() {
        return vec!["process", "kvm"];
    }
    drop(std::io::Write::write_fmt(
        &mut std::io::stderr(),
        format_args!("skipped: the KVM half of this test, because this host has no /dev/kvm\n"),
    ));
    vec!["process"]
}

/// A run that has ended.
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stderr: String,
    /// Every JSON line.
    pub(crate) lines: Vec<Value>,
}

impl Ended {
    /// The final report: always the last line.
    pub(crate) fn report(&self) -> &Value {
        let last = self.lines.last().unwrap_or_else(|| panic!("no output; standard error: {}", self.stderr));
        assert_eq!(last["event"], "report", "{last}");
        last
    }
}

/// A program that runs.
pub(crate) struct Running {
    child: Child,
    lines: Receiver<Value>,
    heard: Vec<Value>,
}

impl Running {
    /// Starts `migrate` with `--json`; `arguments` are separated by spaces.
    pub(crate) fn start(arguments: &str) -> Self {
        let mut command = program();
        command.args(arguments.split_whitespace());
        Self::of(command)
    }

    /// Starts this command, with `--json`.
    pub(crate) fn of(mut command: Command) -> Self {
        let mut child = command.arg("--json").spawn().unwrap();
        let lines = json_lines(child.stdout.take().unwrap());
        Self { child, lines, heard: Vec::new() }
    }

    /// Starts `migrate receive` on a free port of this machine; says where it listens.
    pub(crate) fn receiver(arguments: &str) -> (Self, String) {
        let mut receiver = Self::start(&format!("receive --listen 127.0.0.1:0 {arguments}"));
        let address = receiver.wait_for("listening")["address"].as_str().unwrap().to_owned();
        (receiver, address)
    }

    /// Waits for an event and returns it.
    pub(crate) fn wait_for(&mut self, event: &str) -> Value {
        loop {
            let line =
                self.lines.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("no {event} after {:?}", self.heard));
            self.heard.push(line.clone());
            if line["event"] == event {
                return line;
            }
        }
    }

    pub(crate) fn interrupt(&self) {
        self.signal("-INT");
    }

    /// Ends it without a chance to say anything.
    pub(crate) fn kill(&self) {
        self.signal("-KILL");
    }

    pub(crate) fn signal(&self, signal: &str) {
        send_signal(signal, self.child.id());
    }

    /// Ends the processes that it has started, without a chance to say anything.
    pub(crate) fn kill_children(&self) {
        let children: Vec<u32> =
            processes().filter(|&(_, parent)| parent == self.child.id()).map(|(id, _)| id).collect();
        assert!(!children.is_empty(), "it has started no process");
        for child in children {
            send_signal("-KILL", child);
        }
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Ended {
        let mut lines = std::mem::take(&mut self.heard);
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            lines.push(line);
        }
        let mut stderr = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = self.child.wait().unwrap().code().unwrap_or(-1);
        Ended { code, stderr, lines }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn send_signal(signal: &str, process: u32) {
    assert!(Command::new("kill").args([signal, &process.to_string()]).status().unwrap().success());
}

/// Every process of this machine with its parent.
fn processes() -> impl Iterator<Item = (u32, u32)> {
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let id = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        // The name before the last parenthesis may hold anything; the state and the parent follow it.
        let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some((id, parent))
    })
}

/// The built program.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_migrate"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

fn json_lines(stdout: ChildStdout) -> Receiver<Value> {
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let value = serde_json::from_str(&line).unwrap_or_else(|_| panic!("not JSON: {line}"));
            if sender.send(value).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Runs a command to its end.
pub(crate) fn run(arguments: &str) -> Ended {
    Running::start(arguments).end()
}

/// The guest is at the source, runs, and every byte of its memory is right.
pub(crate) fn assert_guest_is_well_at_the_source(report: &Value) {
    assert_eq!(report["owner"], "source", "{report}");
    assert_eq!(report["guest_self_check"], "ok", "{report}");
    assert!(report["guest_heartbeats_after"].as_u64().unwrap() > 0, "{report}");
}
