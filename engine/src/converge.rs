//! When to stop: the policy that hears each round's facts and answers one question.

use std::time::Duration;

use crate::stats::RoundReport;

/// What a policy is told beside the round itself.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Situation {
    /// Longest acceptable downtime, as it stands now.
    pub downtime_limit: Duration,
    /// Downtime if the switch-over came now, machine state included.
    pub predicted_downtime: Duration,
    /// What of that is owed to dirty pages: all that another round can make shorter.
    pub pages_downtime: Duration,
    /// The least that a downtime can be, without dirty pages and at the best rate that the link has shown: the machine state
    /// and the exchange at the end.
    pub fixed_downtime: Duration,
    /// Throttle in force, in per cent.
    pub throttle: u8,
    /// Most throttle allowed; 0 when the user or the VMM allows none.
    pub max_throttle: u8,
}

/// What to do after a round.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Decision {
    /// Send what has become dirty, the guest running.
    AnotherRound,
    /// The same, with the vCPUs slowed down by this many per cent.
    Throttle(u8),
    /// Stop the guest and send the rest.
    SwitchOver,
}

/// Decides after every round; touches nothing.
pub trait Convergence: Send {
    /// A round has ended and been acknowledged, and the dirty pages were counted.
    fn decide(&mut self, round: &RoundReport, situation: &Situation) -> Decision;
}

/// The default policy: switch over when the predicted downtime fits the limit and another round
/// would not make it much shorter; slow the guest down when rounds stop shrinking.
#[derive(Debug, Default)]
pub struct Adaptive {
    previous_dirty: Option<u64>,
    fitting_rounds: u32,
    stuck_rounds: u32,
}

/// A downtime below this is not worth another round to shorten: 5 ms of it are the forecast's fixed part.
const GOOD_ENOUGH: Duration = Duration::from_millis(6);

/// Rounds spent on shortening a downtime that fits already.
const MAX_POLISHING_ROUNDS: u32 = 4;

/// Dirty pages that make up no more than this share of a downtime are not worth another round.
const NEXT_TO_NOTHING: f64 = 0.05;

/// Where the limit cannot be met whatever is sent, pages may add this share to the least that a downtime can be.
const SHARE_BEYOND: f64 = 0.25;

/// A round that leaves more than this share of the previous one's dirty pages has not paid.
const SHRINKING: f64 = 0.8;

/// First throttle and later steps, in per cent, where the dirty rate does not ask for more. The
/// start is QEMU's `cpu-throttle-initial`, the step its `cpu-throttle-increment`.
const THROTTLE_START: u8 = 20;
const THROTTLE_STEP: u8 = 10;

impl Convergence for Adaptive {
    fn decide(&mut self, round: &RoundReport, situation: &Situation) -> Decision {
        let previous = self.previous_dirty.replace(round.dirty_pages);
        if situation.predicted_downtime <= situation.downtime_limit || is_as_good_as_it_gets(situation) {
            self.fitting_rounds += 1;
            return self.polish(round, situation);
        }
        self.fitting_rounds = 0;
        let shrinks = previous.is_none_or(|before| (round.dirty_pages as f64) < before as f64 * SHRINKING);
        self.stuck_rounds = if shrinks { 0 } else { self.stuck_rounds + 1 };
        if self.stuck_rounds > 0 && situation.throttle < situation.max_throttle {
            return Decision::Throttle(next_throttle(round, situation));
        }
        Decision::AnotherRound
    }
}

impl Adaptive {
    /// The downtime fits: is another round worth it?
    fn polish(&self, round: &RoundReport, situation: &Situation) -> Decision {
        let halves = round.dirty_pages * 2 < round.pages;
        let long = situation.predicted_downtime > GOOD_ENOUGH && !is_as_good_as_it_gets(situation);
        let pays = halves && long && self.fitting_rounds <= MAX_POLISHING_ROUNDS;
        if pays { Decision::AnotherRound } else { Decision::SwitchOver }
    }
}

/// Whether no further round can make the downtime much shorter, be it within the limit or not.
fn is_as_good_as_it_gets(situation: &Situation) -> bool {
    let Situation { downtime_limit, predicted_downtime, pages_downtime, fixed_downtime, .. } = situation;
    let beyond = fixed_downtime > downtime_limit && *pages_downtime <= fixed_downtime.mul_f64(SHARE_BEYOND);
    beyond || *pages_downtime <= predicted_downtime.mul_f64(NEXT_TO_NOTHING)
}

