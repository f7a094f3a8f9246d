//! A program that this one starts: it ends with its owner, whatever happens, and says what it has cost.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{env, fs};

use crate::{BenchError, host, interrupt, sys};

/// Between two looks whether the operator wants to end.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Of what a program says on standard error, this much is kept for the message of a failure.
const MOST_ERRORS: u64 = 16 << 10;

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Program {
    name: &'static str,
    child: Child,
    lines: Receiver<String>,
    errors: Option<JoinHandle<String>>,
}

/// What a process has cost so far.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct Usage {
    /// User and system time of all threads but a machine's virtual CPUs.
    pub(crate) cpu_seconds: f64,
    /// The most memory it ever had resident.
    pub(crate) peak_rss_bytes: u64,
    /// The part of that which is not the guest's, if the program says so.
    pub(crate) beside_guest_bytes: Option<u64>,
}

impl Program {
    /// Whether a program can be found.
    pub(crate) fn is_installed(name: &str) -> bool {
        env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(name).is_file())
    }

    /// Starts it, without an input.
    pub(crate) fn start(name: &'static str, mut command: Command) -> Result<Self, BenchError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        sys::end_with_parent(&mut command);
        let mut child = command.spawn().map_err(|error| BenchError::Tool(format!("cannot start {name}: {error}")))?;
        let (sender, lines) = channel();
        if let Some(output) = child.stdout.take() {
            std::thread::spawn(move || {
                let read = BufReader::new(output).lines().map_while(Result::ok);
                read.for_each(|line| drop(sender.send(line)));
            });
        }
        let errors = child.stderr.take().map(|errors| std::thread::spawn(move || keep_start(errors)));
        Ok(Self { name, child, lines, errors })
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// The next line of its output; `None` when there was none for so long.
    pub(crate) fn line(&mut self, patience: Duration) -> Result<Option<String>, BenchError> {
        let deadline = Instant::now() + patience;
        loop {
            interrupt::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(LOOK_UP)) {
                Ok(line) => return Ok(Some(line)),
                Err(RecvTimeoutError::Disconnected) => return Err(self.ended()),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// The first line that is wanted; an error when it does not come in time.
    pub(crate) fn wait_for_line(
        &mut self,
        patience: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<String, BenchError> {
        let deadline = Instant::now() + patience;
        loop {
            match self.line(deadline.saturating_duration_since(Instant::now()))? {
                Some(line) if wanted(&line) => return Ok(line),
                Some(_) => {}
                None => {
                    return Err(BenchError::Tool(format!(
                        "{} did not say in {patience:?} what was waited for",
                        self.name
                    )));
                }
            }
        }
    }

    /// Everything it prints until it ends, whatever its status.
    pub(crate) fn output(mut self, patience: Duration) -> Result<String, BenchError> {
        let deadline = Instant::now() + patience;
        let mut text = String::new();
        loop {
            match self.line(deadline.saturating_duration_since(Instant::now())) {
                Ok(Some(line)) => text = text + &line + "\n",
                Ok(None) => return Err(BenchError::Tool(format!("{} did not end in {patience:?}", self.name))),
                Err(BenchError::Ended { .. }) if !text.is_empty() => return Ok(text),
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn signal(&self, signal: libc::c_int) -> Result<(), BenchError> {
        sys::signal(self.child.id(), signal).map_err(host("cannot signal a program"))
    }

    /// What it has cost so far; virtual CPUs are threads with `vcpu_mark` in their name.
    pub(crate) fn usage(&self, vcpu_mark: &str) -> Usage {
        let folder = format!("/proc/{}", self.id());
        let threads = fs::read_dir(format!("{folder}/task")).into_iter().flatten().flatten();
        let guest: f64 = threads.filter_map(|thread| thread_seconds(&thread.path(), vcpu_mark)).sum();
        let status = fs::read_to_string(format!("{folder}/status")).unwrap_or_default();
        Usage {
            cpu_seconds: (stat_seconds(&folder) - guest).max(0.0),
            peak_rss_bytes: peak_rss(&status),
            beside_guest_bytes: None,
        }
    }

    /// Thread ids of those with `mark` in their names.
    pub(crate) fn threads(&self, mark: &str) -> Vec<u32> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.id())).into_iter().flatten().flatten();
        let named = threads
            .filter(|thread| fs::read_to_string(thread.path().join("comm")).is_ok_and(|name| name.contains(mark)));
        named.filter_map(|thread| thread.file_name().to_string_lossy().parse().ok()).collect()
    }

    /// An error that says how it ended, if it has.
    pub(crate) fn check(&mut self) -> Result<(), BenchError> {
        if matches!(self.child.try_wait(), Ok(Some(_))) { Err(self.ended()) } else { Ok(()) }
    }

    fn ended(&mut self) -> BenchError {
        let status = self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string());
        let errors = self.errors.take().and_then(|errors| errors.join().ok()).unwrap_or_default();
        BenchError::Ended { name: self.name, status, errors: errors.trim().to_owned() }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The start of what a program says; the rest is read and forgotten, so that it never waits.
fn keep_start(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    let _ = from.by_ref().take(MOST_ERRORS).read_to_end(&mut kept);
    let _ = std::io::copy(&mut from, &mut std::io::sink());
    String::from_utf8_lossy(&kept).into_owned()
}

fn thread_seconds(thread: &std::path::Path, mark: &str) -> Option<f64> {
    let name = fs::read_to_string(thread.join("comm")).ok()?;
    name.contains(mark).then(|| stat_seconds(&thread.to_string_lossy()))
}

fn stat_seconds(folder: &str) -> f64 {
    let stat = fs::read_to_string(format!("{folder}/stat")).unwrap_or_default();
    ticks(&stat).unwrap_or(0) as f64 / sys::ticks_per_second()
}

/// User and system time, fields 14 and 15 of proc(5)'s `stat`; the name before them may contain anything.
fn ticks(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

fn peak_rss(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).map_or(0, |kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Program {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        Program::start("sh", command).unwrap()
    }

    #[test]
    fn times_are_found_behind_any_name() {
        let stat = "77 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 130 20 0 0 20 0 1 0";
        assert_eq!(ticks(stat), Some(150));
        assert_eq!(peak_rss("Name:\tx\nVmHWM:\t  2048 kB\nVmRSS:\t 9 kB\n"), 2 << 20);
    }

    #[test]
    fn a_program_that_ends_says_how_and_why() {
        let mut program = shell("echo one; echo it is broken >&2; exit 3");
        assert_eq!(program.line(Duration::from_secs(60)).unwrap().as_deref(), Some("one"));
        let error = program.line(Duration::from_secs(60)).unwrap_err().to_string();
        assert!(error.contains("sh") && error.contains('3') && error.contains("it is broken"), "{error}");
    }

    #[test]
    fn silence_is_no_line_and_a_dropped_program_is_gone() {
        let mut program = shell("exec sleep 1000");
        assert!(program.line(Duration::from_millis(1)).unwrap().is_none());
        let folder = format!("/proc/{}", program.id());
        assert!(program.usage("vcpu").peak_rss_bytes > 0);
        drop(program);
        assert!(!std::path::Path::new(&folder).exists());
    }
}
