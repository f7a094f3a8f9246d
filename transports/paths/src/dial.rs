//! The dialling end: lanes over several dialers, and new connections for broken ones.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::transport::{Capabilities, Dialer, Lane, LaneHalves, LaneRole, TransportError};

use crate::connection::Connection;
use crate::lane::{Farewells, Shared, halves, lock};
use crate::message::{LaneId, PathMessage};
use crate::pump::{self, Reconnect};
use crate::{PathFailure, PathOptions};

/// How long a path that has failed is tried after the others.
const DISTRUST: Duration = Duration::from_secs(10);

/// Pause between two rounds of attempts on all paths.
const RETRY: Duration = Duration::from_millis(50);

/// Longest pause before another connection in place of one that broke before anything came or went.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// Longest wait for farewells when a dialer or an acceptor is dropped.
pub(crate) const LAST_WAIT: Duration = Duration::from_secs(1);

/// Dials lanes over the paths of a list: data lanes in turn, the control lane on the first.
pub struct PathsDialer(Arc<Paths>);

impl std::fmt::Debug for PathsDialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PathsDialer({} paths)", self.0.all.len())
    }
}

struct Paths {
    all: Vec<Path>,
    options: PathOptions,
    farewells: Arc<Farewells>,
}

struct Path {
    dialer: Arc<dyn Dialer>,
    failed: Mutex<Option<Instant>>,
}

impl PathsDialer {
    /// A dialer over these, of which one at least must work.
    pub fn new(paths: impl IntoIterator<Item = Arc<dyn Dialer>>, options: PathOptions) -> Self {
        let all = paths.into_iter().map(|dialer| Path { dialer, failed: Mutex::default() }).collect();
        Self(Arc::new(Paths { all, options, farewells: Arc::default() }))
    }
}

impl Drop for PathsDialer {
    fn drop(&mut self) {
        self.0.farewells.wait(LAST_WAIT);
    }
}

impl Dialer for PathsDialer {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let mut id = LaneId::default();
        getrandom::fill(&mut id).map_err(|error| TransportError::Option {
            option: "a random name for a lane".to_owned(),
            source: io::Error::other(error.to_string()),
        })?;
        let mut attempts = 0;
        let message = |attempt| PathMessage::Begin { lane: id, attempt };
        let (connection, peer, at) = self.0.connect(role, timeout, &mut attempts, &message)?;
        let failed = |source| TransportError::Dial { peer: peer.clone(), source };
        let shared = Shared::new(id, self.0.options.clone(), Arc::clone(&self.0.farewells));
        let receiver = shared.install(connection, 0).map_err(|failure| failed(failure.into()))?;
        let (halves, delivery) = halves(&shared, None);
        let redial = Redial { paths: Arc::clone(&self.0), role, at, attempts, futile: Futile::default() };
        pump::start(&shared, receiver, delivery, Box::new(redial), None).map_err(failed)?;
        Ok(Box::new(PathLane { peer, halves }))
    }

    fn capabilities(&self) -> Capabilities {
        common(self.0.all.iter().map(|path| path.dialer.capabilities()), &self.0.options)
    }
}

/// What all paths can do.
pub(crate) fn common(all: impl Iterator<Item = Capabilities>, options: &PathOptions) -> Capabilities {
    let (mut common, mut all) = (Capabilities::default(), all.peekable());
    common.encrypted = all.peek().is_some();
    for one in all {
        common.encrypted &= one.encrypted;
        common.max_lanes = common.max_lanes.min(one.max_lanes);
        common.lane_memory = common.lane_memory.max(one.lane_memory);
    }
    common.lane_memory += options.lane_memory();
    common
}

impl Paths {
    /// Paths that have failed lately come last; of the others a lane begins with its own.
    fn order(&self, role: LaneRole) -> Vec<usize> {
        let count = self.all.len().max(1);
        let own = match role {
            LaneRole::Data(index) => usize::from(index) % count,
            _ => 0,
        };
        let distrusted = |index: usize| lock(&self.all[index].failed).is_some_and(|at| at.elapsed() < DISTRUST);
        let mut order: Vec<_> = (0..self.all.len()).collect();
        order.sort_by_key(|&index| (distrusted(index), (index + count - own) % count));
        order
    }

