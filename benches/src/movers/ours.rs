//! `migrate send` on one host, `migrate receive` on the other.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::certificates;
use super::{Moved, Mover, Subject, Task};
use crate::network::Side;
use crate::process::{Program, Usage};
use crate::study::{self, Proof, Remaining, Stage, Stalls};
use crate::{BenchError, guest};

const PLAIN: &str = "tcp://";
const QUIC: &str = "quic://";

/// Filling memory, listening, ending: each is a matter of seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Names of threads that are the guest's virtual CPUs.
const VCPUS: &str = "vcpu-";

const PAGE: u64 = 4096;

/// Stages of the encoder, in the order in which a page meets them.
const STAGES: [&str; 6] = ["zero", "unchanged", "pattern", "delta", "duplicate", "packing"];

/// Settings to compare: a name, and what they add to `migrate send` and `migrate receive`. Plain TCP carries it, unless they begin
/// with `tls://` or `quic://`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Setting {
    name: String,
    scheme: String,
    send: Vec<String>,
    receive: Vec<String>,
}

impl FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, arguments) = text.split_once('=').unwrap_or((text, ""));
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(format!("{text:?} is not NAME=ARGUMENTS"));
        }
        let mut words = arguments.split_whitespace().map(str::to_owned).peekable();
        let scheme = words.next_if(|word| word.ends_with("://")).unwrap_or_else(|| PLAIN.to_owned());
        let send = words.by_ref().take_while(|word| word != "--").collect();
        Ok(Self { name: name.to_owned(), scheme, send, receive: words.collect() })
    }
}

/// `migrate` with its settings.
#[derive(Debug)]
pub(crate) struct Ours {
    program: PathBuf,
    setting: Setting,
}

/// The program at this path, or the one beside this program.
pub(crate) fn migrate_program(path: Option<&Path>) -> PathBuf {
    let beside = || std::env::current_exe().map_or_else(|_| "migrate".into(), |own| own.with_file_name("migrate"));
    path.map_or_else(beside, Path::to_owned)
}

pub(super) fn missing_program(program: &Path) -> Vec<String> {
    let missing = || format!("`migrate` at {} (cargo build --release -p migrate)", program.display());
    (!program.is_file()).then(missing).into_iter().collect()
}

impl Ours {
    pub(crate) fn new(program: PathBuf, setting: Setting) -> Self {
        Self { program, setting }
    }

    fn address(&self, address: SocketAddr) -> String {
        format!("{}{address}", self.setting.scheme)
    }

    fn security(&self, task: Task<'_>, side: Side) -> Result<Vec<OsString>, BenchError> {
        if self.setting.scheme == PLAIN {
            return Ok(vec!["--insecure-plaintext".into()]);
        }
        Ok(vec!["--tls-dir".into(), certificates::folder(task.scratch, side)?.into()])
    }

    fn sender(&self, task: Task<'_>) -> Result<Program, BenchError> {
        let mut send = task.network.command(Side::Source, &self.program);
        send.args(["send", "--json", "--on-signal", "--linger", "0s"]);
        send.args(["--to", &self.address(task.network.route())]).args(self.security(task, Side::Source)?);
        send.args(task.subject.arguments()).args(&self.setting.send);
        let mut sender = Program::start("migrate send", send)?;
        sender.wait_for_line(PATIENCE, |line| line.contains("kill -USR1"))?;
        Ok(sender)
    }

    fn receiver(&self, task: Task<'_>) -> Result<Program, BenchError> {
        let mut receive = task.network.command(Side::Destination, &self.program);
        receive.args(["receive", "--json", "--linger", "1s"]);
        receive
            .args(["--listen", &self.address(task.network.destination())])
            .args(self.security(task, Side::Destination)?);
        receive.args(&self.setting.receive);
        let mut receiver = Program::start("migrate receive", receive)?;
        receiver.wait_for_line(PATIENCE, |line| event(line).is_some_and(|event| event["event"] == "listening"))?;
        Ok(receiver)
    }
}

impl Mover for Ours {
    fn name(&self) -> &str {
        &self.setting.name
    }

    fn is_ours(&self) -> bool {
        true
    }

    fn is_over_tcp(&self) -> bool {
        self.setting.scheme != QUIC
    }

    fn facts(&self) -> study::Mover {
        let mut command = Command::new(&self.program);
        command.arg("--version");
        let version = Program::start("migrate", command).and_then(|program| program.output(PATIENCE));
        let Setting { name, scheme, send, receive } = &self.setting;
        let words = [scheme.trim_end_matches("://")].into_iter().chain(send.iter().chain(receive).map(String::as_str));
        study::Mover {
            name: name.clone(),
            engine: study::Engine::Pageferry,
            version: version.map_or_else(|_| "not known".to_owned(), |text| text.trim().to_owned()),
            settings: words.collect::<Vec<_>>().join(" "),
        }
    }

