//! After a link that broke around the commit: asking until it is clear who owns the guest.
//!
//! The engine asks for a while by itself. What comes after that is the operator's decision, and the
//! one this program takes is to go on asking for as long as it may.

use pageferry::error::{Failed, Unsettled};
use pageferry::stats::Report;

use super::operator::{Operator, Wish};
use crate::cli::LingerTime;
use crate::progress::Screen;

/// Asks again by `ask` until there is an answer, or the operator ends the program.
pub(super) fn settle(
    result: Result<Report, Failed>,
    linger: LingerTime,
    operator: &Operator,
    screen: &Screen,
    mut ask: impl FnMut(Unsettled) -> Result<Report, Failed>,
) -> Result<Report, Failed> {
    let mut result = result;
    while let Err(Failed::Undecided { unsettled, error, .. }) = &result {
        if linger != LingerTime::Forever || operator.wish() == Wish::Stop {
            break;
        }
        screen.note(&format!("undecided which side owns the guest ({error}); asking again, Ctrl-C gives up"));
        let answer = ask(*unsettled);
        result = with_report(answer, measured(&result));
    }
    result
}

fn measured(result: &Result<Report, Failed>) -> Report {
    match result {
        Ok(report) => report.clone(),
        Err(failed) => failed.report().clone(),
    }
}

/// The answer, with what the migration itself had measured: asking measures nothing of it.
fn with_report(answer: Result<Report, Failed>, measured: Report) -> Result<Report, Failed> {
    let report = Box::new(measured);
    match answer {
        Ok(_) => Ok(*report),
        Err(Failed::SourceStillOwns { error, .. }) => Err(Failed::SourceStillOwns { error, report }),
        Err(Failed::DestinationOwns { error, .. }) => Err(Failed::DestinationOwns { error, report }),
        Err(Failed::Undecided { unsettled, error, .. }) => Err(Failed::Undecided { unsettled, error, report }),
        Err(other) => Err(other),
    }
}
