//! What the source session measures: rounds, the link, and the parts of the downtime.

use std::time::Duration;

use crate::encode::Tally;
use crate::limits::HARVEST_EVERY;
use crate::stats::{Downtime, RoundReport};
use crate::units::PAGE_SIZE;
use crate::wire::Prepared;

/// A round carries enough to say something about the link if it moves at least this much.
const TELLING_BYTES: u64 = 1 << 20;

/// Wire bytes per second assumed until a round has moved enough to tell: 100 Mbps. What is too
/// little to tell is sent in little time on any link worth migrating over.
const UNKNOWN_RATE: f64 = 12.5e6;

/// Writes seen between two harvests that follow each other faster are taken for those of so long a time.
const TELLING_INTERVAL: Duration = HARVEST_EVERY;

/// Parts of the downtime that no round shows: pausing, saving, two messages each way.
const HANDOVER_OVERHEAD: Duration = Duration::from_millis(5);

/// The link and the guest, as far as the rounds have shown them.
#[derive(Debug, Default)]
pub(super) struct Forecast {
    /// Wire bytes per second of the last telling round, or of the fastest if none was.
    wire_rate: f64,
    /// Of all telling rounds; 0 while there was none.
    best_rate: f64,
    told: bool,
    /// Wire bytes per page with content.
    bytes_per_page: f64,
}

impl Forecast {
    /// Learns from a round.
    pub(super) fn learn(&mut self, tally: &Tally, duration: Duration) {
        let rate = tally.wire_bytes as f64 / duration.as_secs_f64().max(1e-6);
        let telling = tally.wire_bytes >= TELLING_BYTES;
        // A small round is mostly latency: its rate is a lower bound.
        if telling || rate > self.wire_rate {
            self.wire_rate = rate;
        }
        if telling {
            self.best_rate = self.best_rate.max(rate);
        }
        self.told |= telling;
        let with_content = tally.pages - tally.zero_pages;
        if with_content > 0 {
            self.bytes_per_page = tally.wire_bytes as f64 / with_content as f64;
        }
    }

    /// Downtime if the switch-over came now.
    pub(super) fn downtime(&self, dirty_pages: u64, state_bytes: u64) -> Duration {
        let per_page = if self.bytes_per_page > 0.0 { self.bytes_per_page } else { PAGE_SIZE as f64 };
        let bytes = dirty_pages as f64 * per_page + state_bytes as f64;
        HANDOVER_OVERHEAD + self.time_for(bytes)
    }

    /// What of a downtime no round makes shorter, at the best that the link has shown: a round may have been slow for other
    /// reasons than the link.
    pub(super) fn fixed_downtime(&self, state_bytes: u64) -> Duration {
        let rate = if self.best_rate > 0.0 { self.best_rate } else { self.wire_rate.max(UNKNOWN_RATE) };
        HANDOVER_OVERHEAD + Duration::from_secs_f64((state_bytes as f64 / rate).min(1e9))
    }

    /// Downtime that must be granted to a switch-over that was forced: what is left may be unlike anything sent before,
    /// and little may have been sent. `rate` is the slowest link that may be supposed, in bytes per second.
    pub(super) fn longest_downtime(&self, dirty_pages: u64, state_bytes: u64, rate: u64) -> Duration {
        let bytes = dirty_pages as f64 * PAGE_SIZE as f64 + state_bytes as f64;
        let rate = if self.told { self.wire_rate.max(1.0) } else { rate.max(1) as f64 };
        HANDOVER_OVERHEAD + Duration::from_secs_f64((bytes / rate).min(1e9))
    }

    /// How many pages can be sent within a time; 0 until a round has told.
    pub(super) fn pages_within(&self, time: Duration) -> u64 {
        if !self.told {
            return 0;
        }
        let per_page = self.bytes_per_page.max(64.0);
        (self.wire_rate * time.as_secs_f64() / per_page) as u64
    }

    /// Time that bytes take on the link.
    pub(super) fn time_for(&self, bytes: f64) -> Duration {
        let rate = if self.told { self.wire_rate.max(1.0) } else { self.wire_rate.max(UNKNOWN_RATE) };
        Duration::from_secs_f64((bytes / rate).min(1e9))
    }
}

/// A round under way.
#[derive(Debug, Clone)]
pub(super) struct OpenRound {
    pub(super) number: u32,
    pub(super) started: Duration,
    pub(super) stopped: bool,
    pub(super) throttle: u8,
    pub(super) tally: Tally,
    /// Bytes of pages per second that the guest was seen to write between two harvests: the most, and what came next to it.
    pub(super) write_rates: [f64; 2],
}

