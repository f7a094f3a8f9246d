//! What is asked of a guest once the migration is over, on the side that has it.

use std::time::{Duration, Instant};

use super::operator::{Operator, Wish};
use crate::cli::LingerTime;
use crate::guest::{Guest, SelfCheck};
use crate::report::{FinalReport, ms};

/// A guest whose heart has not beaten for this long does not run.
const FIRST_BEAT: Duration = Duration::from_secs(5);

/// How long a guest that goes on for ever runs before it is checked.
const SETTLE: Duration = Duration::from_secs(1);

/// How often to look whether the guest has ended.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Asks the guest for its stalls, lets it run on, and asks for those since then and for its self-check.
pub(super) fn question(guest: &mut dyn Guest, operator: &Operator, linger: LingerTime, report: &mut FinalReport) {
    let first = first_heartbeat(guest);
    report.guest_stalls_ms.during = longest_stall(guest);
    // One that gave no answer is not asked again and again.
    let forgot = report.guest_stalls_ms.during.is_some() && guest.reset_stall().is_ok();
    report.guest_heartbeats_after = count_heartbeats(guest, first, operator, linger);
    report.guest_stalls_ms.after = if forgot { longest_stall(guest) } else { None };
    report.guest_longest_stall_ms = report.guest_stalls_ms.longest();
    report.guest_self_check = match guest.self_check() {
        Ok(SelfCheck::Ok { pages }) => {
            report.guest_pages_checked = Some(pages);
            Some("ok".to_owned())
        }
        Ok(SelfCheck::Wrong(page)) => Some(page),
        Ok(SelfCheck::Unable) => None,
        Err(error) => Some(format!("no answer: {error}")),
    };
    report.guest_ended = guest.ended();
}

/// In milliseconds; `None` if this guest does not tell, or does not answer.
pub(super) fn longest_stall(guest: &mut dyn Guest) -> Option<f64> {
    guest.longest_stall().ok().flatten().map(ms)
}

/// Lets the guest run until it ends by itself, which is returned, or the operator ends the program.
pub(super) fn run_on(guest: &dyn Guest, operator: &Operator) -> Option<String> {
    loop {
        if let Some(end) = guest.ended() {
            return Some(end);
        }
        if operator.wait(LOOK_UP) == Wish::Stop {
            return None;
        }
    }
}

/// Lets the guest run for a time, unless it ends or the operator ends the program.
fn run_for(time: Duration, guest: &dyn Guest, operator: &Operator) {
    let until = Instant::now() + time;
    while guest.ended().is_none() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || operator.wait(left.min(LOOK_UP)) == Wish::Stop {
            return;
        }
    }
}

/// Heartbeats while the guest runs on, from its first one on; `None` when it has no heart.
fn count_heartbeats(guest: &dyn Guest, first: Option<u64>, operator: &Operator, linger: LingerTime) -> Option<u64> {
    let time = match linger {
        LingerTime::For(time) => time,
        LingerTime::Forever => SETTLE,
    };
    run_for(time, guest, operator);
    Some((guest.heartbeats()? + 1).saturating_sub(first?))
}

/// Waits for a first beat: without one the guest does not run. `None` when it has no heart.
fn first_heartbeat(guest: &dyn Guest) -> Option<u64> {
    let started = Instant::now();
    let before = guest.heartbeats()?;
    loop {
        let now = guest.heartbeats()?;
        if now > before {
            return Some(now);
        }
        if started.elapsed() > FIRST_BEAT || guest.ended().is_some() {
            return Some(now + 1);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[cfg(test)]
mod tests {
    use pageferry::stats::Report;
    use pageferry::vm::VmResult;

    use super::*;
    use crate::cli::ExitStatus;
    use crate::guest::Written;
    use crate::report::Role;

    /// A guest that tells nothing about itself, like a Linux of the user's.
    struct Silent {
        end: Option<&'static str>,
    }

    impl Guest for Silent {
        fn wait_ready(&mut self, _go_on: &dyn Fn() -> bool) -> VmResult<()> {
            Ok(())
        }
        fn ended(&self) -> Option<String> {
            self.end.map(str::to_owned)
        }
        fn heartbeats(&self) -> Option<u64> {
            None
        }
        fn written(&self) -> Option<Written> {
            None
        }
        fn reset_stall(&mut self) -> VmResult<()> {
            Ok(())
        }
        fn longest_stall(&mut self) -> VmResult<Option<Duration>> {
            Ok(None)
        }
        fn self_check(&mut self) -> VmResult<SelfCheck> {
            Ok(SelfCheck::Unable)
        }
    }

    fn questioned(end: Option<&'static str>, linger: LingerTime) -> FinalReport {
        let operator = Operator::listen(false).unwrap();
        let mut report = FinalReport::new(Role::Receive, &Ok(Report::default()));
        question(&mut Silent { end }, &operator, linger, &mut report);
        report
    }

    #[test]
    fn a_guest_that_has_ended_is_no_success_and_is_not_waited_for() {
        let report = questioned(Some("triple fault"), LingerTime::For(Duration::from_secs(3600)));
        assert_eq!(report.guest_ended.as_deref(), Some("triple fault"));
        assert_eq!(report.exit_status(), ExitStatus::GuestWrong);
        let report = questioned(None, LingerTime::For(Duration::from_millis(1)));
        assert_eq!(report.exit_status(), ExitStatus::Completed);
    }

    #[test]
    fn running_on_ends_with_the_guest() {
        let operator = Operator::listen(false).unwrap();
        assert_eq!(run_on(&Silent { end: Some("reset") }, &operator).as_deref(), Some("reset"));
    }
}
