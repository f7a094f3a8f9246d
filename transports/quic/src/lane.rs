//! A lane over one bidirectional stream.

use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::{FrameBuffer, HEADER_LEN};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{Mutex, watch};

use crate::error::QuicFailure;
use crate::host::Host;
use crate::wait::wait_for;

/// Parts of a frame that are shorter are sent together.
const SMALL: usize = 4 << 10;

/// How often the bytes that may wait are made to fit the congestion window.
const ADJUST: Duration = Duration::from_millis(2);

/// A stream that carries frames.
pub(crate) struct QuicLane {
    stream: Arc<Stream>,
    connection: Connection,
    unsent_limit: u32,
}

impl QuicLane {
    pub(crate) fn new(
        host: Arc<Host>,
        connection: Connection,
        (send, receive): (SendStream, RecvStream),
        unsent_limit: u32,
    ) -> Self {
        let (send, receive) = (Arc::new(Mutex::new(Some(send))), Arc::new(Mutex::new(Some(receive))));
        let closed = watch::Sender::new(false);
        let stream = Stream { host, send, receive, closed, connection: connection.clone() };
        Self { stream: Arc::new(stream), connection, unsent_limit }
    }
}

impl Lane for QuicLane {
    fn peer(&self) -> String {
        let address = self.connection.remote_address();
        SocketAddr::new(address.ip().to_canonical(), address.port()).to_string()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let Self { stream, connection, unsent_limit } = *self;
        Ok(LaneHalves {
            sender: Box::new(QuicSender {
                stream: Arc::clone(&stream),
                closed: stream.closed.subscribe(),
                connection,
                unsent_limit: unsent_limit.into(),
                adjusted: Instant::now(),
                small: Vec::new(),
            }),
            receiver: Box::new(QuicReceiver { closed: stream.closed.subscribe(), stream: Arc::clone(&stream) }),
            closer: Arc::new(QuicCloser(stream)),
        })
    }
}

/// What the halves share; with the last of them the lane ends, in order.
struct Stream {
    host: Arc<Host>,
    send: Arc<Mutex<Option<SendStream>>>,
    receive: Arc<Mutex<Option<RecvStream>>>,
    closed: watch::Sender<bool>,
    connection: Connection,
}

impl Stream {
    fn close(&self) {
        if !self.closed.send_replace(true) {
            self.host.see_off(self.connection.clone(), Arc::clone(&self.send), Arc::clone(&self.receive));
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.close();
    }
}

/// Works until the lane is closed.
async fn unless_closed<T>(
    closed: &mut watch::Receiver<bool>,
    work: impl Future<Output = Result<T, QuicFailure>>,
) -> Result<T, QuicFailure> {
    tokio::select! {
        biased;
        _ = closed.wait_for(|closed| *closed) => Err(QuicFailure::ClosedHere),
        done = work => done,
    }
}

/// Waits for work that has no limit of time.
fn wait<T>(work: impl Future<Output = Result<T, QuicFailure>>) -> io::Result<T> {
    Ok(wait_for(None, work).unwrap_or(Err(QuicFailure::ClosedHere))?)
}

struct QuicSender {
    stream: Arc<Stream>,
    closed: watch::Receiver<bool>,
    connection: Connection,
    unsent_limit: u64,
    adjusted: Instant,
    small: Vec<u8>,
}

impl QuicSender {
    /// Lets as many bytes wait as the congestion window has, and the limit besides.
    fn adjust(&mut self) {
        if self.adjusted.elapsed() >= ADJUST {
            self.connection.set_send_window(self.connection.stats().path.cwnd + self.unsent_limit);
            self.adjusted = Instant::now();
        }
    }
}

impl LaneSender for QuicSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        self.adjust();
        let (stream, small) = (&self.stream.send, &mut self.small);
        wait(unless_closed(&mut self.closed, async {
            let mut guard = stream.lock().await;
            write(guard.as_mut().ok_or(QuicFailure::ClosedHere)?, small, frame).await
        }))
    }
}

async fn write(stream: &mut SendStream, small: &mut Vec<u8>, frame: &[IoSlice<'_>]) -> Result<(), QuicFailure> {
    small.clear();
    for part in frame {
        if part.len() < SMALL {
            small.extend_from_slice(part);
            if small.len() < SMALL {
                continue;
            }
        }
        stream.write_all(small).await?;
        small.clear();
        if part.len() >= SMALL {
            stream.write_all(part).await?;
        }
    }
    Ok(stream.write_all(small).await?)
}

struct QuicReceiver {
    stream: Arc<Stream>,
    closed: watch::Receiver<bool>,
}

impl LaneReceiver for QuicReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        let (stream, header) = (&self.stream.receive, frame.prepare(HEADER_LEN)?);
        wait(unless_closed(&mut self.closed, fill(stream, header, true)))?;
        let body = frame.announced_body()?;
        wait(unless_closed(&mut self.closed, fill(stream, frame.extend(body)?, false)))
    }
}

/// Fills the slice. If the lane ends before its first byte, that is the lane's end in order where a frame begins.
async fn fill(stream: &Mutex<Option<RecvStream>>, into: &mut [u8], begins: bool) -> Result<(), QuicFailure> {
    let mut guard = stream.lock().await;
    let stream = guard.as_mut().ok_or(QuicFailure::ClosedHere)?;
    let mut filled = 0;
    while filled < into.len() {
        match stream.read(&mut into[filled..]).await? {
            Some(read) => filled += read,
            None if begins && filled == 0 => return Err(QuicFailure::Closed),
            None => return Err(QuicFailure::Cut { missing: into.len() - filled }),
        }
    }
    Ok(())
}

struct QuicCloser(Arc<Stream>);

impl LaneCloser for QuicCloser {
    fn close(&self) {
        self.0.close();
    }
}
