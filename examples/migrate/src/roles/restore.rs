//! `migrate restore`: a guest that comes out of a file and runs on.

use std::sync::Arc;

use pageferry::config::DestinationConfig;
use pageferry::transport::Acceptor;
use pageferry::vm::VmError;
use pageferry_file::FileAcceptor;

use super::not_started;
use super::operator::Operator;
use super::receive::{Arrival, arrive, place};
use crate::cli::{ExitStatus, RestoreOptions};
use crate::progress::Screen;
use crate::report::Role;

/// Runs the command.
pub(super) fn restore(options: &RestoreOptions) -> ExitStatus {
    let screen = Arc::new(Screen::choose(options.output.json));
    match try_restore(options, &screen) {
        Ok(status) => status,
        Err(error) => not_started(&screen, Role::Restore, &error),
    }
}

fn try_restore(options: &RestoreOptions, screen: &Arc<Screen>) -> Result<ExitStatus, VmError> {
    let operator = Operator::listen(false)?;
    let acceptor = FileAcceptor::open(&options.file, pageferry_file::RestoreOptions::default())?;
    let acceptor: Arc<dyn Acceptor> = Arc::new(acceptor);
    let arrival = Arrival {
        role: Role::Restore,
        place: place(options.place),
        config: DestinationConfig::default(),
        linger: options.linger.linger,
    };
    Ok(arrive(&arrival, &acceptor, None, screen, &operator))
}
