//! The one place where this program calls the engine.

use std::sync::Arc;

use pageferry::config::{DestinationConfig, SourceConfig};
use pageferry::error::{Error, Failed};
use pageferry::host::{Control, Observer};
use pageferry::stats::Report;
use pageferry::transport::{Acceptor, Dialer};
use pageferry::vm::{DestinationVm, SourceVm};

/// Migrates a guest away.
pub(super) fn run_source(
    _config: SourceConfig,
    _vm: &mut dyn SourceVm,
    _dialer: Arc<dyn Dialer>,
    _observer: Arc<dyn Observer>,
    _control: &Control,
) -> Result<Report, Failed> {
    Err(missing())
}

/// Takes a guest in.
pub(super) fn run_destination(
    _config: DestinationConfig,
    _vm: &mut dyn DestinationVm,
    _acceptor: Arc<dyn Acceptor>,
    _observer: Arc<dyn Observer>,
    _control: &Control,
) -> Result<Report, Failed> {
    Err(missing())
}

fn missing() -> Failed {
    let error = Error::Misuse("the engine's driver is not in this build".to_owned());
    Failed::SourceStillOwns { error, report: Box::default() }
}
