//! What a run of the program ends with: one object that holds the whole truth, for scripts as JSON
//! and for people as a few tables.

mod cost;
mod stages;
mod stalls;
mod tables;

pub(crate) use cost::{Cost, CostClock};
pub(crate) use tables::{show, show_ratio};

use std::time::Duration;

use pageferry::error::{Error, Failed};
use pageferry::stats::{Downtime, Report, RoundReport};
use pageferry::units::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use crate::cli::ExitStatus;
use stages::StagesLine;
use stalls::GuestStalls;

/// How the migration ended.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Outcome {
    /// The guest runs at the destination.
    Completed,
    /// The user ended it; the guest runs at the source.
    Cancelled,
    /// It went wrong; `owner` says where the guest is.
    Failed,
    /// The link broke around the commit; the guest runs on neither side that is known of.
    Undecided,
}

/// Which side has the guest.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Owner {
    Source,
    Destination,
    Undecided,
    /// No guest was ever offered to this destination.
    Nobody,
    /// The guest is in the file that it was to come from.
    File,
}

/// Which side reports, or both in one.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    Send,
    Receive,
    Demo,
    /// The destination is a file.
    Save,
    /// The source is a file.
    Restore,
}

impl Role {
    /// Whether the guest comes here.
    fn is_destination(self) -> bool {
        matches!(self, Self::Receive | Self::Restore)
    }
}

/// The last line of `--json`. Times are in milliseconds, `null` stands for "not known on this side".
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) struct FinalReport {
    /// Always `report`: tells this object from the progress lines.
    pub(crate) event: ReportTag,
    /// Which side reports.
    pub(crate) role: Role,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// Where the guest is.
    pub(crate) owner: Owner,
    /// Why it failed, in words.
    pub(crate) error: Option<String>,
    /// From the start of the migration to its end.
    pub(crate) total_ms: f64,
    /// From the order to pause the guest until it ran at the destination; the sum of the parts.
    /// Measured at the source.
    pub(crate) downtime_ms: Option<f64>,
    /// Where the standstill went.
    pub(crate) downtime_parts_ms: Option<DowntimeParts>,
    /// The longest time between two of the guest's heartbeats: while the migration ran, across the
    /// hand-over, and at the destination. Measured by the guest's own clock; across the hand-over also by
    /// the hosts' wall clocks, since the guest's may stand still there. Of the two the longer counts: between
    /// two hosts it is as right as their clocks agree.
    pub(crate) guest_longest_stall_ms: Option<f64>,
    /// The same, by when it was; the first is no part of it.
    pub(crate) guest_stalls_ms: GuestStalls,
    /// Pages that the guest wrote at the source while it was migrated, per second of the whole migration. The built-in KVM
    /// guest tells it a few times a second: `null` for a migration shorter than that, or a guest that does not tell.
    #[serde(default)]
    pub(crate) guest_pages_per_second: Option<f64>,
    /// Heartbeats after the migration, on the side that has the guest.
    pub(crate) guest_heartbeats_after: Option<u64>,
    /// Every pass over the memory. Known at the source.
    pub(crate) rounds: Vec<RoundLine>,
    /// Bytes on the wire over all connections.
    pub(crate) wire_bytes: u64,
    /// Bytes of guest memory that they stand for; a page counts every time it was dirty. The destination does not
    /// hear of pages that were sent before and had not changed.
    pub(crate) guest_bytes: u64,
    /// What each stage of the encoder saved and cost. Known at the source.
    pub(crate) stages: Option<StagesLine>,
    /// Pages of the guest.
    pub(crate) pages_total: u64,
    /// Page contents sent; a page sent twice counts twice.
    pub(crate) pages_sent: u64,
    /// Pages of zeros, sent as records of a few bytes.
    pub(crate) pages_zero: u64,
    /// Bytes of machine state.
    pub(crate) state_bytes: u64,
    /// The strongest vCPU throttle in per cent.
    pub(crate) throttle_peak_percent: u8,
    /// Whether both sides' digests of all pages were equal.
    pub(crate) digest_match: Option<bool>,
    /// Whether both sides, hashing all memory again, agreed; only with `--verify full`.
    pub(crate) full_verify_match: Option<bool>,
    /// What the guest said after checking every byte of its memory: `ok`, or the first wrong page.
    pub(crate) guest_self_check: Option<String>,
    /// How many pages the guest checked for that; the built-in KVM guest leaves out its stacks and the last
    /// 388 KiB below 1 MiB.
    pub(crate) guest_pages_checked: Option<u64>,
    /// How the guest ended after the migration, on the side that has it: a crash, a reset or a switch-off.
    pub(crate) guest_ended: Option<String>,
    /// CPU time that the migration took from each side's host.
    pub(crate) cpu_seconds: PerSide<f64>,
    /// The same per GiB of `guest_bytes`.
    pub(crate) cpu_seconds_per_gib: PerSide<f64>,
    /// CPU time that the guest itself used on each side meanwhile; not part of `cpu_seconds`.
    pub(crate) guest_cpu_seconds: PerSide<f64>,
    /// The most memory each side's process ever held, guest memory included.
    pub(crate) peak_rss_bytes: PerSide<u64>,
    /// The part of it that is not the guest's memory.
    pub(crate) overhead_rss_bytes: PerSide<u64>,
}

