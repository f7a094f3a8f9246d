//! What is asked of a guest once the migration is over, on the side that has it.

use std::time::{Duration, Instant};

use super::operator::Operator;
use crate::cli::LingerTime;
use crate::guest::{Guest, SelfCheck};
use crate::report::{FinalReport, ms};

/// A guest whose heart has not beaten for this long does not run.
const FIRST_BEAT: Duration = Duration::from_secs(5);

/// How long a guest that goes on for ever runs before it is checked.
const SETTLE: Duration = Duration::from_secs(1);

/// Lets the guest run on, then asks it for its stalls and its self-check.
pub(super) fn question(guest: &mut dyn Guest, operator: &Operator, linger: LingerTime, report: &mut FinalReport) {
    report.guest_heartbeats_after = count_heartbeats(guest, operator, linger);
    report.guest_longest_stall_ms = guest.longest_stall().ok().flatten().map(ms);
    report.guest_self_check = match guest.self_check() {
        Ok(SelfCheck::Ok) => Some("ok".to_owned()),
        Ok(SelfCheck::Wrong(page)) => Some(page),
        Ok(SelfCheck::Unable) => None,
        Err(error) => Some(format!("no answer: {error}")),
    };
}

/// Heartbeats while the guest runs on; `None` when it has no heart.
fn count_heartbeats(guest: &dyn Guest, operator: &Operator, linger: LingerTime) -> Option<u64> {
    let time = match linger {
        LingerTime::For(time) => time,
        LingerTime::Forever => SETTLE,
    };
    let first = first_heartbeat(guest);
    operator.wait(time);
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
        if started.elapsed() > FIRST_BEAT {
            return Some(now + 1);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