    /// Opens a connection on the first path that lets it, and says what it is for; counts the attempts.
    fn connect(
        &self,
        role: LaneRole,
        timeout: Duration,
        attempts: &mut u32,
        message: &dyn Fn(u32) -> PathMessage,
    ) -> Result<(Connection, String, usize), TransportError> {
        let started = Instant::now();
        let order = self.order(role);
        let mut last = None;
        for (tried, &index) in order.iter().enumerate() {
            let share = timeout.saturating_sub(started.elapsed()) / (order.len() - tried) as u32;
            // Whoever hears two of them is to know which is the later.
            *attempts = attempts.wrapping_add(1);
            match self.connect_on(index, role, share.max(Duration::from_millis(1)), message(*attempts)) {
                Ok((connection, peer)) => {
                    *lock(&self.all[index].failed) = None;
                    return Ok((connection, peer, index));
                }
                Err(error) => {
                    self.distrust(index);
                    last = Some(error);
                }
            }
        }
        Err(last.unwrap_or_else(|| TransportError::Dial {
            peer: "nowhere".to_owned(),
            source: io::Error::new(io::ErrorKind::InvalidInput, "no path was given"),
        }))
    }

    fn connect_on(
        &self,
        index: usize,
        role: LaneRole,
        timeout: Duration,
        message: PathMessage,
    ) -> Result<(Connection, String), TransportError> {
        let lane = self.all[index].dialer.dial(role, timeout)?;
        let peer = lane.peer();
        let failed = |source| TransportError::Dial { peer: peer.clone(), source };
        let mut connection = Connection::from(lane.split().map_err(failed)?);
        connection.tell(message).map_err(failed)?;
        Ok((connection, peer))
    }

    fn distrust(&self, index: usize) {
        if let Some(path) = self.all.get(index) {
            *lock(&path.failed) = Some(Instant::now());
        }
    }
}

/// Opens another connection, on any path.
struct Redial {
    paths: Arc<Paths>,
    role: LaneRole,
    /// The path of the present one.
    at: usize,
    /// Connections tried.
    attempts: u32,
    futile: Futile,
}

/// Connections in a row over which nothing came and nothing went.
#[derive(Default)]
struct Futile {
    count: u32,
    /// Frames that this side had received, and the peer, when the last one was opened.
    progress: Option<(u64, u64)>,
}

impl Futile {
    /// How long to wait before the next connection.
    fn pause(&mut self, ours: u64, theirs: u64) -> Duration {
        let moved = self.progress.replace((ours, theirs)) != Some((ours, theirs));
        self.count = if moved { 0 } else { self.count.saturating_add(1) };
        match self.count.checked_sub(1) {
            None => Duration::ZERO,
            Some(doublings) => RETRY.saturating_mul(1 << doublings.min(16)).min(LONGEST_PAUSE),
        }
    }
}

impl Reconnect for Redial {
    fn reconnect(&mut self, shared: &Shared, received: u64) -> Result<(Connection, u64), PathFailure> {
        let options = &self.paths.options;
        rest(self.futile.pause(received, shared.acknowledged()), shared);
        let until = Instant::now() + options.give_up_after;
        // What was never heard of may not have begun.
        let lane = shared.id;
        let known = shared.is_known();
        let message = |attempt| {
            if known { PathMessage::GoOn { lane, attempt, received } } else { PathMessage::Begin { lane, attempt } }
        };
        let mut last = String::new();
        self.paths.distrust(self.at);
        while !shared.is_over() && Instant::now() < until {
            let longest = options.redial_timeout * self.paths.all.len() as u32;
            let longest = longest.min(options.give_up_after);
            match self.paths.connect(self.role, longest, &mut self.attempts, &message) {
                Ok((mut connection, peer, at)) => match connection.hear(options.redial_timeout, options) {
                    Ok(PathMessage::GoesOn { received }) => {
                        self.at = at;
                        return Ok((connection, received));
                    }
                    Ok(PathMessage::Gone) => return Err(PathFailure::Closed),
                    Ok(_) => return Err(PathFailure::Misbehaved("it answered something else")),
                    Err(error) => {
                        self.paths.distrust(at);
                        last = format!("{peer}: {error}");
                    }
                },
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(RETRY);
        }
        Err(if shared.is_over() { PathFailure::ClosedHere } else { PathFailure::NoPath(last) })
    }
}

/// Waits, unless the lane is over.
fn rest(pause: Duration, shared: &Shared) {
    let until = Instant::now() + pause;
    while !shared.is_over() && Instant::now() < until {
        std::thread::sleep(RETRY.min(until.saturating_duration_since(Instant::now())));
    }
}

/// A lane whose halves are there already.
pub(crate) struct PathLane {
    pub(crate) peer: String,
    pub(crate) halves: LaneHalves,
}

impl Lane for PathLane {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        Ok(self.halves)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_bring_nothing_are_opened_more_and_more_rarely() {
        let mut futile = Futile::default();
        let pauses: Vec<_> = (0..8).map(|_| futile.pause(5, 7).as_millis()).collect();
        assert_eq!(pauses, [0, 50, 100, 200, 400, 800, 1000, 1000]);
        assert_eq!(futile.pause(5, 8), Duration::ZERO, "the peer has received something");
        assert_eq!(futile.pause(6, 8), Duration::ZERO, "something has come");
        assert_eq!(futile.pause(6, 8), RETRY);
    }
}
