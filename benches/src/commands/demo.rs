//! `migrate demo` as a measuring instrument: a real KVM guest moves between two processes, and the
//! program's own report says what it took.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Args;
use serde_json::Value;

use crate::{BenchError, host};

#[derive(Args, Debug)]
pub(super) struct DemoOptions {
    /// Virtual CPUs of the KVM guest
    #[arg(long, default_value = "2")]
    pub(super) vcpus: u32,
    /// The `migrate` program; without it, the one beside this program
    #[arg(long, value_name = "FILE")]
    migrate: Option<PathBuf>,
}

/// The program, and the part of its arguments that all runs share.
pub(super) struct Demo {
    program: PathBuf,
    guest: Vec<String>,
}

impl Demo {
    /// An idle KVM guest of this size; `Skipped` where it cannot be had.
    pub(super) fn new(options: &DemoOptions, bytes: u64, mix: Option<&str>) -> Result<Self, BenchError> {
        if !Path::new("/dev/kvm").exists() {
            return Err(BenchError::Skipped("this machine has no /dev/kvm".to_owned()));
        }
        let beside = || std::env::current_exe().ok().map(|own| own.with_file_name("migrate"));
        let program = match options.migrate.clone().or_else(beside) {
            Some(program) if program.exists() => program,
            _ => {
                return Err(BenchError::Skipped("`migrate` is not built: cargo build --release -p migrate".to_owned()));
            }
        };
        let text = format!("demo --json --guest kvm --idle --prefault --memory {bytes} --vcpus {}", options.vcpus);
        let mut guest: Vec<String> = text.split(' ').map(str::to_owned).collect();
        if let Some(mix) = mix {
            guest.extend(["--mix".to_owned(), mix.to_owned()]);
        }
        Ok(Self { program, guest })
    }

    /// One migration; its final report, with the guest's own proof checked.
    pub(super) fn run(&self) -> Result<Value, BenchError> {
        let output = Command::new(&self.program).args(&self.guest).output().map_err(host("cannot start migrate"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let report: Value = text.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
        let found = ["outcome", "guest_self_check"].map(|key| report.get(key).and_then(Value::as_str));
        if found == ["completed", "ok"].map(Some) && report.get("digest_match") == Some(&Value::Bool(true)) {
            return Ok(report);
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        Err(BenchError::Wrong(format!("migrate demo ended with {found:?}: {errors}{text}")))
    }
}

/// A number in a report.
pub(super) fn number(report: &Value, path: &str) -> Result<f64, BenchError> {
    let found = report.pointer(path).and_then(Value::as_f64);
    found.ok_or_else(|| BenchError::Wrong(format!("the report of migrate has no number at {path}")))
}

/// The same number of every report.
pub(super) fn column(reports: &[Value], path: &str) -> Result<Vec<f64>, BenchError> {
    reports.iter().map(|report| number(report, path)).collect()
}

/// Seconds that all rounds took together.
pub(super) fn round_seconds(report: &Value) -> Result<f64, BenchError> {
    let rounds = report.get("rounds").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let spent = rounds.iter().map(|round| number(round, "/duration_ms")).sum::<Result<f64, _>>()?;
    Ok(spent / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_or_missed_by_name() {
        let report = serde_json::json!({"a": {"b": 2.5}, "rounds": [{"duration_ms": 500}, {"duration_ms": 250.0}]});
        assert!((number(&report, "/a/b").unwrap() - 2.5).abs() < 1e-9);
        assert!((round_seconds(&report).unwrap() - 0.75).abs() < 1e-9);
        assert!(number(&report, "/a/c").unwrap_err().to_string().contains("/a/c"));
    }
}
