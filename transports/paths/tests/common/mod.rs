//! A relay between two TCP ports, that can break.
#![allow(missing_docs, unreachable_pub, missing_debug_implementations, dead_code)]

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Receiver;
use pageferry::transport::{Acceptor, Dialer, Lane, LaneHalves, LaneReceiver, TransportError};
use pageferry::wire::FrameBuffer;
use pageferry_conformance::Joined;
use pageferry_paths::{PathOptions, PathsAcceptor, PathsDialer};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

#[derive(Default)]
struct Shared {
    streams: Mutex<Vec<TcpStream>>,
    dead: AtomicBool,
    bytes: AtomicU64,
}

/// Passes bytes on.
#[derive(Clone)]
pub struct Relay {
    shared: Arc<Shared>,
    pub address: SocketAddr,
}

impl Relay {
    pub fn new(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let (address, shared) = (listener.local_addr().unwrap(), Arc::new(Shared::default()));
        let relay = Self { shared: shared.clone(), address };
        std::thread::spawn(move || {
            while !shared.dead.load(Ordering::SeqCst) {
                let Ok((near, _)) = listener.accept() else {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                };
                near.set_nonblocking(false).unwrap();
                let Ok(far) = TcpStream::connect(target) else { continue };
                let mut streams = shared.streams.lock().unwrap();
                // Then all have been cut already.
                if shared.dead.load(Ordering::SeqCst) {
                    break;
                }
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to, shared) = (from.try_clone().unwrap(), to.try_clone().unwrap(), shared.clone());
                    streams.push(from.try_clone().unwrap());
                    std::thread::spawn(move || pass_on(from, to, &shared));
                }
            }
        });
        relay
    }

    /// All connections break; new ones are let through.
    pub fn cut(&self) {
        for stream in self.shared.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// All connections break, and nobody listens any more.
    pub fn kill(&self) {
        self.shared.dead.store(true, Ordering::SeqCst);
        self.cut();
    }

    pub fn bytes(&self) -> u64 {
        self.shared.bytes.load(Ordering::SeqCst)
    }
}

fn pass_on(mut from: TcpStream, mut to: TcpStream, shared: &Shared) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
        shared.bytes.fetch_add(count as u64, Ordering::SeqCst);
    }
    let _ = (from.shutdown(Shutdown::Read), to.shutdown(Shutdown::Write));
}

/// Two paths, each through a relay.
pub fn over_relays(options: &PathOptions) -> (Joined, Vec<Relay>) {
    let mut tcp = TcpOptions::default();
    tcp.dead_peer_after = options.dead_path_after();
    let acceptors = [(); 2].map(|()| TcpAcceptor::bind("127.0.0.1:0", tcp.clone()).unwrap());
    let relays: Vec<_> = acceptors.iter().map(|acceptor| Relay::new(acceptor.local_addr())).collect();
    let dialers =
        relays.iter().map(|relay| Arc::new(TcpDialer::new(relay.address.to_string(), tcp.clone())) as Arc<dyn Dialer>);
    let acceptors = acceptors.map(|acceptor| Arc::new(acceptor) as Arc<dyn Acceptor>);
    let dialer = PathsDialer::new(dialers, options.clone());
    (Joined::new(dialer, PathsAcceptor::new(acceptors, options.clone())), relays)
}

/// Does what the engine's door does: hears every connection's first frame, whoever waits for a lane or not.
pub struct Doorman(Receiver<Heard>);

impl Doorman {
    pub fn new(acceptor: Arc<dyn Acceptor>) -> Self {
        let (sender, receiver) = crossbeam_channel::unbounded();
        std::thread::spawn(move || {
            while let Ok(lane) = acceptor.accept(Duration::from_millis(20)) {
                let (Some(lane), sender) = (lane, sender.clone()) else { continue };
                std::thread::spawn(move || {
                    let peer = lane.peer();
                    let mut halves = lane.split().unwrap();
                    let mut first = FrameBuffer::new();
                    if halves.receiver.receive(&mut first).is_ok() {
                        let _ = sender.send(Heard { peer, halves, first });
                    }
                });
            }
        });
        Self(receiver)
    }
}

impl Acceptor for Doorman {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        Ok(self.0.recv_timeout(timeout).ok().map(|lane| Box::new(lane) as Box<dyn Lane>))
    }
}

pub struct Heard {
    peer: String,
    halves: LaneHalves,
    first: FrameBuffer,
}

impl Lane for Heard {
    fn peer(&self) -> String {
        self.peer.clone()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let LaneHalves { sender, receiver, closer } = self.halves;
        Ok(LaneHalves { sender, receiver: Box::new(AfterFirst { first: Some(self.first), receiver }), closer })
    }
}

struct AfterFirst {
    first: Option<FrameBuffer>,
    receiver: Box<dyn LaneReceiver>,
}

impl LaneReceiver for AfterFirst {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        match self.first.take() {
            Some(first) => frame.fill(first.bytes()),
            None => self.receiver.receive(frame),
        }
    }
}
