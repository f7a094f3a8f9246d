//! A thousand callers that connect and leave it at that.

mod common;

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::{Ca, dialer, listener, works};
use pageferry::transport::{Acceptor, Capabilities, Dialer, Lane, LaneRole, TransportError};
use pageferry_conformance::Joined;
use pageferry_conformance::frames::{PATIENCE, body, receive, send};
use pageferry_tcp::TcpOptions;
use pageferry_tls::{SourceIdentity, TlsAcceptor, TlsDialer};

const CALLERS: usize = 1000;

/// Callers that say nothing, or only half of a record; fewer when nobody accepts them any more.
fn callers(address: SocketAddr, count: usize, patience: Duration) -> Vec<TcpStream> {
    let call = |index: usize| {
        let mut socket = TcpStream::connect_timeout(&address, patience).ok()?;
        if index.is_multiple_of(3) {
            socket.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1]).ok()?;
        }
        Some(socket)
    };
    (0..count).map_while(call).collect()
}

/// Whether this process may have both ends of so many connections; says so if not.
fn may_have_them_all() -> bool {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: a structure of its own for the kernel to fill, and then to read.
    let raised = unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) == 0 && {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) == 0
        }
    };
    let enough = raised && limit.rlim_cur >= 3 * CALLERS as libc::rlim_t;
    if !enough {
        let said = format_args!("skipped: at most {} open descriptors are allowed here\n", limit.rlim_max);
        drop(std::io::stderr().write_fmt(said));
    }
    enough
}

#[test]
fn a_lane_is_opened_and_used_among_a_thousand_half_open_connections() {
    if !may_have_them_all() {
        return;
    }
    let ca = Ca::new("the CA");
    let acceptor = listener(ca.destination());
    let source = dialer(&acceptor, ca.source());
    let address = acceptor.local_addr();
    let calling = std::thread::spawn(move || {
        let before = callers(address, CALLERS / 2, PATIENCE);
        let lane = source.dial(LaneRole::Control, PATIENCE).unwrap();
        (before, lane, callers(address, CALLERS / 2, PATIENCE))
    });
    // Each is heard on a thread of its own, and only one ever says something.
    let (found, heard) = std::sync::mpsc::channel();
    let mut closers = Vec::new();
    for _ in 0..=CALLERS {
        let mut lane = acceptor.accept(PATIENCE).unwrap().expect("they all come").split().unwrap();
        closers.push(Arc::clone(&lane.closer));
        let found = found.clone();
        std::thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || {
                if receive(&mut lane.receiver).is_ok_and(|frame| frame == (1, body(1, 100))) {
                    found.send(lane).unwrap();
                }
            })
            .unwrap();
    }
    let (_before, near, _after) = calling.join().unwrap();
    let mut near = near.split().unwrap();
    send(&mut near.sender, 1, &body(1, 100)).unwrap();
    let far = heard.recv_timeout(PATIENCE).expect("it is let in");
    works(&mut (near, far));
    for closer in closers {
        closer.close();
    }
}

/// Calls a thousand times when its last lane is open.
struct Flood {
    dialer: TlsDialer,
    address: SocketAddr,
    dialled: AtomicUsize,
    calling: Mutex<Option<std::thread::JoinHandle<usize>>>,
}

impl Drop for Flood {
    fn drop(&mut self) {
        let calling = self.calling.get_mut().unwrap().take().expect("the lanes were opened");
        assert!(calling.join().unwrap() > 256, "the door was never full");
    }
}

impl Dialer for Flood {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let lane = self.dialer.dial(role, timeout);
        if self.dialled.fetch_add(1, Ordering::SeqCst) == 2 {
            let address = self.address;
            *self.calling.lock().unwrap() =
                Some(std::thread::spawn(move || callers(address, CALLERS, Duration::from_secs(2)).len()));
        }
        lane
    }

    fn capabilities(&self) -> Capabilities {
        self.dialer.capabilities()
    }
}

fn flooded() -> Joined {
    let ca = Ca::new("the CA");
    let acceptor = TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), ca.destination()).unwrap();
    let address = acceptor.local_addr();
    let dialer = TlsDialer::new(address.to_string(), TcpOptions::default(), SourceIdentity::clone(&ca.source()));
    Joined::new(Flood { dialer, address, dialled: 0.into(), calling: Mutex::default() }, acceptor)
}

#[test]
fn a_migration_goes_on_while_a_thousand_strangers_call() {
    if !may_have_them_all() {
        return;
    }
    pageferry_conformance::migrations::a_capped_migration_arrives(flooded);
}
