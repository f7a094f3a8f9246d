//! Pageferry lanes over several paths at once, that go on when a path dies.
//!
//! A *path* is a transport of its own: a pair of addresses, such as a network card at either end. [`PathsDialer`]
//! spreads lanes over the paths of a list; [`PathsAcceptor`] listens on all of them. A lane keeps what it has sent
//! until the peer says that it has come. When its connection breaks, the dialling side opens
//! another on a path that works; both tell how much they have received, and send the rest again. The engine
//! notices a delay. Only when no path works for [`PathOptions::give_up_after`] does the lane break.
//!
//! What proves who the peer is, and keeps others from listening, are the paths' own transports: all of them, or it is not done
//! ([`Capabilities::encrypted`](pageferry::transport::Capabilities::encrypted)). Over a plaintext path somebody who hears a
//! lane's random name can go on with that lane in the peer's place.
//!
//! Both ends must speak it: a lane here begins with a frame of the kind that transports use among themselves.
#![deny(unsafe_code)]

mod accept;
mod attendant;
mod connection;
mod dial;
mod lane;
mod message;
mod pump;
mod unacknowledged;

pub use accept::PathsAcceptor;
pub use dial::PathsDialer;

use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use pageferry::host::{Joiner, Spawner, StdSpawner, ThreadRole};
use pageferry::limits::MAX_FRAME_BODY;

/// However long a lane may be without a connection, a path that says nothing for so long is dead.
const LONGEST_SILENCE: Duration = Duration::from_secs(3);

/// Choices for both ends.
#[derive(Clone)]
#[non_exhaustive]
pub struct PathOptions {
    /// A lane that has had no connection for this long is broken. Default 8 s: less than the 10 s for which the engine bears a
    /// peer's silence. The paths' own transports must notice a dead peer well before that:
    /// [`dead_path_after`](Self::dead_path_after).
    pub give_up_after: Duration,
    /// Longest time to open one connection in place of a broken one. Default 2.5 s.
    pub redial_timeout: Duration,
    /// Most bytes per lane that were sent and not acknowledged; they are kept in memory. Default 16 MiB: what
    /// 10 Gbps have under way in 13 ms. Whoever sends waits when so many are. Less than 4 MiB counts as that: the peer
    /// acknowledges in portions of 1 MiB.
    pub unacknowledged: usize,
    /// Lends the threads: one per lane, one more per lane that receives much, and some for a moment when a connection
    /// breaks or a lane ends.
    pub spawner: Arc<dyn Spawner>,
}

impl Default for PathOptions {
    fn default() -> Self {
        let mut options = Self {
            give_up_after: Duration::from_secs(8),
            redial_timeout: Duration::ZERO,
            unacknowledged: 16 << 20,
            spawner: Arc::new(StdSpawner),
        };
        options.redial_timeout = options.dead_path_after();
        options
    }
}

impl fmt::Debug for PathOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { give_up_after, redial_timeout, unacknowledged, .. } = self;
        f.debug_struct("PathOptions")
            .field("give_up_after", give_up_after)
            .field("redial_timeout", redial_timeout)
            .field("unacknowledged", unacknowledged)
            .finish_non_exhaustive()
    }
}

impl PathOptions {
    /// The defaults for engines that bear a peer's silence for so long.
    #[must_use]
    pub fn within(peer_timeout: Duration) -> Self {
        let mut options = Self { give_up_after: peer_timeout * 4 / 5, ..Self::default() };
        options.redial_timeout = options.dead_path_after();
        options
    }

    /// After which silence the transport of a path is to take its peer for dead, so that there is time to go on over another path:
    /// 2.5 s by default. The 10 s of a transport's own default are for lanes of one path.
    ///
    /// ```
    /// let (paths, mut tcp) = (pageferry_paths::PathOptions::default(), pageferry_tcp::TcpOptions::default());
    /// tcp.dead_peer_after = paths.dead_path_after();
    /// assert!(tcp.dead_peer_after * 3 < paths.give_up_after);
    /// ```
    #[must_use]
    pub fn dead_path_after(&self) -> Duration {
        (self.give_up_after * 5 / 16).min(LONGEST_SILENCE)
    }

    /// What a lane keeps to send again, buffers to use again, and frames on their way to the engine; a frame of the engine is sent
    /// once more when the limit is all but reached.
    fn lane_memory(&self) -> u64 {
        let frames = unacknowledged::SPARE + 2 * lane::AHEAD + 4;
        (self.unacknowledged.max(lane::LEAST_UNACKNOWLEDGED) + frames * MAX_FRAME_BODY) as u64
    }

    fn spawn(&self, what: &'static str, work: impl FnOnce() + Send + 'static) -> io::Result<Box<dyn Joiner>> {
        self.spawner.spawn(ThreadRole::Transport(what), Box::new(work))
    }
}

/// Why a lane over several paths has ended.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum PathFailure {
    /// The peer ended the lane in order.
    #[error("the peer closed the lane")]
    Closed,
    /// This side did.
    #[error("the lane was closed on this side")]
    ClosedHere,
    /// There is no way to the peer any more.
    #[error("no path to the peer works any more: {0}")]
    NoPath(String),
    /// The peer does not keep to the rules.
    #[error("the peer does not keep to the rules of lanes over several paths: {0}")]
    Misbehaved(&'static str),
}

impl From<PathFailure> for io::Error {
    fn from(failure: PathFailure) -> Self {
        let kind = match &failure {
            PathFailure::Closed | PathFailure::ClosedHere => io::ErrorKind::UnexpectedEof,
            PathFailure::NoPath(_) => io::ErrorKind::NotConnected,
            PathFailure::Misbehaved(_) => io::ErrorKind::InvalidData,
        };
        Self::new(kind, failure)
    }
}
