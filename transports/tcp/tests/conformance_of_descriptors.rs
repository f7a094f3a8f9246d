//! The suite that every transport passes, over sockets that the host has opened.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer, Lane, LaneRole, TransportError};
use pageferry_conformance::Joined;
use pageferry_tcp::{TcpOptions, lane_from_fd};

/// Opens a pair of sockets for every lane.
struct Pairs(Sender<UnixStream>);

impl Dialer for Pairs {
    fn dial(&self, _role: LaneRole, _timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let failed = |source| TransportError::Dial { peer: "the other end".to_owned(), source };
        let (near, far) = UnixStream::pair().map_err(failed)?;
        self.0.send(far).map_err(|_| failed(io::ErrorKind::ConnectionRefused.into()))?;
        lane_from_fd(near, &TcpOptions::default())
    }
}

struct OtherEnds(Mutex<Receiver<UnixStream>>);

impl Acceptor for OtherEnds {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        match self.0.lock().expect("nobody panicked").recv_timeout(timeout) {
            Ok(stream) => lane_from_fd(stream, &TcpOptions::default()).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                std::thread::sleep(timeout);
                Ok(None)
            }
        }
    }
}

fn join() -> Joined {
    let (dialling, accepting) = channel();
    Joined::new(Pairs(dialling), OtherEnds(Mutex::new(accepting)))
}

pageferry_conformance::suite!(join);
