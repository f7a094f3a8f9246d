//! A thread that takes connections whether anybody waits for a lane or not: where the accepting end is the source, the engine
//! is given its lanes before it begins, and accepts none.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use pageferry::host::Joiner;
use pageferry::transport::{Acceptor, Lane, TransportError};

use crate::accept::{Known, TURN};
use crate::connection::Connection;
use crate::dial::PathLane;
use crate::lane::lock;

/// Connections at once that have not said yet what they are for. One more is closed.
const MAX_STRANGERS: usize = 16;

/// How long one may take to say it.
const GREETING: Duration = Duration::from_secs(5);

/// Lanes that wait to be accepted: those of the largest migration.
const MAX_WAITING: usize = pageferry::limits::MAX_LANES as usize + 1;

/// Pause after no path could be listened on.
const RETRY: Duration = Duration::from_millis(100);

/// Listens until it is dropped.
pub(crate) struct Attendant {
    lanes: Receiver<PathLane>,
    failures: Receiver<TransportError>,
    over: Arc<AtomicBool>,
    thread: Mutex<Option<Box<dyn Joiner>>>,
}

impl Attendant {
    pub(crate) fn start(paths: &[Arc<dyn Acceptor>], known: &Arc<Known>) -> io::Result<Self> {
        let (began, lanes) = bounded(MAX_WAITING);
        let (failed, failures) = bounded(1);
        let over = Arc::<AtomicBool>::default();
        let desk = Desk { known: Arc::clone(known), began, strangers: Arc::default() };
        let (paths, closed) = (paths.to_vec(), Arc::clone(&over));
        let thread = known.options.spawn("attend", move || listen(&paths, &desk, &failed, &closed))?;
        Ok(Self { lanes, failures, over, thread: Mutex::new(Some(thread)) })
    }

    pub(crate) fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        if let Ok(error) = self.failures.try_recv() {
            return Err(error);
        }
        match self.lanes.recv_timeout(timeout) {
            Ok(lane) => Ok(Some(Box::new(lane))),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(TransportError::Accept {
                local: "any path".to_owned(),
                source: io::Error::new(io::ErrorKind::NotConnected, "the thread that listened has ended"),
            }),
        }
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        if let Some(thread) = lock(&self.thread).take() {
            thread.join();
        }
    }
}

fn listen(paths: &[Arc<dyn Acceptor>], desk: &Desk, failed: &Sender<TransportError>, over: &AtomicBool) {
    while !over.load(Ordering::Acquire) {
        let mut failures = Vec::new();
        for path in paths {
            match path.accept(TURN) {
                Ok(Some(lane)) => desk.hear(lane),
                Ok(None) => {}
                Err(error) => failures.push(error),
            }
        }
        // One that listens is enough.
        if failures.len() == paths.len()
            && let Some(error) = failures.pop()
        {
            let _ = failed.try_send(error);
            std::thread::sleep(RETRY);
        }
    }
}

/// What it takes to deal with a connection.
#[derive(Clone)]
struct Desk {
    known: Arc<Known>,
    began: Sender<PathLane>,
    strangers: Arc<AtomicUsize>,
}

impl Desk {
    /// Hears on a thread of its own what a connection is for.
    fn hear(&self, lane: Box<dyn Lane>) {
        if self.strangers.fetch_add(1, Ordering::AcqRel) >= MAX_STRANGERS {
            self.strangers.fetch_sub(1, Ordering::AcqRel);
            return;
        }
        let stranger = Stranger(Arc::clone(&self.strangers));
        let desk = self.clone();
        // Without a thread it is closed.
        let _ = self.known.options.spawn("hear", move || {
            let heard = desk.sort(lane);
            drop(stranger);
            // It was only a connection, and whoever dialled it notices.
            drop(heard);
        });
    }

    fn sort(&self, lane: Box<dyn Lane>) -> io::Result<()> {
        let peer = lane.peer();
        let mut connection = Connection::from(lane.split()?);
        let message = connection.hear(GREETING, &self.known.options)?;
        if let Some(halves) = self.known.sort(connection, message, false)? {
            // Where nobody accepts, a lane too many is closed.
            let _ = self.began.try_send(PathLane { peer, halves });
        }
        Ok(())
    }
}

/// Counts a stranger, for as long as it is one.
struct Stranger(Arc<AtomicUsize>);

impl Drop for Stranger {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}