/// The tag of a final report.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
#[serde(rename_all = "snake_case")]
pub(crate) enum ReportTag {
    #[default]
    Report,
}

/// One value of each side; `null` where this program cannot know it.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug, Default)]
pub(crate) struct PerSide<T> {
    pub(crate) source: Option<T>,
    pub(crate) destination: Option<T>,
}

impl<T> PerSide<T> {
    fn of(&mut self, destination: bool) -> &mut Option<T> {
        if destination { &mut self.destination } else { &mut self.source }
    }
}

/// The parts of the standstill; they add up to `downtime_ms`.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
pub(crate) struct DowntimeParts {
    pub(crate) pause: f64,
    pub(crate) harvest: f64,
    pub(crate) pages: f64,
    pub(crate) state: f64,
    pub(crate) digest: f64,
    pub(crate) commit: f64,
    pub(crate) resume: f64,
}

/// One pass over the memory.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct RoundLine {
    pub(crate) round: u32,
    pub(crate) stopped: bool,
    pub(crate) pages: u64,
    pub(crate) zero_pages: u64,
    pub(crate) bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) duration_ms: f64,
    pub(crate) wire_bytes_per_second: f64,
    pub(crate) dirty_pages: u64,
    pub(crate) dirty_bytes_per_second: f64,
    pub(crate) written_bytes_per_second: f64,
    pub(crate) predicted_downtime_ms: Option<f64>,
    pub(crate) throttle_percent: u8,
    pub(crate) stages: StagesLine,
}

pub(crate) fn ms(span: Duration) -> f64 {
    span.as_secs_f64() * 1e3
}

impl From<&RoundReport> for RoundLine {
    fn from(round: &RoundReport) -> Self {
        Self {
            round: round.round,
            stopped: round.stopped,
            pages: round.pages,
            zero_pages: round.zero_pages,
            bytes: round.bytes,
            wire_bytes: round.wire_bytes,
            duration_ms: ms(round.duration),
            wire_bytes_per_second: round.wire_rate,
            dirty_pages: round.dirty_pages,
            dirty_bytes_per_second: round.dirty_rate,
            written_bytes_per_second: round.write_rate,
            predicted_downtime_ms: round.predicted_downtime.map(ms),
            throttle_percent: round.throttle,
            stages: StagesLine::from(&round.stages),
        }
    }
}

impl From<&Downtime> for DowntimeParts {
    fn from(downtime: &Downtime) -> Self {
        Self {
            pause: ms(downtime.pause),
            harvest: ms(downtime.harvest),
            pages: ms(downtime.pages),
            state: ms(downtime.state),
            digest: ms(downtime.digest),
            commit: ms(downtime.commit),
            resume: ms(downtime.resume),
        }
    }
}

