//! What others see of a guest while the engine moves it, and the questions they ask it.
//!
//! Our payload answers on its console to commands that it picks up at a port ([`crate::workload`]). A Linux of
//! the user's knows nothing of that: it is always ready, and cannot tell what its memory must hold.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use pageferry::memory::GuestMemory;
use pageferry::vm::VmResult;
use pageferry_kvm::Machine;

use super::destination::ArrivingGuest;
use super::devices::Devices;
use super::error::MachineError;
use super::source::LiveGuest;
use super::watch::{Beats, GuestLine, Watch};
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
    machine: Weak<Machine>,
    devices: Weak<Devices>,
    watch: Arc<Watch>,
    payload: bool,
}

impl GuestHandle {
    pub(super) fn new(machine: &Arc<Machine>, devices: &Arc<Devices>, payload: bool) -> Self {
        let watch = Arc::clone(&devices.watch);
        Self { machine: Arc::downgrade(machine), devices: Arc::downgrade(devices), watch, payload }
    }

    /// Every line that the guest prints from now on, until it ends.
    pub(crate) fn lines(&self) -> Receiver<GuestLine> {
        self.watch.listen()
    }

    /// The payload's heartbeats on this side.
    pub(crate) fn beats(&self) -> Beats {
        self.watch.beats()
    }

    /// Leaves a command for the payload, which looks for one every few milliseconds while it runs.
    pub(crate) fn command(&self, command: Command) {
        if let Some(devices) = self.devices.upgrade() {
            devices.command(command as u32);
        }
    }

    /// Whether the guest runs here now.
    pub(crate) fn is_running(&self) -> bool {
        self.machine.upgrade().is_some_and(|machine| machine.is_running())
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
        self.payload.then(|| self.beats().count)
    }

    fn reset_stall(&self) {
        if self.payload {
            self.command(Command::ResetStall);
        }
    }

    fn longest_stall(&self) -> Result<Option<Duration>, MachineError> {
        let stall = |line: Line<'_>| match line {
            Line::Stall { longest_us } => Some(Duration::from_micros(longest_us)),
            _ => None,
        };
        if !self.payload {
            return Ok(None);
        }
        self.ask(Command::ReportStall, "told its longest stall", PATIENCE, stall).map(Some)
    }

    fn self_check(&self) -> Result<SelfCheck, MachineError> {
        let result = |line: Line<'_>| match line {
            Line::CheckOk { .. } => Some(SelfCheck::Ok),
            Line::CheckFailed(wrong) => Some(SelfCheck::Wrong(wrong.to_string())),
            _ => None,
        };
        if !self.payload {
            return Ok(SelfCheck::Unable);
        }
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
        lines: &Receiver<GuestLine>,
        what: &'static str,
        patience: Duration,
        answer: impl Fn(Line<'_>) -> Option<T>,
    ) -> Result<T, MachineError> {
        let deadline = Instant::now() + patience;
        loop {
            let text = match lines.recv_deadline(deadline) {
                Ok(line) => line.text,
                Err(RecvTimeoutError::Timeout) => return Err(MachineError::Silent { what, patience }),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(MachineError::Ended(self.ended().unwrap_or_default()));
                }
            };
            match Line::parse(&text) {
                Some(Line::Panic(why)) => return Err(MachineError::Panicked(why.to_owned())),
                Some(line) => {
                    if let Some(answer) = answer(line) {
                        return Ok(answer);
                    }
                }
                None => {}
            }
        }
    }

    fn patience_with_memory(&self) -> Duration {
        let regions = self.machine.upgrade().map(|machine| machine.memory().layout().page_count());
        PATIENCE + PATIENCE_PER_MIB * (regions.unwrap_or(0) / 256) as u32
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
