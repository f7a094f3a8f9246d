//! What others see of a guest while the engine moves it, and the questions they ask it.
//!
//! Our payload answers on its console to commands that it picks up at a port ([`crate::workload`]). A Linux of
//! the user's knows nothing of that: it is always ready, and cannot tell what its memory must hold.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use pageferry::vm::VmResult;

use super::destination::ArrivingGuest;
use super::devices::Devices;
use super::error::MachineError;
use super::source::LiveGuest;
use super::watch::Watch;
use crate::guest::{Guest, SelfCheck, Written};
use crate::workload::line::Line;
use crate::workload::ports::Command;

/// How long the payload may take for an answer, and how much longer for each MiB of its memory when it
/// has to look at all of it. Generous: a busy host with an emulated CPU is slow, and a guest that has
/// ended is noticed at once.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_PER_MIB: Duration = Duration::from_millis(100);

/// How often one who waits is asked whether to go on.
const LOOK_UP: Duration = Duration::from_millis(100);

/// Shows a guest, and passes it commands. Clones show the same one; they do not keep it alive.
#[derive(Clone, Debug)]
pub(crate) struct GuestHandle {
    devices: Weak<Devices>,
    watch: Arc<Watch>,
    payload: bool,
    pages: u64,
}

impl GuestHandle {
    pub(super) fn new(devices: &Arc<Devices>, payload: bool, pages: u64) -> Self {
        Self { devices: Arc::downgrade(devices), watch: Arc::clone(&devices.watch), payload, pages }
    }

    /// Every line that the guest prints from now on, until it ends.
    pub(crate) fn lines(&self) -> Receiver<String> {
        self.watch.listen()
    }

    /// Leaves a command for the payload, which looks for one every few milliseconds while it runs.
    pub(crate) fn command(&self, command: Command) {
        if let Some(devices) = self.devices.upgrade() {
            devices.command(command as u32);
        }
    }

    /// Whether the guest is our own program, which answers questions.
    pub(crate) fn is_payload(&self) -> bool {
        self.payload
    }

    /// How the guest ended, if it did: a crash or a switch-off, not a migration.
    pub(crate) fn ended(&self) -> Option<String> {
        self.watch.end()
    }

    fn wait_ready(&self, go_on: &dyn Fn() -> bool) -> Result<(), MachineError> {
        let lines = self.lines();
        if !self.payload || self.watch.is_ready() {
            return Ok(());
        }
        let ready = |line: Line<'_>| matches!(line, Line::Ready { .. }).then_some(());
        let wait = Wait { what: "filled its memory", patience: self.patience_with_memory(), go_on };
        self.wait_for(&lines, &wait, ready)
    }

    fn heartbeats(&self) -> Option<u64> {
        self.payload.then(|| self.watch.beats())
    }

    /// Returns when the guest has done it: it obeys in order, so it has when it answers the next question.
    fn reset_stall(&self) -> Result<(), MachineError> {
        if self.payload {
            self.command(Command::ResetStall);
            self.watch.forget_gap();
            self.longest_stall()?;
        }
        Ok(())
    }

    fn longest_stall(&self) -> Result<Option<Duration>, MachineError> {
        if !self.payload {
            return Ok(None);
        }
        let stall = |line: Line<'_>| match line {
            Line::Stall { longest_us } => Some(Duration::from_micros(longest_us)),
            _ => None,
        };
        let by_guest = self.ask(Command::ReportStall, "told its longest stall", PATIENCE, stall)?;
        Ok(Some(by_guest.max(self.watch.gap_across())))
    }

    fn self_check(&self) -> Result<SelfCheck, MachineError> {
        if !self.payload {
            return Ok(SelfCheck::Unable);
        }
        let result = |line: Line<'_>| match line {
            Line::CheckOk { pages, .. } => Some(SelfCheck::Ok { pages }),
            Line::CheckFailed(wrong) => Some(SelfCheck::Wrong(wrong.to_string())),
            _ => None,
        };
        self.ask(Command::Check, "finished checking its memory", self.patience_with_memory(), result)
    }

    fn ask<T>(
        &self,
        command: Command,
        what: &'static str,
        patience: Duration,
        answer: impl Fn(Line<'_>) -> Option<T>,
    ) -> Result<T, MachineError> {
        let lines = self.lines();
        self.command(command);
        self.wait_for(&lines, &Wait { what, patience, go_on: &|| true }, answer)
    }

    fn wait_for<T>(
        &self,
        lines: &Receiver<String>,
        wait: &Wait<'_>,
        answer: impl Fn(Line<'_>) -> Option<T>,
    ) -> Result<T, MachineError> {
        let deadline = Instant::now() + wait.patience;
        loop {
            let text = match lines.recv_deadline(deadline.min(Instant::now() + LOOK_UP)) {
                Ok(text) => text,
                Err(RecvTimeoutError::Timeout) if !(wait.go_on)() => return Err(MachineError::NotAwaited),
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => continue,
                Err(error) => return Err(self.why_no_line(error, wait)),
            };
            let Some(line) = Line::parse(&text) else { continue };
            if let Line::Panic(why) = line {
                return Err(MachineError::Panicked(why.to_owned()));
            }
            if let Some(answer) = answer(line) {
                return Ok(answer);
            }
        }
    }

    fn why_no_line(&self, error: RecvTimeoutError, wait: &Wait<'_>) -> MachineError {
        match error {
            RecvTimeoutError::Timeout => MachineError::Silent { what: wait.what, patience: wait.patience },
            RecvTimeoutError::Disconnected => MachineError::Ended(self.ended().unwrap_or_default()),
        }
    }

    fn patience_with_memory(&self) -> Duration {
        PATIENCE + PATIENCE_PER_MIB * (self.pages / 256) as u32
    }
}

/// What is waited for, and for how long.
struct Wait<'a> {
    what: &'static str,
    patience: Duration,
    go_on: &'a dyn Fn() -> bool,
}

impl Guest for LiveGuest {
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()> {
        Ok(self.handle().wait_ready(go_on)?)
    }

    fn ended(&self) -> Option<String> {
        self.handle().ended()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.handle().heartbeats()
    }

    fn written(&self) -> Option<Written> {
        self.handle().watch.written()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        Ok(self.handle().reset_stall()?)
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(self.handle().longest_stall()?)
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        Ok(self.handle().self_check()?)
    }
}

impl Guest for ArrivingGuest {
    fn wait_ready(&mut self, go_on: &dyn Fn() -> bool) -> VmResult<()> {
        Ok(self.arrived()?.wait_ready(go_on)?)
    }

    fn ended(&self) -> Option<String> {
        self.handle()?.ended()
    }

    fn heartbeats(&self) -> Option<u64> {
        self.handle()?.heartbeats()
    }

    fn written(&self) -> Option<Written> {
        self.handle()?.watch.written()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        Ok(self.arrived()?.reset_stall()?)
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(self.arrived()?.longest_stall()?)
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        Ok(self.arrived()?.self_check()?)
    }
}

impl ArrivingGuest {
    fn arrived(&self) -> Result<GuestHandle, MachineError> {
        self.handle().ok_or(MachineError::NotPrepared)
    }
}
