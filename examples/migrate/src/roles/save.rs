//! `migrate save`: a guest here, moved into a file.

use std::path::Path;
use std::sync::Arc;

use pageferry::transport::Dialer;
use pageferry::vm::VmError;
use pageferry_file::FileDialer;

use super::not_started;
use super::send::{Departure, Way, depart};
use crate::cli::{ExitStatus, Limits, SaveOptions, Verify};
use crate::progress::Screen;
use crate::report::Role;

/// What a file cannot do.
#[derive(Debug, thiserror::Error)]
#[error(
    "--verify full compares the guest's memory with a second one, and a file is none: leave it out; restoring checks every page"
)]
struct NoSecondMemory;

/// Runs the command.
pub(super) fn save(options: &SaveOptions) -> ExitStatus {
    let screen = Arc::new(Screen::choose(options.output.json));
    match try_save(options, &screen) {
        Ok(status) => status,
        Err(error) => not_started(&screen, Role::Save, &error),
    }
}

fn try_save(options: &SaveOptions, screen: &Arc<Screen>) -> Result<ExitStatus, VmError> {
    let SaveOptions { limits, encoding, .. } = options;
    let dialer = file_dialer(&options.file, options.overwrite, limits)?;
    let lane = options.lane();
    let way = Way { role: Role::Save, limits, lane: &lane, encoding, linger: options.linger.linger };
    depart(
        &Departure { dialer, hand_over: None, way, guest: &options.guest, moment: options.moment, verb: "saves" },
        screen,
    )
}

/// The way into a file.
pub(super) fn file_dialer(file: &Path, overwrite: bool, limits: &Limits) -> Result<Arc<dyn Dialer>, VmError> {
    if limits.verify == Verify::Full {
        return Err(NoSecondMemory.into());
    }
    let mut how = pageferry_file::SaveOptions::default();
    how.overwrite = overwrite;
    Ok(Arc::new(FileDialer::new(file, how)?))
}
