//! Lanes that the host has opened already, whichever side dialled.

use std::collections::VecDeque;
use std::io;
use std::sync::Mutex;
use std::time::Duration;

use super::{Acceptor, Dialer, Lane, LaneRole, TransportError};

/// Hands out lanes that are open, in any order: each introduces itself with its first frame. When
/// they are used up, dialling fails and accepting waits in vain.
#[derive(Default)]
pub struct ReadyLanes(Mutex<VecDeque<Box<dyn Lane>>>);

impl std::fmt::Debug for ReadyLanes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadyLanes({} left)", self.lock().len())
    }
}

impl ReadyLanes {
    /// Takes open lanes.
    pub fn new(lanes: impl IntoIterator<Item = Box<dyn Lane>>) -> Self {
        Self(Mutex::new(lanes.into_iter().collect()))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<Box<dyn Lane>>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Dialer for ReadyLanes {
    fn dial(&self, role: LaneRole, _timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        self.lock().pop_front().ok_or_else(|| TransportError::Dial {
            peer: format!("the peer of the {role}"),
            source: io::Error::new(io::ErrorKind::NotConnected, "no lane that was handed in is left"),
        })
    }
}

impl Acceptor for ReadyLanes {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let lane = self.lock().pop_front();
        if lane.is_none() {
            std::thread::sleep(timeout);
        }
        Ok(lane)
    }
}
