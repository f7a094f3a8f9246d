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
use crate::guest::{Guest, SelfCheck};
use crate::workload::line::Line;
use crate::workload::ports::Command;

/// How long the payload may take for an answer, and how much longer for each MiB of its memory when it
/// has to look at all of it. Generous: a busy host with an emulated CPU is slow, and a guest that has
/// ended is noticed at once.
const PATIENCE: Duration = Duration::from_secs(30);
const PATIENCE_PER_MIB: Duration = Duration::from_millis(100);

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

    /// How the guest ended, if it did: a crash or a switch-off, not a migration.
    pub(crate) fn ended(&self) -> Option<String> {
        self.watch.end()
    }

    fn wait_ready(&self) -> Result<(), MachineError> {
        let lines = self.lines();
        if !self.payload || self.watch.is_ready() {
            return Ok(());
        }
        let ready = |line: Line<'_>| matches!(line, Line::Ready { .. }).then_some(());
        self.wait_for(&lines, "filled its memory", self.patience_with_memory(), ready)
    }

    fn heartbeats(&self) -> Option<u64> {
        self.payload.then(|| self.watch.beats())
    }

    fn reset_stall(&self) {
        if self.payload {
            self.command(Command::ResetStall);
        }
    }

    fn longest_stall(&self) -> Result<Option<Duration>, MachineError> {
        if !self.payload {
            return Ok(None);
        }
        let stall = |line: Line<'_>| match line {
            Line::Stall { longest_us } => Some(Duration::from_micros(longest_us)),
            _ => None,
        };
        self.ask(Command::ReportStall, "told its longest stall", PATIENCE, stall).map(Some)
    }

    fn self_check(&self) -> Result<SelfCheck, MachineError> {
        if !self.payload {
            return Ok(SelfCheck::Unable);
        }
        let result = |line: Line<'_>| match line {
            Line::CheckOk { .. } => Some(SelfCheck::Ok),
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
        self.wait_for(&lines, what, patience, answer)
    }

    fn wait_for<T>(
        &self,
        lines: &Receiver<String>,
        what: &'static str,
        patience: Duration,
        answer: impl Fn(Line<'_>) -> Option<T>,
    ) -> Result<T, MachineError> {
        let deadline = Instant::now() + patience;
        loop {
            let text = lines.recv_deadline(deadline).map_err(|error| self.why_no_line(error, what, patience))?;
            let Some(line) = Line::parse(&text) else { continue };
            if let Line::Panic(why) = line {
                return Err(MachineError::Panicked(why.to_owned()));
            }
            if let Some(answer) = answer(line) {
                return Ok(answer);
            }
        }
    }

    fn why_no_line(&self, error: RecvTimeoutError, what: &'static str, patience: Duration) -> MachineError {
        match error {
            RecvTimeoutError::Timeout => MachineError::Silent { what, patience },
            RecvTimeoutError::Disconnected => MachineError::Ended(self.ended().unwrap_or_default()),
        }
    }

    fn patience_with_memory(&self) -> Duration {
        PATIENCE + PATIENCE_PER_MIB * (self.pages / 256) as u32
    }
}

impl Guest for LiveGuest {
    fn wait_ready(&mut self) -> VmResult<()> {
        Ok(self.handle().wait_ready()?)
    }

    fn heartbeats(&self) -> Option<u64> {
        self.handle().heartbeats()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.handle().reset_stall();
        Ok(())
    }

    fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
        Ok(self.handle().longest_stall()?)
    }

    fn self_check(&mut self) -> VmResult<SelfCheck> {
        Ok(self.handle().self_check()?)
    }
}

impl Guest for ArrivingGuest {
    fn wait_ready(&mut self) -> VmResult<()> {
        Ok(self.arrived()?.wait_ready()?)
    }

    fn heartbeats(&self) -> Option<u64> {
        self.handle()?.heartbeats()
    }

    fn reset_stall(&mut self) -> VmResult<()> {
        self.arrived()?.reset_stall();
        Ok(())
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