impl DowntimeParts {
    /// Each part with its name, in the order in which they happen.
    pub(crate) fn named(&self) -> [(&'static str, f64); 7] {
        [
            ("pause", self.pause),
            ("harvest", self.harvest),
            ("pages", self.pages),
            ("state", self.state),
            ("digest", self.digest),
            ("commit", self.commit),
            ("resume", self.resume),
        ]
    }
}

impl FinalReport {
    /// The report of one side, from what the engine returned. What only the guest and the host can
    /// tell is filled in afterwards.
    pub(crate) fn new(role: Role, result: &Result<Report, Failed>) -> Self {
        let (outcome, owner) = outcome_of(result);
        let report = match result {
            Ok(report) => report,
            Err(failed) => failed.report(),
        };
        let covered = report.stages.pages();
        let pages_heard_of = if covered > 0 { covered } else { report.pages_sent + report.pages_zero };
        let knows_downtime = !role.is_destination() && !report.downtime.total().is_zero();
        Self {
            event: ReportTag::Report,
            role,
            outcome,
            owner,
            error: result.as_ref().err().map(ToString::to_string),
            total_ms: ms(report.total),
            downtime_ms: knows_downtime.then(|| ms(report.downtime.total())),
            downtime_parts_ms: knows_downtime.then(|| DowntimeParts::from(&report.downtime)),
            guest_longest_stall_ms: None,
            guest_stalls_ms: GuestStalls::default(),
            guest_pages_per_second: None,
            guest_heartbeats_after: None,
            rounds: report.rounds.iter().map(RoundLine::from).collect(),
            wire_bytes: report.wire_bytes,
            guest_bytes: pages_heard_of * PAGE_SIZE as u64,
            stages: (covered > 0).then(|| StagesLine::from(&report.stages)),
            pages_total: report.pages_total,
            pages_sent: report.pages_sent,
            pages_zero: report.pages_zero,
            state_bytes: report.state_bytes,
            throttle_peak_percent: report.throttle_peak,
            digest_match: report.digest_match,
            full_verify_match: report.full_verify_match,
            guest_self_check: None,
            guest_pages_checked: None,
            guest_ended: None,
            cpu_seconds: PerSide::default(),
            cpu_seconds_per_gib: PerSide::default(),
            guest_cpu_seconds: PerSide::default(),
            peak_rss_bytes: PerSide::default(),
            overhead_rss_bytes: PerSide::default(),
        }
    }

    /// Adds what the migration took from this side's host.
    pub(crate) fn charge(&mut self, cost: &Cost) {
        let at_destination = self.role.is_destination();
        self.cpu_seconds.of(at_destination).replace(cost.cpu_seconds);
        self.guest_cpu_seconds.of(at_destination).replace(cost.guest_cpu_seconds);
        *self.peak_rss_bytes.of(at_destination) = cost.peak_rss;
        *self.overhead_rss_bytes.of(at_destination) = cost.overhead_rss;
        self.share_out_cpu();
    }

    fn share_out_cpu(&mut self) {
        let gib = self.guest_bytes as f64 / f64::from(1 << 30);
        let per_gib = |seconds: Option<f64>| seconds.filter(|_| gib > 0.0).map(|seconds| seconds / gib);
        let PerSide { source, destination } = self.cpu_seconds;
        self.cpu_seconds_per_gib = PerSide { source: per_gib(source), destination: per_gib(destination) };
    }

    /// The report of a run that came to nothing before a migration began.
    pub(crate) fn not_started(role: Role, error: String) -> Self {
        let error = Error::Misuse(error);
        let mut report = Self::new(role, &Err(Failed::SourceStillOwns { error, report: Box::default() }));
        report.owner = Owner::Nobody;
        report
    }

    /// The report of a run that the operator ended before a migration began.
    pub(crate) fn ended_early(role: Role) -> Self {
        let error = Error::Cancelled;
        Self::new(role, &Err(Failed::SourceStillOwns { error, report: Box::default() }))
    }

