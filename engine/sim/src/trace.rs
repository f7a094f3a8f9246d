//! What happened in a run: hashed always, so that a replay can prove to be one; printed when asked for.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::time::Duration;

/// The record of one run.
#[derive(Debug, Default)]
pub(crate) struct Trace {
    hasher: DefaultHasher,
    print: bool,
}

impl Trace {
    pub(crate) fn new(print: bool) -> Self {
        Self { print, ..Self::default() }
    }

    /// Notes an event. `what` tells it apart from others in the hash; `text` is for people.
    pub(crate) fn note(&mut self, now: Duration, who: &str, what: impl Hash, text: impl FnOnce() -> String) {
        (now, who).hash(&mut self.hasher);
        what.hash(&mut self.hasher);
        if self.print {
            // A reader that has closed the pipe has seen enough.
            let _ = writeln!(std::io::stdout(), "{:>14.6} ms  {who:<12} {}", now.as_secs_f64() * 1000.0, text());
        }
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hasher.finish()
    }
}

/// Enough of a text to recognise it.
pub(crate) fn shorten(mut text: String) -> String {
    if let Some((end, _)) = text.char_indices().nth(160) {
        text.truncate(end);
        text.push_str("...");
    }
    text
}
