//! The final report for people: the rounds, the standstill in its parts, and the proof.

use std::fmt::Write as _;
use std::time::Duration;

use super::{FinalReport, Outcome, Owner, Role, RoundLine, stages};
use crate::cli::units::{show_bytes, show_duration, show_rate};

type Sides = super::PerSide<f64>;

/// Rounds shown before the middle ones are left out.
const ROUNDS_SHOWN: usize = 16;

/// The whole text, without colours, ending in a newline.
pub(crate) fn show(report: &FinalReport) -> String {
    let mut text = String::new();
    if !report.rounds.is_empty() {
        text += &rounds(&report.rounds);
        text.push('\n');
    }
    if let Some(line) = &report.stages {
        text += &stages::table(line);
        text.push('\n');
    }
    for line in summary(report) {
        text += &line;
        text.push('\n');
    }
    text
}

fn rounds(rounds: &[RoundLine]) -> String {
    let mut header = vec!["round", "pages", "wire", "ratio", "time", "rate", "dirty", "dirty rate"];
    let throttled = rounds.iter().any(|round| round.throttle_percent > 0);
    if throttled {
        header.push("slow");
    }
    let mut rows: Vec<Vec<String>> = rounds.iter().map(|round| cells(round, throttled)).collect();
    if rows.len() > ROUNDS_SHOWN {
        let left_out = rows.len() - ROUNDS_SHOWN;
        let gap = ROUNDS_SHOWN / 2..ROUNDS_SHOWN / 2 + left_out;
        rows.splice(gap, [vec![format!("... {left_out} more")]]);
    }
    align(&header, &rows)
}

fn cells(round: &RoundLine, throttled: bool) -> Vec<String> {
    let number = if round.stopped { "stop".to_owned() } else { round.round.to_string() };
    let mut cells = vec![
        number,
        round.pages.to_string(),
        show_bytes(round.wire_bytes),
        show_ratio(round.wire_bytes, round.bytes),
        show_ms(round.duration_ms),
        show_rate(round.wire_bytes_per_second),
        round.dirty_pages.to_string(),
        show_rate(round.dirty_bytes_per_second),
    ];
    if throttled {
        cells.push(throttle(round.throttle_percent));
    }
    cells
}

fn throttle(percent: u8) -> String {
    if percent == 0 { "-".to_owned() } else { format!("{percent} %") }
}

