//! The things the program does, and what they share.

mod afterwards;
mod console;
mod demo;
mod export;
mod gentle;
mod guests;
mod handover;
mod links;
mod operator;
mod parent;
mod rdma;
mod receive;
mod restore;
mod save;
mod send;
mod settle;

use std::fmt::Display;

use crate::cli::{Command, ExitStatus};
use crate::progress::Screen;
use crate::report::{FinalReport, Role};

/// Does what the command line says.
pub(crate) fn run(command: &Command) -> ExitStatus {
    match command {
        Command::Demo(options) => demo::demo(options),
        Command::Receive(options) => receive::receive(options),
        Command::Send(options) => send::send(options),
        Command::Save(options) => save::save(options),
        Command::Restore(options) => restore::restore(options),
        Command::Export(options) => export::export(options),
    }
}

/// Reports that nothing was tried, and why.
fn not_started(screen: &Screen, role: Role, error: &dyn Display) -> ExitStatus {
    screen.not_started(&FinalReport::not_started(role, error.to_string()));
    ExitStatus::SetUp
}

/// Reports that the operator ended the program before anything was tried.
fn ended_early(screen: &Screen, role: Role) -> ExitStatus {
    let report = FinalReport::ended_early(role);
    screen.not_started(&report);
    report.exit_status()
}
