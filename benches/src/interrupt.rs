//! Ctrl-C: whoever waits here hears of it, returns an error, and on the way out everything is taken down.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::{BenchError, host};

static ASKED_TO_END: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on Ctrl-C and the signals that end a program only set a mark.
pub(crate) fn listen() -> Result<(), BenchError> {
    let mark = ASKED_TO_END.get_or_init(Arc::default);
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(mark)).map_err(host("cannot listen for Ctrl-C"))?;
    }
    Ok(())
}

/// An error once the mark is set.
pub(crate) fn check() -> Result<(), BenchError> {
    match ASKED_TO_END.get() {
        Some(mark) if mark.load(Ordering::Relaxed) => Err(BenchError::Interrupted),
        _ => Ok(()),
    }
}
