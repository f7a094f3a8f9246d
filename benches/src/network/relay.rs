//! A relay in this process between two TCP ends: it holds every byte back for half a round trip, and lets through no more
//! than a rate. It stands in for a shaped wire where this user may make none, and adds distance to one.
//!
//! Each direction of a connection has a thread that receives and one that sends; between them waits no more than what the
//! rate and the distance keep on their way, so that a sender feels the link and not an endless buffer. All connections share
//! the rate of their direction. What TCP itself makes of distance is not shown: its two halves are as near as before.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Rate;
use crate::shown::say;

/// Bytes that are received, held and sent at once: small beside what passes in a millisecond of the fastest link, large
/// beside what a system call costs.
const PIECE: usize = 32 << 10;

/// What may wait beyond what the distance keeps on its way: as in the queue of a shaped wire.
const QUEUE: Duration = Duration::from_millis(20);

/// At least so many pieces.
const LEAST_PIECES: usize = 16;

/// For a link without a rate: pieces on their way over the distance at 10 Gbps.
const UNSHAPED_RATE: f64 = 1.25e9;

/// Between two looks whether the relay is to end.
const LOOK_UP: Duration = Duration::from_millis(20);

/// A running relay. Dropping it ends its connections.
#[derive(Debug)]
pub(crate) struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
    accepting: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    to: SocketAddr,
    delay: Duration,
    /// From whoever dials, and towards it.
    directions: [Direction; 2],
    end: AtomicBool,
    connections: Mutex<HashMap<u64, [TcpStream; 2]>>,
    next: AtomicU64,
}

/// A connection of which a direction is still open; with the last of these its sockets are let go.
struct Open(Arc<Shared>, u64);

