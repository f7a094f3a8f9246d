//! What a user may choose about the sockets, and how it becomes socket options.
//!
//! Two waits are hidden in a TCP socket. A peer that vanished without a word is noticed only when
//! the kernel is told to ask ([`TcpOptions::dead_peer_after`]). And bytes that the sender handed over
//! long ago may still wait in the send buffer, in front of everything that follows
//! ([`TcpOptions::unsent_limit`]).

use std::io;
use std::time::Duration;

use pageferry::transport::TransportError;
use socket2::{Socket, TcpKeepalive};

/// Choices for both ends. The defaults are meant to be right for a migration network.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TcpOptions {
    /// Send and receive through this network interface only (`eth1`); `None` (default) for whichever
    /// the routes name.
    pub interface: Option<String>,
    /// A peer that acknowledges nothing, or lets nothing be sent, for this long is dead: its lanes
    /// break. Default 10 s. Silent lanes are probed in whole seconds, so that there it may take a
    /// second more, and two seconds at least.
    ///
    /// As socket options: `TCP_USER_TIMEOUT` is this time (it covers data that is not acknowledged
    /// and a receive window that stays shut); keepalive probes start after half of it and come every
    /// tenth of it (both whole seconds, at least one) until it is used up.
    pub dead_peer_after: Duration,
    /// Most bytes that wait in a socket before they are sent (`TCP_NOTSENT_LOWAT`). Default 256 KiB.
    ///
    /// What waits there delays whatever is sent next, at the switch-over as downtime: 21 ms at
    /// 100 Mbps by default, where the 4 MiB to which Linux lets a send buffer grow are 335 ms. What
    /// has been sent and is not yet acknowledged does not count, so that the limit does not slow
    /// down a long or fast link (`benches/NOTES.md` has the measurements).
    pub unsent_limit: u32,
}

impl Default for TcpOptions {
    fn default() -> Self {
        Self { interface: None, dead_peer_after: Duration::from_secs(10), unsent_limit: 256 << 10 }
    }
}

impl TcpOptions {
    /// Binds a socket that is not connected yet to the interface.
    pub(crate) fn bind_interface(&self, socket: &Socket) -> Result<(), TransportError> {
        let Some(interface) = &self.interface else {
            return Ok(());
        };
        socket.bind_device(Some(interface.as_bytes())).map_err(|source| TransportError::Option {
            option: format!("binding to network interface {interface:?}"),
            source,
        })
    }

    /// Sets what a connection needs.
    pub(crate) fn apply(&self, socket: &Socket) -> io::Result<()> {
        let liveness = Liveness::within(self.dead_peer_after);
        // Each frame is handed over whole: waiting for more to come could only delay it.
        socket.set_tcp_nodelay(true)?;
        socket.set_tcp_keepalive(&liveness.keepalive())?;
        socket.set_tcp_user_timeout(Some(liveness.user_timeout))?;
        socket.set_tcp_notsent_lowat(self.unsent_limit.max(1))
    }
}

/// How the kernel finds out that a peer is gone.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Liveness {
    idle: Duration,
    interval: Duration,
    probes: u32,
    user_timeout: Duration,
}

impl Liveness {
    fn within(limit: Duration) -> Self {
        let limit = limit.clamp(Duration::from_secs(1), Duration::from_secs(24 * 3600));
        let whole_seconds = |time: Duration| time.as_secs().max(1);
        let (idle, interval) = (whole_seconds(limit / 2), whole_seconds(limit / 10));
        let probes = (limit.as_secs_f64().ceil() as u64).saturating_sub(idle).div_ceil(interval).max(1);
        Self {
            idle: Duration::from_secs(idle),
            interval: Duration::from_secs(interval),
            // The kernel allows 127 probes; this never asks for more than six or so.
            probes: probes as u32,
            user_timeout: limit,
        }
    }

    fn keepalive(&self) -> TcpKeepalive {
        TcpKeepalive::new().with_time(self.idle).with_interval(self.interval).with_retries(self.probes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Type};

    #[test]
    fn probes_end_about_when_the_limit_does() {
        for (limit_ms, expected) in
            [(10_000, (5, 1, 5)), (1_000, (1, 1, 1)), (2_000, (1, 1, 1)), (60_000, (30, 6, 5)), (0, (1, 1, 1))]
        {
            let liveness = Liveness::within(Duration::from_millis(limit_ms));
            let found = (liveness.idle.as_secs(), liveness.interval.as_secs(), liveness.probes);
            assert_eq!(found, expected, "{limit_ms} ms");
        }
        for limit in 1..3600 {
            let liveness = Liveness::within(Duration::from_secs(limit));
            let end = liveness.idle + liveness.interval * liveness.probes;
            let limit = Duration::from_secs(limit);
            assert!(end >= limit && end <= limit + liveness.interval, "{limit:?}: {liveness:?}");
        }
    }

    #[test]
    fn every_option_reaches_the_kernel() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let options = TcpOptions { dead_peer_after: Duration::from_secs(30), ..TcpOptions::default() };
        options.apply(&socket).unwrap();
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(15));
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(3));
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), 5);
        assert_eq!(socket.tcp_user_timeout().unwrap(), Some(Duration::from_secs(30)));
        assert_eq!(socket.tcp_notsent_lowat().unwrap(), 256 << 10);
    }
}