/// The throttle that makes the next round half as long, or one step more if that is higher.
///
/// A guest that writes `d` bytes of pages a second over a link that carries `r` shrinks its rounds by
/// `d / r`; taking the share `1 - r / 2d` of its time away makes that one half. `d` is the rate at which it was
/// seen to write, and not what was dirty in the end: a guest that has written all of its working set before a
/// round is over looks as if it wrote no faster than the link carries.
fn next_throttle(round: &RoundReport, situation: &Situation) -> u8 {
    let step = if situation.throttle == 0 { THROTTLE_START } else { situation.throttle.saturating_add(THROTTLE_STEP) };
    let carried = round.wire_rate * round.bytes as f64 / (round.wire_bytes.max(1)) as f64;
    let running = 1.0 - f64::from(situation.throttle) / 100.0;
    let writes = round.write_rate.max(round.dirty_rate);
    // A round in which nothing had to be sent does not tell what the link carries.
    let told = writes > 0.0 && round.wire_bytes > 0;
    let needed = if told { 1.0 - running * carried / (2.0 * writes) } else { 0.0 };
    let wanted = step.max((needed * 100.0).clamp(0.0, 99.0) as u8);
    wanted.min(situation.max_throttle)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn situation(predicted_ms: u64, throttle: u8) -> Situation {
        Situation {
            downtime_limit: Duration::from_millis(300),
            predicted_downtime: Duration::from_millis(predicted_ms),
            pages_downtime: Duration::from_millis(predicted_ms.saturating_sub(4)),
            fixed_downtime: Duration::from_millis(4),
            throttle,
            max_throttle: 99,
        }
    }

    fn round(pages: u64, dirty_pages: u64) -> RoundReport {
        let bytes = pages * 4096;
        RoundReport {
            pages,
            dirty_pages,
            bytes,
            wire_bytes: bytes,
            wire_rate: 1e8,
            dirty_rate: 2e8,
            ..Default::default()
        }
    }

    #[test]
    fn an_idle_guest_switches_over_after_the_first_round() {
        assert_eq!(Adaptive::default().decide(&round(100_000, 10), &situation(4, 0)), Decision::SwitchOver);
    }

    #[test]
    fn a_fitting_downtime_is_polished_while_rounds_still_halve_and_not_for_ever() {
        let mut policy = Adaptive::default();
        assert_eq!(policy.decide(&round(100_000, 8000), &situation(280, 0)), Decision::AnotherRound);
        assert_eq!(policy.decide(&round(8000, 7000), &situation(250, 0)), Decision::SwitchOver);
        let mut policy = Adaptive::default();
        let decisions: Vec<_> = (0..9).map(|_| policy.decide(&round(1000, 400), &situation(200, 0))).collect();
        assert_eq!(decisions.iter().filter(|&&d| d == Decision::AnotherRound).count(), 4);
    }

    #[test]
    fn rounds_that_stop_shrinking_throttle_harder_and_harder_up_to_the_maximum() {
        let mut policy = Adaptive::default();
        let mut throttle = 0;
        assert_eq!(policy.decide(&round(50_000, 50_000), &situation(9000, 0)), Decision::AnotherRound);
        for _ in 0..20 {
            if let Decision::Throttle(next) = policy.decide(&round(50_000, 50_000), &situation(9000, throttle)) {
                assert!(next > throttle);
                throttle = next;
            }
        }
        assert_eq!(throttle, 99);
        assert_eq!(policy.decide(&round(50_000, 50_000), &situation(9000, 99)), Decision::AnotherRound);
    }

    /// A round of 9 s in which the guest wrote its whole working set several times over.
    #[test]
    fn a_working_set_that_rounds_outlast_does_not_hide_how_fast_it_is_written() {
        let mut policy = Adaptive::default();
        let all = RoundReport { dirty_rate: 24e6, write_rate: 60e6, ..round(50_000, 50_000) };
        let all = RoundReport { wire_rate: 12e6, wire_bytes: all.bytes / 2, ..all };
        assert_eq!(policy.decide(&all, &situation(9000, 0)), Decision::AnotherRound);
        // Four fifths less of 60 MB/s is half of what the link carries.
        assert_eq!(policy.decide(&all, &situation(9000, 0)), Decision::Throttle(80));
        // It still does not shrink: it writes 30 MB/s in its bursts.
        let still = RoundReport { write_rate: 30e6, ..all };
        assert_eq!(policy.decide(&still, &situation(9000, 80)), Decision::Throttle(92));
    }

    #[test]
    fn a_round_that_had_to_send_nothing_does_not_stop_the_guest() {
        let mut policy = Adaptive::default();
        let silent = RoundReport { wire_bytes: 0, wire_rate: 0.0, ..round(50_000, 50_000) };
        assert_eq!(policy.decide(&silent, &situation(9000, 0)), Decision::AnotherRound);
        assert_eq!(policy.decide(&silent, &situation(9000, 0)), Decision::Throttle(20));
    }

    #[test]
    fn a_limit_that_the_machine_state_alone_exceeds_is_not_waited_for() {
        let tight = |pages_ms: u64| Situation {
            downtime_limit: Duration::from_millis(10),
            fixed_downtime: Duration::from_millis(12),
            pages_downtime: Duration::from_millis(pages_ms),
            ..situation(12 + pages_ms, 0)
        };
        assert_eq!(Adaptive::default().decide(&round(100_000, 0), &tight(0)), Decision::SwitchOver);
        assert_eq!(Adaptive::default().decide(&round(100, 60), &tight(3)), Decision::SwitchOver);
        assert_eq!(Adaptive::default().decide(&round(100_000, 40_000), &tight(78)), Decision::AnotherRound);
    }

    #[test]
    fn a_round_that_was_slow_does_not_make_a_limit_impossible() {
        // The state would take 1.7 s at the rate of the last round, and 40 ms at the best.
        let slow = |pages_ms: u64| Situation {
            fixed_downtime: Duration::from_millis(45),
            pages_downtime: Duration::from_millis(pages_ms),
            ..situation(1700 + pages_ms, 0)
        };
        assert_eq!(Adaptive::default().decide(&round(9000, 3000), &slow(400)), Decision::AnotherRound);
        // Nothing is left that a round could take away.
        assert_eq!(Adaptive::default().decide(&round(9000, 0), &slow(0)), Decision::SwitchOver);
    }

    #[test]
    fn without_leave_to_throttle_rounds_go_on() {
        let mut policy = Adaptive::default();
        for _ in 0..5 {
            let situation = Situation { max_throttle: 0, ..situation(9000, 0) };
            assert_eq!(policy.decide(&round(50_000, 50_000), &situation), Decision::AnotherRound);
        }
    }
}
