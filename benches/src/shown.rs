//! What a command has found, for people and for programs.

use std::fmt::Display;
use std::io::{self, Write};

use crate::outcome::Outcome;
use crate::{BenchError, host};

/// Something to print: as text, or as JSON.
pub(crate) trait Shown: Display {
    fn json(&self) -> String;

    /// Keeps it with the project's records. What is made from records is not one.
    fn record(&self, _class: &str) -> Result<(), BenchError> {
        Err(BenchError::Tool("--record is for measurements; this is made from one".to_owned()))
    }
}

impl Shown for Outcome {
    fn json(&self) -> String {
        Outcome::json(self)
    }

    fn record(&self, class: &str) -> Result<(), BenchError> {
        Outcome::record(self, class).map_err(host("cannot write the results"))
    }
}

/// Writes a line to standard error: how it goes. Who has stopped reading does not end a measurement.
pub(crate) fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Writes text to standard output; who has stopped reading has seen enough.
pub(crate) fn print(text: &str) -> Result<(), BenchError> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(host("cannot write to standard output")(error)),
        _ => Ok(()),
    }
}