impl Open {
    /// Ends both directions: one of them can go no further.
    fn end(&self) {
        if let Some(sockets) = self.0.lock().get(&self.1) {
            for socket in sockets {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.lock().remove(&self.1);
    }
}

/// All connections' bytes one way.
#[derive(Debug)]
struct Direction {
    bytes_per_second: Option<f64>,
    /// When the wire will have carried what it was given.
    free: Mutex<Instant>,
    carried: AtomicU64,
}

impl Direction {
    fn new(rate: Rate) -> Self {
        let bytes_per_second = match rate {
            Rate::Unshaped => None,
            Rate::BitsPerSecond(bits) => Some(bits as f64 / 8.0),
        };
        Self { bytes_per_second, free: Mutex::new(Instant::now()), carried: AtomicU64::new(0) }
    }

    /// Takes the wire for so many bytes, from this time on at the earliest; when the last of them has passed.
    fn take(&self, len: usize, now: Instant) -> Instant {
        self.carried.fetch_add(len as u64, Ordering::Relaxed);
        let Some(rate) = self.bytes_per_second else { return now };
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        *free = (*free).max(now) + Duration::from_secs_f64(len as f64 / rate);
        *free
    }

    /// Pieces that may wait: what the distance keeps on its way, and a queue.
    fn most_pieces(&self, delay: Duration) -> usize {
        let rate = self.bytes_per_second.unwrap_or(UNSHAPED_RATE);
        ((rate * (delay + QUEUE).as_secs_f64()) as usize / PIECE).max(LEAST_PIECES)
    }
}

/// Bytes, and when they may go on.
type Piece = (Instant, Vec<u8>);

impl Relay {
    /// Takes connections at an address of its own and carries them to `to`; sockets are made by a thread on which `enter`
    /// is called first, so that they belong where that leads.
    pub(crate) fn start(
        listen: SocketAddr,
        to: SocketAddr,
        rate: Rate,
        rtt: Duration,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let directions = [Direction::new(rate), Direction::new(rate)];
        let shared = Shared {
            to,
            delay: rtt / 2,
            directions,
            end: false.into(),
            connections: Mutex::default(),
            next: AtomicU64::new(0),
        };
        let shared = Arc::new(shared);
        let (tell, hear) = sync_channel(1);
        let own = Arc::clone(&shared);
        let accepting = std::thread::Builder::new().name("relay".to_owned()).spawn(move || {
            let bound = enter().and_then(|()| TcpListener::bind(listen)).and_then(|listener| {
                listener.set_nonblocking(true)?;
                Ok((listener.local_addr()?, listener))
            });
            match bound {
                Ok((address, listener)) => {
                    let _ = tell.send(Ok(address));
                    own.accept(&listener);
                }
                Err(error) => drop(tell.send(Err(error))),
            }
        })?;
        let address = hear.recv().map_err(io::Error::other)??;
        Ok(Self { address, shared, accepting: Some(accepting) })
    }

    /// Where it takes connections.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Bytes that have come from whoever dials.
    pub(crate) fn carried(&self) -> u64 {
        self.shared.directions[0].carried.load(Ordering::Relaxed)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::Release);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
        for socket in self.shared.lock().values().flatten() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Shared {
    fn accept(self: &Arc<Self>, listener: &TcpListener) {
        while !self.end.load(Ordering::Acquire) {
            match listener.accept() {
                // A caller whose other end is not there hears it as a closed connection.
                Ok((near, _)) => drop(self.join(near)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(LOOK_UP),
                Err(error) => {
                    say(format_args!("warning: the relay cannot take a connection: {error}"));
                    std::thread::sleep(Duration::from_secs(1));
                }
            }
        }
    }

    fn join(self: &Arc<Self>, near: TcpStream) -> io::Result<()> {
        near.set_nonblocking(false)?;
        let far = TcpStream::connect(self.to)?;
        near.set_nodelay(true)?;
        far.set_nodelay(true)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.lock().insert(id, [near.try_clone()?, far.try_clone()?]);
        let open = Arc::new(Open(Arc::clone(self), id));
        self.carry(0, near.try_clone()?, far.try_clone()?, Arc::clone(&open))?;
        self.carry(1, far, near, open)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, [TcpStream; 2]>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry(self: &Arc<Self>, direction: usize, from: TcpStream, to: TcpStream, open: Arc<Open>) -> io::Result<()> {
        let (sender, receiver) = sync_channel(self.directions[direction].most_pieces(self.delay));
        let own = Arc::clone(self);
        let spawn = |work: Box<dyn FnOnce() + Send>| std::thread::Builder::new().name("relay".to_owned()).spawn(work);
        spawn(Box::new(move || own.receive(direction, from, &sender)))?;
        spawn(Box::new(move || {
            if send(to, &receiver).is_err() {
                open.end();
            }
        }))?;
        Ok(())
    }

    fn receive(&self, direction: usize, mut from: TcpStream, pieces: &SyncSender<Piece>) {
        let mut buffer = vec![0; PIECE];
        while let Ok(len @ 1..) = from.read(&mut buffer) {
            let passed = self.directions[direction].take(len, Instant::now());
            if pieces.send((passed + self.delay, buffer[..len].to_vec())).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Read);
    }
}

fn send(mut to: TcpStream, pieces: &Receiver<Piece>) -> io::Result<()> {
    for (due, piece) in pieces {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        to.write_all(&piece)?;
    }
    // The end arrives behind the last byte.
    to.shutdown(Shutdown::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn local() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    /// Sends so many bytes over a relay of this rate and distance, and waits for one back; how long that took.
    fn exchange(rate: Rate, rtt: Duration, bytes: usize) -> (Duration, u64) {
        let listener = TcpListener::bind(local()).unwrap();
        let relay = Relay::start(local(), listener.local_addr().unwrap(), rate, rtt, || Ok(())).unwrap();
        let receiving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut received = vec![0; bytes];
            stream.read_exact(&mut received).unwrap();
            stream.write_all(&[7]).unwrap();
            received
        });
        let mut stream = TcpStream::connect(relay.address()).unwrap();
        let sent: Vec<u8> = (0..bytes).map(|index| (index * 31 % 251) as u8).collect();
        let started = Instant::now();
        stream.write_all(&sent).unwrap();
        stream.read_exact(&mut [0]).unwrap();
        let took = started.elapsed();
        assert!(receiving.join().unwrap() == sent);
        (took, relay.carried())
    }

    #[test]
    fn bytes_arrive_in_order_and_no_sooner_than_rate_and_distance_allow() {
        let (took, carried) = exchange(Rate::BitsPerSecond(80_000_000), Duration::from_millis(40), 1_000_000);
        assert!(took >= Duration::from_millis(139), "{took:?}");
        assert_eq!(carried, 1_000_000);
        assert!(exchange(Rate::Unshaped, Duration::from_millis(30), 1).0 >= Duration::from_millis(30));
        assert_eq!(exchange(Rate::Unshaped, Duration::ZERO, 5_000_000).1, 5_000_000);
    }

    #[test]
    fn connections_share_the_rate() {
        let direction = Direction::new(Rate::BitsPerSecond(8_000_000));
        let now = Instant::now();
        let first = direction.take(500_000, now);
        assert_eq!(direction.take(500_000, now), first + Duration::from_millis(500));
    }

    #[test]
    fn the_end_of_a_relay_ends_its_connections() {
        let listener = TcpListener::bind(local()).unwrap();
        let to = listener.local_addr().unwrap();
        let relay = Relay::start(local(), to, Rate::Unshaped, Duration::ZERO, || Ok(())).unwrap();
        let mut near = TcpStream::connect(relay.address()).unwrap();
        let _far = listener.accept().unwrap();
        near.write_all(&[1]).unwrap();
        drop(relay);
        assert!(matches!(near.read(&mut [0; 8]), Ok(0) | Err(_)));
    }
}