impl OpenRound {
    /// A harvest has seen so many writes of pages since the one before.
    pub(super) fn learn_writes(&mut self, pages: u64, interval: Duration) {
        let rate = (pages * PAGE_SIZE as u64) as f64 / interval.max(TELLING_INTERVAL).as_secs_f64();
        let [most, next] = self.write_rates;
        self.write_rates = [most.max(rate), next.max(rate.min(most))];
    }

    /// The report of the round, once it has ended and dirty pages were counted.
    pub(super) fn report(&self, now: Duration, dirty_pages: u64) -> RoundReport {
        let duration = now.saturating_sub(self.started);
        let seconds = duration.as_secs_f64().max(1e-6);
        let page = PAGE_SIZE as u64;
        let dirty_rate = if self.stopped { 0.0 } else { (dirty_pages * page) as f64 / seconds };
        RoundReport {
            round: self.number,
            stopped: self.stopped,
            pages: self.tally.pages,
            zero_pages: self.tally.zero_pages,
            bytes: self.tally.pages * page,
            wire_bytes: self.tally.wire_bytes,
            duration,
            wire_rate: self.tally.wire_bytes as f64 / seconds,
            dirty_pages,
            dirty_rate,
            write_rate: if self.stopped { 0.0 } else { self.write_rates[1].max(dirty_rate) },
            predicted_downtime: None,
            throttle: self.throttle,
            stages: self.tally.stages,
        }
    }
}

/// Moments of the standstill, from which its parts are computed so that they add up.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Standstill {
    pub(super) ordered: Duration,
    pub(super) paused: Duration,
    pub(super) harvest: Duration,
    pub(super) save: Duration,
    pub(super) prepared: Duration,
    pub(super) committed: Duration,
    /// How long it was expected to be.
    pub(super) predicted: Duration,
    /// When it has lasted too long, whatever the peer says.
    pub(super) deadline: Option<Duration>,
}

impl Standstill {
    /// What this side took for itself is not the peer's fault.
    pub(super) fn excuse(&mut self, time: Duration) {
        self.deadline = self.deadline.map(|deadline| deadline.saturating_add(time));
    }

    /// The parts, when the answer to Commit came at `running`.
    pub(super) fn parts(&self, prepared: &Prepared, running: Duration, resume_us: u64) -> Downtime {
        let until_prepared = self.prepared.saturating_sub(self.paused);
        let harvest = self.harvest.min(until_prepared);
        let left = until_prepared.saturating_sub(harvest);
        let state = (self.save + Duration::from_micros(prepared.load_us)).min(left);
        let left = left.saturating_sub(state);
        let digest = Duration::from_micros(prepared.verify_us).min(left);
        let until_running = running.saturating_sub(self.committed);
        let resume = Duration::from_micros(resume_us).min(until_running);
        Downtime {
            pause: self.paused.saturating_sub(self.ordered),
            harvest,
            pages: left.saturating_sub(digest),
            state,
            // Between Prepared and Commit the source compares digests and releases its locks.
            digest: digest + self.committed.saturating_sub(self.prepared),
            commit: until_running.saturating_sub(resume),
            resume,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_the_downtime_add_up_even_when_the_peer_exaggerates() {
        let ms = Duration::from_millis;
        let standstill = Standstill {
            ordered: ms(100),
            paused: ms(101),
            harvest: ms(2),
            save: ms(3),
            prepared: ms(120),
            committed: ms(121),
            ..Standstill::default()
        };
        for (load_us, verify_us, resume_us) in [(1000, 500, 700), (u64::MAX / 2, 1, 0), (0, u64::MAX / 2, u64::MAX / 2)]
        {
            let prepared = Prepared { verify_us, load_us, ..Prepared::default() };
            assert_eq!(standstill.parts(&prepared, ms(125), resume_us).total(), ms(25));
        }
    }

    #[test]
    fn a_guest_too_small_to_measure_the_link_by_is_not_predicted_to_take_for_ever() {
        let mut forecast = Forecast::default();
        assert!(forecast.downtime(0, 64 << 10) < Duration::from_millis(20));
        forecast
            .learn(&Tally { pages: 10, zero_pages: 10, wire_bytes: 80, ..Tally::default() }, Duration::from_secs(1));
        assert!(forecast.downtime(3, 64 << 10) < Duration::from_millis(20));
    }

    #[test]
    fn small_rounds_do_not_make_the_link_look_slow() {
        let mut forecast = Forecast::default();
        let tally = |pages: u64| Tally { pages, wire_bytes: pages * 4100, ..Tally::default() };
        forecast.learn(&tally(25_600), Duration::from_secs(1));
        let before = forecast.downtime(1000, 0);
        forecast.learn(&tally(1), Duration::from_millis(10));
        assert_eq!(forecast.downtime(1000, 0), before);
    }
}