    /// Adds what the destination knows to the source's report.
    pub(crate) fn merge_destination(&mut self, destination: &Self) {
        self.cpu_seconds.destination = destination.cpu_seconds.destination;
        self.guest_cpu_seconds.destination = destination.guest_cpu_seconds.destination;
        self.peak_rss_bytes.destination = destination.peak_rss_bytes.destination;
        self.overhead_rss_bytes.destination = destination.overhead_rss_bytes.destination;
        self.share_out_cpu();
        if self.owner == Owner::Source {
            return;
        }
        self.guest_stalls_ms.merge(&destination.guest_stalls_ms);
        self.guest_longest_stall_ms = self.guest_stalls_ms.longest();
        self.guest_heartbeats_after = destination.guest_heartbeats_after;
        self.guest_self_check.clone_from(&destination.guest_self_check);
        self.guest_pages_checked = destination.guest_pages_checked;
        self.guest_ended.clone_from(&destination.guest_ended);
        self.error = self.error.take().or_else(|| destination.error.clone());
        if destination.owner == Owner::Destination && destination.outcome != self.outcome {
            // The destination knows whether it took over; the source could not hear it.
            (self.outcome, self.owner) = (destination.outcome, destination.owner);
        }
    }

    /// The destination ended without a report: nobody can tell what became of a guest that was handed over to it.
    pub(crate) fn lose_destination(&mut self) {
        if self.owner == Owner::Destination {
            self.outcome = Outcome::Failed;
            let lost = "the destination ended without a report: the guest handed over to it is gone or unchecked";
            self.error.get_or_insert_with(|| lost.to_owned());
        }
    }

    /// The built-in guest can always be asked for its self-check: without one it has not arrived well.
    pub(crate) fn require_self_check(&mut self) {
        if self.owner == Owner::Destination && self.outcome == Outcome::Completed {
            self.guest_self_check.get_or_insert_with(|| "no answer".to_owned());
        }
    }

    /// The exit code that fits this end.
    pub(crate) fn exit_status(&self) -> ExitStatus {
        let wrong = self.guest_self_check.as_deref().is_some_and(|said| said != "ok");
        match (self.outcome, self.owner) {
            _ if wrong || self.guest_ended.is_some() || self.guest_heartbeats_after == Some(0) => {
                ExitStatus::GuestWrong
            }
            (Outcome::Completed, _) => ExitStatus::Completed,
            (Outcome::Cancelled, _) => ExitStatus::Cancelled,
            (Outcome::Undecided, _) => ExitStatus::Undecided,
            (Outcome::Failed, Owner::Destination) => ExitStatus::FailedAfterwards,
            (Outcome::Failed, _) => ExitStatus::Failed,
        }
    }
}

fn outcome_of(result: &Result<Report, Failed>) -> (Outcome, Owner) {
    match result {
        Ok(_) => (Outcome::Completed, Owner::Destination),
        Err(Failed::SourceStillOwns { error: Error::Cancelled, .. }) => (Outcome::Cancelled, Owner::Source),
        Err(Failed::DestinationOwns { .. }) => (Outcome::Failed, Owner::Destination),
        Err(Failed::Undecided { .. }) => (Outcome::Undecided, Owner::Undecided),
        Err(_) => (Outcome::Failed, Owner::Source),
    }
}

#[cfg(test)]
mod tests {
    use pageferry::error::Unsettled;
    use pageferry::wire::SessionId;

    use super::*;

    fn completed() -> FinalReport {
        let downtime =
            Downtime { pause: Duration::from_millis(1), state: Duration::from_millis(3), ..Default::default() };
        let mut report = Report::default();
        report.downtime = downtime;
        report.rounds = vec![RoundReport::default()];
        report.stages.literal_pages = (2 << 30) / PAGE_SIZE as u64;
        FinalReport::new(Role::Send, &Ok(report))
    }

    fn failed(failed: Failed) -> FinalReport {
        FinalReport::new(Role::Send, &Err(failed))
    }

    #[test]
    fn a_report_survives_json_and_is_one_line() {
        let text = serde_json::to_string(&completed()).unwrap();
        assert!(!text.contains('\n') && text.starts_with("{\"event\":\"report\""), "{text}");
        let back: FinalReport = serde_json::from_str(&text).unwrap();
        assert_eq!((back.downtime_ms, back.rounds.len()), (Some(4.0), 1));
    }

    #[test]
    fn the_parts_add_up_to_the_downtime() {
        let report = completed();
        let sum: f64 = report.downtime_parts_ms.unwrap().named().iter().map(|(_, part)| part).sum();
        assert!((sum - report.downtime_ms.unwrap()).abs() < 1e-9);
    }

