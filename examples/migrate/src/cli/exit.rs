//! Exit codes: one place that scripts can rely on.

use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum ExitStatus {
    /// The guest was moved, and every check that was made agreed.
    Completed = 0,
    /// The migration failed; the guest is at the source.
    Failed = 1,
    /// The command line was wrong.
    Usage = 2,
    /// The migration was cancelled; the guest is at the source.
    Cancelled = 3,
    /// Nobody can tell yet which side owns the guest; it is paused at the source.
    Undecided = 4,
    /// The guest found a wrong page in its own memory, did not answer, or has ended.
    GuestWrong = 5,
    /// The guest runs at the destination, but something failed after that.
    FailedAfterwards = 6,
    /// The guest could not be started, or the address could not be listened on: nothing was tried.
    SetUp = 7,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status as u8)
    }
}

/// The codes, for `--help`.
pub(crate) const HELP: &str = "\
Exit codes:
  0  the guest was moved, and every check agreed
  1  the migration failed; the guest is at the source
  2  the command line was wrong
  3  the migration was cancelled (Ctrl-C); the guest is at the source
  4  undecided which side owns the guest; it is paused at the source
  5  the guest found a wrong page in its memory, did not answer, or has ended
  6  the guest runs at the destination, but something failed after that
  7  the guest or the listener could not be set up; nothing was tried
To `migrate save` the file is the destination, to `migrate restore` the source.

The first Ctrl-C cancels a running migration and the guest runs on at the source; the next one ends the program.";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_help_lists_every_code() {
        let codes = [
            ExitStatus::Completed,
            ExitStatus::Failed,
            ExitStatus::Usage,
            ExitStatus::Cancelled,
            ExitStatus::Undecided,
            ExitStatus::GuestWrong,
            ExitStatus::FailedAfterwards,
            ExitStatus::SetUp,
        ];
        for code in codes {
            assert!(HELP.contains(&format!("\n  {}  ", code as u8)), "{code:?}");
        }
    }
}
