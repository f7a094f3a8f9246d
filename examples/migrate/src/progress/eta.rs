//! An estimate of the remaining time that people can watch without getting dizzy.
//!
//! The engine estimates anew several times a second from rates that jump. What is kept here is the
//! moment of the end: it follows the estimates slowly, and later ones more slowly than earlier ones.

use std::time::Duration;

/// The estimated end covers about two thirds of the way to a new estimate in this time.
const FOLLOWS_WITHIN: f64 = 2.0;

/// The shown time never grows faster than this many seconds a second.
const MOST_GROWTH: f64 = 1.0;

/// Smooths estimates of one migration.
#[derive(Debug, Default)]
pub(crate) struct Eta {
    /// Seconds since the start: when the last estimate was taken in, and the end it led to.
    known: Option<(f64, f64)>,
}

impl Eta {
    /// Takes in an estimate; returns the time to show. `None` while nobody can tell.
    pub(crate) fn update(&mut self, elapsed: Duration, remaining: Option<Duration>) -> Option<Duration> {
        let now = elapsed.as_secs_f64();
        let Some(remaining) = remaining else {
            self.known = None;
            return None;
        };
        let estimate = now + remaining.as_secs_f64();
        let end = match self.known {
            None => estimate,
            Some((before, end)) => follow(end, estimate, (now - before).max(0.0)),
        };
        self.known = Some((now, end));
        Duration::try_from_secs_f64(end - now).ok().or(Some(Duration::ZERO))
    }
}

fn follow(end: f64, estimate: f64, passed: f64) -> f64 {
    let share = 1.0 - (-passed / FOLLOWS_WITHIN).exp();
    let step = (estimate - end) * share;
    end + step.min(passed * (1.0 + MOST_GROWTH))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(value: f64) -> Duration {
        Duration::from_secs_f64(value)
    }

    /// Shown times for estimates that come four times a second.
    fn shown(estimates: impl IntoIterator<Item = f64>) -> Vec<f64> {
        let mut eta = Eta::default();
        let show = |(index, estimate)| eta.update(seconds(f64::from(index) * 0.25), Some(seconds(estimate)));
        (0u32..).zip(estimates).filter_map(show).map(|shown| shown.as_secs_f64()).collect()
    }

    #[test]
    fn a_right_estimate_is_shown_as_it_is() {
        let estimates: Vec<f64> = (0..40).map(|index| 10.0 - f64::from(index) * 0.25).collect();
        for (shown, estimate) in shown(estimates.clone()).iter().zip(estimates) {
            assert!((shown - estimate).abs() < 1e-6, "{shown} instead of {estimate}");
        }
    }

    #[test]
    fn wild_estimates_never_make_it_jump_up() {
        let wild = (0..200).map(|index| if index % 2 == 0 { 2.0 } else { 500.0 });
        let times = shown(wild);
        let growth = times.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::MIN, f64::max);
        assert!(growth <= 0.25 * MOST_GROWTH + 1e-9, "grew by {growth} s in a quarter of a second");
    }

    #[test]
    fn it_reaches_an_estimate_that_stays() {
        let times = shown([60.0; 200]);
        assert!((times[199] - 60.0).abs() < 3.0, "{}", times[199]);
        let dropped = shown((0..200).map(|index| if index == 0 { 600.0 } else { 5.0 }));
        assert!(dropped[199] < 10.0, "{}", dropped[199]);
    }

    #[test]
    fn it_is_unknown_while_nobody_can_tell_and_starts_afresh_after_that() {
        let mut eta = Eta::default();
        assert_eq!(eta.update(seconds(1.0), Some(seconds(9.0))), Some(seconds(9.0)));
        assert_eq!(eta.update(seconds(2.0), None), None);
        assert_eq!(eta.update(seconds(3.0), Some(seconds(70.0))), Some(seconds(70.0)));
    }
}
