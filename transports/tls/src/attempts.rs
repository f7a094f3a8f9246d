//! Wrong tokens, by the address they came from: whoever guesses waits longer and longer.
//!
//! A token has 128 bits, so that guessing leads nowhere; the pauses keep it from costing anything, and make it show.
//! The table is bounded, and no address is paused for what others do.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

/// Addresses that are remembered. Of more, the one that has been quiet for longest is forgotten.
const MAX_ADDRESSES: usize = 1024;

/// Wrong tokens that are forgiven: somebody pastes the string of yesterday.
const FREE: u32 = 3;

/// The first pause; each further wrong token doubles it.
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause, and how long after it an address must be quiet to be forgotten.
const LONGEST_PAUSE: Duration = Duration::from_secs(64);

/// What is remembered.
#[derive(Default, Debug)]
pub(crate) struct Attempts(HashMap<IpAddr, Failures>);

#[derive(Clone, Copy, Debug)]
struct Failures {
    count: u32,
    last: Instant,
}

impl Failures {
    fn pause(self) -> Duration {
        match self.count.checked_sub(FREE) {
            None => Duration::ZERO,
            Some(doublings) => FIRST_PAUSE.saturating_mul(1 << doublings.min(16)).min(LONGEST_PAUSE),
        }
    }

    fn since(self, now: Instant) -> Duration {
        now.saturating_duration_since(self.last)
    }
}

impl Attempts {
    /// Whether this address has to wait before anything it says is looked at.
    pub(crate) fn must_pause(&self, from: IpAddr, now: Instant) -> bool {
        self.0.get(&network(from)).is_some_and(|failures| failures.since(now) < failures.pause())
    }

    /// A wrong token came from there.
    pub(crate) fn failed(&mut self, from: IpAddr, now: Instant) {
        self.0.retain(|_, failures| failures.since(now) < failures.pause() + LONGEST_PAUSE);
        let network = network(from);
        if self.0.len() >= MAX_ADDRESSES && !self.0.contains_key(&network) {
            self.forget_one();
        }
        let failures = self.0.entry(network).or_insert(Failures { count: 0, last: now });
        *failures = Failures { count: failures.count.saturating_add(1), last: now };
    }

    fn forget_one(&mut self) {
        let quietest = self.0.iter().min_by_key(|(_, failures)| failures.last).map(|(network, _)| *network);
        if let Some(network) = quietest {
            self.0.remove(&network);
        }
    }
}

/// An address, or of IPv6 the network of 64 bits that a single host can have for itself.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn address(number: u32) -> IpAddr {
        IpAddr::from(number.to_be_bytes())
    }

    #[test]
    fn pauses_grow_to_a_limit_and_end() {
        let (mut attempts, mut now, here) = (Attempts::default(), Instant::now(), address(1));
        let mut pauses = Vec::new();
        for _ in 0..12 {
            attempts.failed(here, now);
            let start = now;
            while attempts.must_pause(here, now) {
                now += SECOND;
            }
            pauses.push((now - start).as_secs());
        }
        assert_eq!(pauses, [0, 0, 1, 2, 4, 8, 16, 32, 64, 64, 64, 64]);
        now += LONGEST_PAUSE * 2;
        attempts.failed(here, now);
        assert!(!attempts.must_pause(here, now), "it was forgotten");
    }

    #[test]
    fn strangers_fill_a_bounded_table_and_pause_nobody_else() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        for number in 0..MAX_ADDRESSES as u32 * 3 {
            for _ in 0..4 {
                attempts.failed(address(number), now + Duration::from_micros(number.into()));
            }
        }
        assert_eq!(attempts.0.len(), MAX_ADDRESSES);
        let last = address(MAX_ADDRESSES as u32 * 3 - 1);
        assert!(attempts.must_pause(last, now) && !attempts.must_pause(address(9_000_000), now));
    }

    #[test]
    fn a_host_with_many_ipv6_addresses_is_one() {
        let (mut attempts, now) = (Attempts::default(), Instant::now());
        for host in 0..4u128 {
            attempts.failed(Ipv6Addr::from_bits((0x2001_0db8 << 96) + host).into(), now);
        }
        assert_eq!(attempts.0.len(), 1);
        assert!(attempts.must_pause(Ipv6Addr::from_bits((0x2001_0db8 << 96) + 77).into(), now));
    }
}