    fn missing(&self, _subjects: &[Subject]) -> Vec<String> {
        missing_program(&self.program)
    }

    fn run(&self, task: Task<'_>) -> Result<Moved, BenchError> {
        // Memory that the destination will get is touched and given back just before: where the host of this
        // host takes back what is not used, a page's first touch is otherwise ten times as slow, sometimes.
        let warmth = guest::prefaulted(task.subject.bytes)?;
        let mut sender = self.sender(task)?;
        drop(warmth);
        let mut receiver = self.receiver(task)?;
        let sent_before = task.network.sent_bytes()?;
        sender.signal(libc::SIGUSR1)?;
        let mut remaining = vec![Remaining { seconds: 0.0, bytes: task.subject.bytes, round: 0 }];
        let report = watch(&mut sender, task.limit, &mut remaining)?;
        let wire_bytes = task.network.sent_bytes()? - sent_before;
        let converged = converged(&report)?;
        let arrived = if converged { receive_report(&mut receiver)? } else { Value::Null };
        Ok(Moved {
            seconds: number(&report, "/total_ms")? / 1e3,
            downtime_ms: number(&report, "/downtime_ms").ok(),
            stalls: stalls(&report, &arrived),
            remaining,
            wire_bytes,
            source: usage(&report, "source"),
            destination: if converged { usage(&arrived, "destination") } else { receiver.usage(VCPUS) },
            rounds: report["rounds"].as_array().map_or(0, |rounds| rounds.len() as u64),
            throttle_percent: number(&report, "/throttle_peak_percent")?,
            guest_bytes_per_second: report["guest_pages_per_second"].as_f64().map(|pages| pages * PAGE as f64),
            in_postcopy: false,
            verified: proofs(&report, &arrived),
            stages: stages(&report)?,
            converged,
        })
    }
}

/// Waits for the source's report, and notes what is still to be sent meanwhile; when time is up, has it cancel.
fn watch(sender: &mut Program, limit: Duration, remaining: &mut Vec<Remaining>) -> Result<Value, BenchError> {
    let deadline = Instant::now() + limit;
    while let Some(line) = sender.line(deadline.saturating_duration_since(Instant::now()))? {
        let Some(event) = event(&line) else { continue };
        if is_report(&event) {
            return Ok(event);
        }
        remaining.extend(still_to_send(&event));
    }
    sender.signal(libc::SIGINT)?;
    report_of(sender)
}

/// What a progress line says of it.
fn still_to_send(event: &Value) -> Option<Remaining> {
    let progress = Some(event).filter(|event| event["event"] == "progress")?;
    Some(Remaining {
        seconds: progress["elapsed_ms"].as_f64()? / 1e3,
        bytes: progress["remaining_pages"].as_u64()? * PAGE,
        round: progress["round"].as_u64()?,
    })
}

fn stalls(source: &Value, destination: &Value) -> Stalls {
    Stalls {
        before_ms: source["guest_stalls_ms"]["before"].as_f64(),
        during_ms: destination["guest_stalls_ms"]["during"].as_f64(),
        after_ms: destination["guest_stalls_ms"]["after"].as_f64(),
    }
}

fn proofs(source: &Value, destination: &Value) -> Vec<Proof> {
    let alive = destination["guest_heartbeats_after"].as_u64().is_some_and(|beats| beats > 0);
    let all = [
        (source["digest_match"] == true, Proof::Digest),
        (alive, Proof::Alive),
        (destination["guest_self_check"] == "ok", Proof::GuestCheck),
    ];
    all.into_iter().filter_map(|(holds, proof)| holds.then_some(proof)).collect()
}

/// What each stage kept off the wire, and what was sent; an error if they do not add up to all that was looked at.
fn stages(report: &Value) -> Result<Vec<Stage>, BenchError> {
    let found = &report["stages"];
    let saved = |name: &str| Some(Stage { name: name.to_owned(), bytes: found[name]["saved_bytes"].as_u64()? });
    let mut all: Vec<Stage> = STAGES.iter().filter_map(|name| saved(name)).collect();
    all.extend(found["packed_bytes"].as_u64().map(|bytes| Stage { name: "sent".to_owned(), bytes }));
    let (sum, covered) = (all.iter().map(|stage| stage.bytes).sum::<u64>(), report["guest_bytes"].as_u64());
    if report["outcome"] == "completed" && !all.is_empty() && Some(sum) != covered {
        return Err(BenchError::Wrong(format!("stages add up to {sum} bytes in {report}")));
    }
    Ok(all)
}