    #[test]
    fn every_end_has_its_outcome_owner_and_exit_code() {
        let report = Box::<Report>::default;
        let cancelled = failed(Failed::SourceStillOwns { error: Error::Cancelled, report: report() });
        assert_eq!((cancelled.outcome, cancelled.exit_status()), (Outcome::Cancelled, ExitStatus::Cancelled));
        let error = Error::TimedOut(Duration::from_secs(1));
        let timed_out = failed(Failed::SourceStillOwns { error, report: report() });
        assert_eq!((timed_out.owner, timed_out.exit_status()), (Owner::Source, ExitStatus::Failed));
        let error = Error::TimedOut(Duration::from_secs(1));
        let undecided = failed(Failed::Undecided {
            unsettled: Unsettled { session: SessionId([0; 16]), run: true },
            error,
            report: report(),
        });
        assert_eq!((undecided.owner, undecided.exit_status()), (Owner::Undecided, ExitStatus::Undecided));
        let error = Error::TimedOut(Duration::from_secs(1));
        let late = failed(Failed::DestinationOwns { error, report: report() });
        assert_eq!((late.owner, late.exit_status()), (Owner::Destination, ExitStatus::FailedAfterwards));
        assert_eq!(completed().exit_status(), ExitStatus::Completed);
    }

    #[test]
    fn a_guest_with_a_wrong_page_or_without_a_heartbeat_is_never_a_success() {
        let mut report = completed();
        report.guest_self_check = Some("page 0x12 is wrong".to_owned());
        assert_eq!(report.exit_status(), ExitStatus::GuestWrong);
        let mut report = completed();
        (report.guest_self_check, report.guest_heartbeats_after) = (Some("ok".to_owned()), Some(0));
        assert_eq!(report.exit_status(), ExitStatus::GuestWrong);
    }

    #[test]
    fn a_guest_that_was_lost_or_not_checked_or_has_ended_is_never_a_success() {
        let mut report = completed();
        report.lose_destination();
        assert_eq!((report.exit_status(), report.error.is_some()), (ExitStatus::FailedAfterwards, true));
        let mut report = completed();
        report.require_self_check();
        assert_eq!(report.exit_status(), ExitStatus::GuestWrong);
        let mut report = completed();
        report.guest_ended = Some("it was reset".to_owned());
        assert_eq!(report.exit_status(), ExitStatus::GuestWrong);
    }

    #[test]
    fn a_lost_destination_matters_only_to_a_guest_that_is_there() {
        let error = Error::TimedOut(Duration::from_secs(1));
        let mut report = failed(Failed::SourceStillOwns { error, report: Box::default() });
        let before = report.error.clone();
        report.lose_destination();
        report.require_self_check();
        assert_eq!((report.exit_status(), report.error), (ExitStatus::Failed, before));
    }

    #[test]
    fn the_destination_adds_what_only_it_knows() {
        let mut both = completed();
        both.guest_stalls_ms = GuestStalls { before: Some(8.0), during: Some(2.0), after: None };
        both.cpu_seconds.source = Some(1.0);
        let mut destination = completed();
        destination.guest_stalls_ms.during = Some(7.0);
        destination.guest_self_check = Some("ok".to_owned());
        destination.cpu_seconds.destination = Some(3.0);
        both.merge_destination(&destination);
        assert_eq!(both.guest_longest_stall_ms, Some(7.0));
        assert_eq!(both.guest_self_check.as_deref(), Some("ok"));
        assert_eq!(both.cpu_seconds, PerSide { source: Some(1.0), destination: Some(3.0) });
        assert_eq!(both.cpu_seconds_per_gib, PerSide { source: Some(0.5), destination: Some(1.5) });
    }

    #[test]
    fn a_side_is_charged_with_its_own_cost() {
        let cost = Cost { cpu_seconds: 3.0, guest_cpu_seconds: 0.5, peak_rss: Some(9), overhead_rss: None };
        let mut report = completed();
        report.charge(&cost);
        assert_eq!(report.cpu_seconds, PerSide { source: Some(3.0), destination: None });
        assert_eq!(report.cpu_seconds_per_gib, PerSide { source: Some(1.5), destination: None });
        report.role = Role::Receive;
        report.charge(&cost);
        assert_eq!(report.peak_rss_bytes, PerSide { source: Some(9), destination: Some(9) });
    }
}
