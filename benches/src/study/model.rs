//! What the textbook says: how long a guest takes, from three numbers alone.
//!
//! Pre-copy sends all memory, then again and again what was written meanwhile. If `r` bytes of payload fit through the
//! link per second and the guest dirties `d` bytes of pages per second over a working set of `w` bytes, a round that
//! lasts `t` seconds leaves `min(w, d t)` bytes for the next one. While that is less than `w`, rounds are a geometric
//! series with the quotient `d / r`. When what is left fits into the downtime that is allowed, the guest stops for it.
//!
//! The model's pages are sent whole and as they are: it knows neither zero pages nor compression, deltas or
//! deduplication, nor a throttle. Where an engine is faster than the model, that is what made it so. (After Clark et al.,
//! "Live Migration of Virtual Machines", NSDI 2005, section 3; the bound by the working set is theirs too.)

use super::Guest;

/// The downtime that both engines are allowed by default.
pub(crate) const DOWNTIME_SECONDS: f64 = 0.3;

/// More rounds than this are none that ends.
const MOST_ROUNDS: u32 = 10_000;

/// Between two rounds that leave the same, nothing will change any more.
const STEADY: f64 = 1e-6;

/// What the model expects.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Expected {
    Ends {
        seconds: f64,
        downtime_seconds: f64,
        /// The last one, in which the guest stands still, included.
        rounds: u32,
        bytes: f64,
    },
    /// What every further round leaves takes longer than the downtime that is allowed.
    Never {
        /// How long the guest would stand still if it were stopped then.
        downtime_seconds: f64,
    },
}

/// The least time in which these bytes can pass: `bytes x 8 / rate`.
pub(crate) fn floor_seconds(bytes: u64, bits_per_second: u64) -> f64 {
    bytes as f64 * 8.0 / bits_per_second as f64
}

/// What to expect of a guest on a link that carries so many bytes of payload per second.
pub(crate) fn expect(guest: &Guest, payload_rate: f64, downtime_seconds: f64) -> Expected {
    let (dirty, set) = (guest.dirty_bytes_per_second as f64, guest.working_set.min(guest.bytes) as f64);
    let (mut seconds, mut bytes, mut left) = (0.0, 0.0, guest.bytes as f64);
    for round in 1..=MOST_ROUNDS {
        let takes = left / payload_rate;
        seconds += takes;
        bytes += left;
        let next = (dirty * takes).min(set);
        if next / payload_rate <= downtime_seconds {
            let downtime_seconds = next / payload_rate;
            return Expected::Ends {
                seconds: seconds + downtime_seconds,
                downtime_seconds,
                rounds: round + 1,
                bytes: bytes + next,
            };
        }
        // From the first round on what is left can only shrink, or stay.
        if (left - next).abs() <= left * STEADY || next >= left {
            return Expected::Never { downtime_seconds: next / payload_rate };
        }
        left = next;
    }
    Expected::Never { downtime_seconds: left / payload_rate }
}

#[cfg(test)]
mod tests {
    use super::super::Writes;
    use super::*;

    const MIB: f64 = 1_048_576.0;

    fn guest(bytes: u64, dirty: u64, set: u64) -> Guest {
        Guest {
            name: "guest".to_owned(),
            bytes,
            content: String::new(),
            writes: Writes::WholePages,
            dirty_bytes_per_second: dirty,
            working_set: set,
            runs: true,
        }
    }

    fn ends(guest: &Guest, rate: f64) -> (f64, f64, u32) {
        match expect(guest, rate, DOWNTIME_SECONDS) {
            Expected::Ends { seconds, downtime_seconds, rounds, .. } => (seconds, downtime_seconds, rounds),
            Expected::Never { .. } => panic!("it never ends"),
        }
    }

    #[test]
    fn a_gibibyte_takes_what_textbooks_say() {
        assert!((floor_seconds(1 << 30, 100_000_000) - 85.9).abs() < 0.1);
        assert!((floor_seconds(1 << 30, 1_000_000_000) - 8.59).abs() < 0.01);
        let (seconds, downtime, rounds) = ends(&guest(1 << 30, 0, 0), 12_500_000.0);
        assert!((seconds - 85.9).abs() < 0.1 && downtime < 1e-9 && rounds == 2);
    }

    #[test]
    fn rounds_are_a_geometric_series() {
        // 100 MiB/s, half of it dirtied again: 10.24 s, 5.12 s ... 0.32 s, and 0.16 s of standstill.
        let (seconds, downtime, rounds) = ends(&guest(1 << 30, (50.0 * MIB) as u64, 1 << 30), 100.0 * MIB);
        let expected: f64 = (0..7).map(|round| 10.24 / f64::from(1 << round)).sum();
        assert!((seconds - expected).abs() < 1e-6, "{seconds} {expected}");
        assert!((downtime - 0.16).abs() < 1e-9 && rounds == 7);
    }

    #[test]
    fn a_guest_that_writes_faster_than_the_link_never_ends_unless_it_writes_little() {
        let fast = guest(1 << 30, (200.0 * MIB) as u64, 256 << 20);
        let Expected::Never { downtime_seconds } = expect(&fast, 100.0 * MIB, DOWNTIME_SECONDS) else {
            panic!("it ends")
        };
        assert!((downtime_seconds - 2.56).abs() < 1e-9);
        let (seconds, downtime, _) = ends(&guest(1 << 30, (200.0 * MIB) as u64, 20 << 20), 100.0 * MIB);
        assert!((seconds - 10.44).abs() < 1e-6 && (downtime - 0.2).abs() < 1e-9);
    }
}