fn report_of(program: &mut Program) -> Result<Value, BenchError> {
    let line = program.wait_for_line(PATIENCE, |line| event(line).is_some_and(|event| is_report(&event)))?;
    Ok(event(&line).unwrap_or_default())
}

/// Whether the guest was moved; an error if it neither was nor ran out of time.
fn converged(report: &Value) -> Result<bool, BenchError> {
    let differs = report["digest_match"] == false || report["full_verify_match"] == false;
    match report["outcome"].as_str() {
        Some("completed") if report["digest_match"] == true && !differs => Ok(true),
        Some("cancelled") if !differs => Ok(false),
        Some("failed") if !differs => Err(failed("migrate send", report)),
        _ => Err(BenchError::Wrong(format!("migrate send reports {report}"))),
    }
}

/// One that failed is no wrong answer: a peer may have died, or a cable.
fn failed(side: &str, report: &Value) -> BenchError {
    let why = report["error"].as_str().unwrap_or("it does not say why");
    BenchError::Tool(format!("{side} failed: {why}"))
}

/// The destination's report, with the guest's own check of its memory.
fn receive_report(receiver: &mut Program) -> Result<Value, BenchError> {
    let report = report_of(receiver)?;
    let check = report["guest_self_check"].as_str().filter(|said| *said != "ok");
    match (check, report["outcome"].as_str()) {
        (Some(_), _) => Err(BenchError::Wrong(format!("migrate receive reports {report}"))),
        (None, Some("completed")) => Ok(report),
        _ => Err(failed("migrate receive", &report)),
    }
}

fn usage(report: &Value, side: &str) -> Usage {
    Usage {
        cpu_seconds: report["cpu_seconds"][side].as_f64().unwrap_or(f64::NAN),
        peak_rss_bytes: report["peak_rss_bytes"][side].as_u64().unwrap_or(0),
        beside_guest_bytes: report["overhead_rss_bytes"][side].as_u64(),
    }
}

fn number(report: &Value, path: &str) -> Result<f64, BenchError> {
    let found = report.pointer(path).and_then(Value::as_f64);
    found.ok_or_else(|| BenchError::Wrong(format!("the report of migrate has no number at {path}")))
}

fn event(line: &str) -> Option<Value> {
    serde_json::from_str(line).ok()
}

fn is_report(event: &Value) -> bool {
    event["event"] == "report"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn settings_have_a_name_and_arguments_for_each_side() {
        let words = |list: &[&str]| list.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let setting: Setting = "off=--compress off --lanes 2 -- --peer-timeout 3s".parse().unwrap();
        assert_eq!(setting.name, "off");
        assert_eq!(setting.send, words(&["--compress", "off", "--lanes", "2"]));
        assert_eq!(setting.receive, words(&["--peer-timeout", "3s"]));
        assert_eq!(setting.scheme, "tcp://");
        let quic: Setting = "quic=quic:// --lanes 2".parse().unwrap();
        assert_eq!((quic.scheme.as_str(), quic.send), ("quic://", words(&["--lanes", "2"])));
        let bare: Setting = "ours".parse().unwrap();
        assert_eq!((bare.name.as_str(), bare.send.len()), ("ours", 0));
        assert!("=--lanes 2".parse::<Setting>().is_err() && "--lanes 2".parse::<Setting>().is_err());
    }

    #[test]
    fn stages_add_up_to_what_was_looked_at() {
        let report = |covered: u64| {
            let stages = json!({"zero": {"saved_bytes": 4096}, "packed_bytes": 8192});
            json!({"outcome": "completed", "guest_bytes": covered, "stages": stages})
        };
        let names = |stages: &[Stage]| stages.iter().map(|stage| stage.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(&stages(&report(12_288)).unwrap()), ["zero", "sent"]);
        assert!(stages(&report(16_384)).is_err());
        assert!(stages(&json!({"outcome": "completed"})).unwrap().is_empty());
    }

    #[test]
    fn a_cancelled_migration_did_not_converge_and_a_failed_one_is_an_error() {
        assert!(converged(&json!({"outcome": "completed", "digest_match": true})).unwrap());
        assert!(!converged(&json!({"outcome": "cancelled"})).unwrap());
        assert!(converged(&json!({"outcome": "completed", "digest_match": null})).is_err());
        let failed = converged(&json!({"outcome": "failed", "error": "no route"})).unwrap_err();
        assert!(matches!(failed, BenchError::Tool(_)) && failed.to_string().contains("no route"), "{failed}");
        for outcome in ["completed", "cancelled", "failed"] {
            let differs = converged(&json!({"outcome": outcome, "digest_match": false})).unwrap_err();
            assert!(matches!(differs, BenchError::Wrong(_)), "{outcome}: {differs}");
        }
    }
}
