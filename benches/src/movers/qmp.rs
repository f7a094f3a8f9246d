//! QEMU's control socket: one JSON object a line, commands up, answers and events down.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::{BenchError, host, interrupt};

/// Between two looks whether the operator wants to end.
const LOOK_UP: Duration = Duration::from_millis(50);

/// QEMU answers in milliseconds, unless the machine is very busy.
const PATIENCE: Duration = Duration::from_secs(30);

/// The state of a migration whose guest runs at the destination already.
const POSTCOPY: &str = "postcopy-active";

/// A connection to one QEMU.
#[derive(Debug)]
pub(super) struct Qmp {
    /// Who is at the other end.
    name: &'static str,
    stream: UnixStream,
    lines: Receiver<(Instant, Value)>,
    /// Events that came while an answer was waited for, with their times.
    events: Vec<(Instant, Value)>,
    /// Whether its migration has gone over to post-copy.
    postcopy: bool,
}

impl Qmp {
    /// Connects once the socket is there, as long as QEMU is `alive`, and leaves the mode of negotiation.
    pub(super) fn connect(
        name: &'static str,
        path: &Path,
        mut alive: impl FnMut() -> Result<(), BenchError>,
    ) -> Result<Self, BenchError> {
        let deadline = Instant::now() + PATIENCE;
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
                Err(error) => return Err(host("cannot reach QEMU")(error)),
            }
            interrupt::check()?;
            alive()?;
        };
        Self::over(name, stream)
    }

    fn over(name: &'static str, stream: UnixStream) -> Result<Self, BenchError> {
        let read = BufReader::new(stream.try_clone().map_err(host("cannot share a socket"))?);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let values = read.lines().map_while(Result::ok).filter_map(|line| serde_json::from_str(&line).ok());
            values.for_each(|value| drop(sender.send((Instant::now(), value))));
        });
        let mut qmp = Self { name, stream, lines, events: Vec::new(), postcopy: false };
        qmp.command("qmp_capabilities", &Value::Null)?;
        Ok(qmp)
    }

    /// Gives a command and returns its answer.
    pub(super) fn command(&mut self, name: &str, arguments: &Value) -> Result<Value, BenchError> {
        let order = if arguments.is_null() {
            json!({"execute": name})
        } else {
            json!({"execute": name, "arguments": arguments})
        };
        self.stream.write_all(format!("{order}\n").as_bytes()).map_err(host("cannot give QEMU a command"))?;
        let deadline = Instant::now() + PATIENCE;
        while let Some((at, mut line)) = self.line(deadline)? {
            if let Some(answer) = line.get_mut("return") {
                return Ok(answer.take());
            }
            if let Some(error) = line.get("error") {
                return Err(BenchError::Tool(format!("QEMU refuses {order}: {error}")));
            }
            self.events.push((at, line));
        }
        Err(BenchError::Tool(format!("QEMU does not answer {order}")))
    }

    /// Whether its migration has gone over to post-copy, as far as its events have been read.
    pub(super) fn saw_postcopy(&self) -> bool {
        self.postcopy
    }

    /// Forgets the events so far.
    pub(super) fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits until the migration has one of these states; says which and since when. `None` when it has none of
    /// them in time.
    pub(super) fn migration_state(
        &mut self,
        wanted: &[&str],
        patience: Duration,
    ) -> Result<Option<(Instant, String)>, BenchError> {
        let deadline = Instant::now() + patience;
        for (at, event) in std::mem::take(&mut self.events) {
            if let Some(state) = wanted_state(&event, wanted) {
                return Ok(Some((at, state)));
            }
        }
        while let Some((at, event)) = self.line(deadline)? {
            if let Some(state) = wanted_state(&event, wanted) {
                return Ok(Some((at, state)));
            }
        }
        Ok(None)
    }

    /// The next line with the time when it came; `None` when there is none before the deadline.
    fn line(&mut self, deadline: Instant) -> Result<Option<(Instant, Value)>, BenchError> {
        loop {
            interrupt::check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(LOOK_UP)) {
                Ok(line) => {
                    self.postcopy |= wanted_state(&line.1, &[POSTCOPY]).is_some();
                    return Ok(Some(line));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(BenchError::Tool(format!("{} has ended", self.name)));
                }
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Drop for Qmp {
    fn drop(&mut self) {
        // Ends the thread that reads.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

fn wanted_state(event: &Value, wanted: &[&str]) -> Option<String> {
    let state = event["data"]["status"].as_str().filter(|_| event["event"] == "MIGRATION")?;
    wanted.contains(&state).then(|| state.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A QEMU that says these lines as soon as somebody listens.
    fn qemu(lines: &str) -> Qmp {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(lines.as_bytes()).unwrap();
        std::thread::spawn(move || std::io::copy(&mut theirs.try_clone().unwrap(), &mut std::io::sink()));
        Qmp::over("QEMU", ours).unwrap()
    }

    const START: &str = "{\"QMP\": {\"version\": {}}}\n{\"return\": {}}\n";

    #[test]
    fn events_between_commands_are_kept_for_whoever_waits_for_them() {
        let event = |state| format!("{{\"event\": \"MIGRATION\", \"data\": {{\"status\": \"{state}\"}}}}\n");
        let mut qmp = qemu(&format!("{START}{}{}{{\"return\": {{\"a\": 1}}}}\n", event("setup"), event("completed")));
        assert_eq!(qmp.command("query-migrate", &Value::Null).unwrap()["a"], 1);
        let found = qmp.migration_state(&["completed", "failed"], Duration::ZERO).unwrap();
        assert_eq!(found.unwrap().1, "completed");
        assert!(qmp.migration_state(&["completed"], Duration::ZERO).unwrap().is_none());
    }

    #[test]
    fn going_over_to_postcopy_is_seen_whatever_is_waited_for() {
        let event = |state| format!("{{\"event\": \"MIGRATION\", \"data\": {{\"status\": \"{state}\"}}}}\n");
        for (states, seen) in [(["active", "completed"], false), (["postcopy-active", "completed"], true)] {
            let mut qmp = qemu(&format!("{START}{}{}", event(states[0]), event(states[1])));
            let found = qmp.migration_state(&["completed"], Duration::from_secs(60)).unwrap();
            assert!(found.is_some() && qmp.saw_postcopy() == seen, "{states:?}");
        }
    }

    #[test]
    fn a_refusal_is_an_error_with_the_command_in_it() {
        let mut qmp = qemu(&format!("{START}{{\"error\": {{\"desc\": \"no such thing\"}}}}\n"));
        let error = qmp.command("fly", &json!({"to": "moon"})).unwrap_err().to_string();
        assert!(error.contains("no such thing") && error.contains("moon"), "{error}");
    }
}