/// Columns as wide as their widest cell; the first to the left, numbers to the right.
pub(super) fn align(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(String::len);
        cells.chain([header[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let header = header.iter().map(ToString::to_string).collect();
    let mut text = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Writing to a string cannot fail.
            let _ = if column == 0 { write!(line, "{cell:<width$}") } else { write!(line, "  {cell:>width$}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn summary(report: &FinalReport) -> Vec<String> {
    let mut lines = vec![head(report)];
    lines.push(volume(report));
    lines.extend(report.stages.map(|stages| format!("encoding  {}", stages.encoder_ms.show())));
    let spared = report.stages.map_or(0, |stages| stages.spared_pages);
    if spared > 0 {
        lines.push(format!("spared    {spared} times a dirty page, which the guest would have written again anyway"));
    }
    lines.extend(downtime(report));
    if let Some(stall) = report.guest_longest_stall_ms {
        lines.push(format!("stall     {} at most between two heartbeats of the guest", show_ms(stall)));
    }
    lines.extend(alive(report).map(|alive| format!("guest     {alive}")));
    lines.extend(cost(report));
    lines.push(proof(report));
    lines
}

fn volume(report: &FinalReport) -> String {
    let (wire, guest) = (show_bytes(report.wire_bytes), show_bytes(report.guest_bytes));
    let ratio = show_ratio(report.wire_bytes, report.guest_bytes);
    let (content, zero) = (report.pages_sent, report.pages_zero);
    format!(
        "sent      {wire} on the wire for {guest} of memory ({ratio}): {content} pages with content, {zero} of zeros"
    )
}

fn alive(report: &FinalReport) -> Option<String> {
    match (&report.guest_ended, report.guest_heartbeats_after) {
        (Some(end), _) => Some(format!("has ended: {end}")),
        (None, Some(0)) => Some("has stopped".to_owned()),
        (None, beats) => Some(format!("runs: {} heartbeats since", beats?)),
    }
}

fn head(report: &FinalReport) -> String {
    let total = show_ms(report.total_ms);
    let owner = match report.owner {
        Owner::Destination if report.role == Role::Save => "the guest is in the file",
        Owner::File => "the guest is in the file, as before",
        Owner::Source if report.role == Role::Save => "the guest is here, and there is no file",
        Owner::Destination if report.role == Role::Restore => "the guest is here",
        Owner::Source => "the guest is at the source",
        Owner::Destination => "the guest is at the destination",
        Owner::Nobody => "no guest was offered",
        Owner::Undecided => "the guest stands still at the source until it is clear which side owns it",
    };
    let error = report.error.as_deref().unwrap_or("no reason given");
    match report.outcome {
        Outcome::Completed => format!("completed in {total}; {owner}"),
        Outcome::Cancelled => format!("cancelled after {total}; {owner}"),
        Outcome::Failed => format!("failed after {total}: {error}; {owner}"),
        Outcome::Undecided => format!("undecided after {total}: {error}; {owner}"),
    }
}

fn downtime(report: &FinalReport) -> Option<String> {
    let parts = report.downtime_parts_ms?.named().map(|(name, part)| format!("{name} {}", show_ms(part)));
    Some(format!("downtime  {} = {}", show_ms(report.downtime_ms?), parts.join(" + ")))
}

fn cost(report: &FinalReport) -> Vec<String> {
    let side = |name: &str, of: fn(Sides) -> Option<f64>, peak: Option<u64>, beside: Option<u64>| {
        let parts = [
            Some(format!("{name} {:.2} s of CPU", of(report.cpu_seconds)?)),
            of(report.cpu_seconds_per_gib).map(|seconds| format!("{seconds:.2} s/GiB")),
            peak.map(|bytes| format!("{} of memory at most", show_bytes(bytes))),
            beside.map(|bytes| format!("{} beside the guest's", show_bytes(bytes))),
        ];
        Some(parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
    };
    let (peak, beside) = (report.peak_rss_bytes, report.overhead_rss_bytes);
    let sides = [
        side("source", |sides| sides.source, peak.source, beside.source),
        side("destination", |sides| sides.destination, peak.destination, beside.destination),
    ];
    let lines = sides.into_iter().flatten().enumerate();
    lines.map(|(line, text)| format!("{:<9} {text}", if line == 0 { "cost" } else { "" })).collect()
}

/// What was proven, and nothing that was not.
fn proof(report: &FinalReport) -> String {
    let pages = report.pages_total;
    let memory = match (report.digest_match, report.full_verify_match) {
        (_, Some(false)) | (Some(false), _) => format!("{pages} pages NOT identical"),
        (_, Some(true)) => format!("{pages} pages identical (all hashed again on both sides)"),
        (Some(true), None) => format!("{pages} pages identical"),
        (None, None) => "memory not compared".to_owned(),
    };
    let guest = match report.guest_self_check.as_deref() {
        Some("ok") => "guest self-check OK".to_owned(),
        Some(wrong) => format!("guest self-check FAILED: {wrong}"),
        None => "guest not asked for its self-check on this side".to_owned(),
    };
    format!("{memory}, {guest}")
}

pub(super) fn show_ms(ms: f64) -> String {
    show_duration(Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default())
}

/// A part in per cent of the whole, at most 6 characters wide as long as it is not far more than that.
pub(crate) fn show_ratio(part: u64, whole: u64) -> String {
    let percent = part as f64 * 100.0 / whole as f64;
    match percent {
        _ if whole == 0 => "-".to_owned(),
        _ if part == 0 || percent >= 9.95 => format!("{percent:.0} %"),
        _ => format!("{percent:.1} %"),
    }
}

#[cfg(test)]
mod tests {
    use pageferry::error::{Error, Failed};
    use pageferry::stats::{Downtime, Report, RoundReport};

    use super::*;

    fn report(rounds: u32) -> FinalReport {
        let mut report = Report::default();
        report.downtime = Downtime { pause: Duration::from_micros(1500), ..Default::default() };
        report.rounds =
            (0..rounds).map(|round| RoundReport { round, pages: 1 << round, ..Default::default() }).collect();
        (report.pages_total, report.digest_match) = (262_144, Some(true));
        FinalReport::new(Role::Demo, &Ok(report))
    }

    #[test]
    fn the_rounds_of_a_large_guest_fit_a_terminal_of_80_columns() {
        let large = RoundReport {
            pages: 1 << 22,
            bytes: 1022 << 20,
            wire_bytes: 1023 << 20,
            duration: Duration::from_secs(100),
            wire_rate: 1023.0 * 1024.0 * 1024.0,
            dirty_pages: 999_999,
            dirty_rate: 1023.0 * 1024.0 * 1024.0,
            throttle: 99,
            stopped: true,
            ..Default::default()
        };
        let text = rounds(&[RoundLine::from(&large)]);
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
    }

    #[test]
    fn the_cost_of_each_side_is_told_as_far_as_it_is_known() {
        let mut both = report(0);
        assert_eq!(cost(&both), Vec::<String>::new());
        (both.cpu_seconds.source, both.cpu_seconds_per_gib.source) = (Some(1.0), Some(0.5));
        both.cpu_seconds.destination = Some(2.0);
        both.peak_rss_bytes.destination = Some(1 << 30);
        both.overhead_rss_bytes.destination = Some(16 << 20);
        let lines = [
            "cost      source 1.00 s of CPU, 0.50 s/GiB",
            "          destination 2.00 s of CPU, 1 GiB of memory at most, 16 MiB beside the guest's",
        ];
        assert_eq!(cost(&both), lines);
    }

    #[test]
    fn a_ratio_of_nothing_is_none() {
        assert_eq!(
            (show_ratio(0, 0), show_ratio(1, 1000), show_ratio(43, 100)),
            ("-".into(), "0.1 %".into(), "43 %".into())
        );
        assert_eq!((show_ratio(0, 5), show_ratio(103, 100)), ("0 %".into(), "103 %".into()));
    }

    #[test]
    fn the_last_line_is_the_proof() {
        let mut report = report(2);
        report.guest_self_check = Some("ok".to_owned());
        assert!(show(&report).ends_with("\n262144 pages identical, guest self-check OK\n"), "{}", show(&report));
        report.guest_self_check = Some("page 0x5 is wrong".to_owned());
        assert!(show(&report).contains("FAILED: page 0x5"));
    }

    #[test]
    fn nothing_is_claimed_that_was_not_checked() {
        let error = Error::Misuse("no such luck".to_owned());
        let failed = Failed::SourceStillOwns { error, report: Box::default() };
        let text = show(&FinalReport::new(Role::Send, &Err(failed)));
        assert!(text.contains("memory not compared") && text.contains("no such luck"), "{text}");
        assert!(!text.contains("identical") && !text.contains("downtime"), "{text}");
    }

    #[test]
    fn columns_line_up_and_long_tables_lose_their_middle() {
        let text = show(&report(3));
        let ends: Vec<usize> = text.lines().take(4).map(|line| line.trim_end().len()).collect();
        assert!(ends.iter().all(|&end| end == ends[0]), "{text}");
        let text = show(&report(40));
        assert!(text.contains("... 24 more"), "{text}");
        assert!(text.lines().count() < 30, "{text}");
    }
}
