//! Questions to the guest program, and its answers.
//!
//! A question goes to the command port, where the guest looks every few milliseconds; the answer is
//! a line on its serial port.

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::Program;
use crate::guest::SelfCheck;
use crate::machine::{GuestHandle, GuestLine};
use crate::workload::line::{Line, WrongPage};
use crate::workload::ports::Command;

/// A guest that runs answers a small question within this, however busy the host is.
const PATIENCE: Duration = Duration::from_secs(30);

/// Filling and checking memory may take this long for each GiB, in an emulated machine too.
const PATIENCE_PER_GIB: Duration = Duration::from_secs(120);

/// Why a guest did not answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Silence {
    /// It is no longer there.
    #[error("the guest has ended: {0}")]
    Ended(String),
    /// It said that it cannot go on.
    #[error("the guest cannot go on: {0}")]
    Panic(String),
    /// It runs, or should.
    #[error("the guest has not {what} within {patience:?}")]
    Late { what: &'static str, patience: Duration },
}

/// Talks with one guest.
#[derive(Debug)]
pub(super) struct Conversation {
    handle: GuestHandle,
    lines: Receiver<GuestLine>,
    program: Program,
    ram_bytes: u64,
}

impl Conversation {
    /// Listens from now on.
    pub(super) fn new(handle: GuestHandle, program: Program, ram_bytes: u64) -> Self {
        let lines = handle.lines();
        Self { handle, lines, program, ram_bytes }
    }

    /// Waits until memory is filled. A Linux needs no waiting for.
    pub(super) fn wait_ready(&self) -> Result<(), Silence> {
        if self.program == Program::Linux {
            return Ok(());
        }
        self.hear("filled its memory", self.patience(), |line| match line {
            Line::Ready { .. } => Some(()),
            _ => None,
        })
    }

    pub(super) fn heartbeats(&self) -> Option<u64> {
        let beats = || self.handle.last_beat().map_or(0, |beat| beat.number.into());
        (self.program == Program::Ours).then(beats)
    }

    pub(super) fn reset_stall(&self) {
        if self.program == Program::Ours {
            self.handle.command(Command::ResetStall as u32);
        }
    }

    pub(super) fn longest_stall(&self) -> Result<Option<Duration>, Silence> {
        if self.program == Program::Linux {
            return Ok(None);
        }
        self.ask(Command::ReportStall, "told its longest stall", PATIENCE, |line| match line {
            Line::Stall { longest_us } => Some(Some(Duration::from_micros(longest_us))),
            _ => None,
        })
    }

    pub(super) fn self_check(&self) -> Result<SelfCheck, Silence> {
        if self.program == Program::Linux {
            return Ok(SelfCheck::Unable);
        }
        self.ask(Command::Check, "checked its memory", self.patience(), |line| match line {
            Line::CheckOk { .. } => Some(SelfCheck::Ok),
            Line::CheckFailed(wrong) => Some(SelfCheck::Wrong(describe(&wrong))),
            _ => None,
        })
    }

    fn ask<T>(
        &self,
        command: Command,
        what: &'static str,
        patience: Duration,
        answer: impl Fn(Line<'_>) -> Option<T>,
    ) -> Result<T, Silence> {
        while self.lines.try_recv().is_ok() {}
        self.handle.command(command as u32);
        self.hear(what, patience, answer)
    }

    fn hear<T>(
        &self,
        what: &'static str,
        patience: Duration,
        answer: impl Fn(Line<'_>) -> Option<T>,
    ) -> Result<T, Silence> {
        let until = Instant::now() + patience;
        loop {
            let line = match self.lines.recv_deadline(until) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => return Err(Silence::Late { what, patience }),
                Err(RecvTimeoutError::Disconnected) => return Err(Silence::Ended(self.ending())),
            };
            match Line::parse(&line.text) {
                Some(Line::Panic(text)) => return Err(Silence::Panic(text.to_owned())),
                Some(line) => {
                    if let Some(found) = answer(line) {
                        return Ok(found);
                    }
                }
                None => {}
            }
        }
    }

    fn ending(&self) -> String {
        self.handle.ended().unwrap_or_else(|| "its machine is gone".to_owned())
    }

    fn patience(&self) -> Duration {
        PATIENCE + PATIENCE_PER_GIB * self.ram_bytes.div_ceil(1 << 30) as u32
    }
}

fn describe(wrong: &WrongPage) -> String {
    let WrongPage { address, mismatch, wrong_pages } = wrong;
    let (offset, found, expected) = (mismatch.offset, mismatch.found, mismatch.expected);
    format!(
        "page {:#x} at offset {offset}: {found:#018x} instead of {expected:#018x}; {wrong_pages} wrong pages in all",
        address / 4096
    )
}
