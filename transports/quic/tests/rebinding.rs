//! The source's address changes in the middle of a migration.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::transport::{Acceptor, Capabilities, Dialer, Lane, LaneRole, TransportError};
use pageferry_conformance::Joined;
use pageferry_conformance::frames::{PATIENCE, body, receive, send};
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions};
use pageferry_tls::{DestinationIdentity, SourceIdentity};

fn ends() -> (QuicDialer, QuicAcceptor) {
    let receiver = DestinationIdentity::for_pairing().unwrap();
    let sender = SourceIdentity::from_pairing(receiver.pairing().unwrap()).unwrap();
    let acceptor = QuicAcceptor::bind("127.0.0.1:0", &QuicOptions::default(), receiver).unwrap();
    (QuicDialer::new(acceptor.local_addr().to_string(), QuicOptions::default(), sender), acceptor)
}

fn other_address(number: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 2 + number as u8], 0))
}

#[test]
fn lanes_go_on_from_another_address() {
    let (dialer, acceptor) = ends();
    let mut near = dialer.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    send(&mut near.sender, 0, b"").unwrap();
    let far = acceptor.accept(PATIENCE).unwrap().unwrap();
    assert!(far.peer().starts_with("127.0.0.1:"), "{}", far.peer());
    let mut far = far.split().unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap().0, 0);
    for number in 1..5 {
        dialer.rebind(other_address(number)).unwrap();
        for index in 0..20 {
            let sequence = number as u64 * 100 + index;
            send(&mut near.sender, sequence, &body(sequence, 100_000)).unwrap();
            assert!(receive(&mut far.receiver).unwrap() == (sequence, body(sequence, 100_000)));
            send(&mut far.sender, sequence, b"yes").unwrap();
            assert!(receive(&mut near.receiver).unwrap() == (sequence, b"yes".to_vec()));
        }
        // A lane that is opened now shows where the connection comes from.
        let mut next = dialer.dial(LaneRole::Data(0), PATIENCE).unwrap().split().unwrap();
        send(&mut next.sender, 0, b"").unwrap();
        let peer = acceptor.accept(PATIENCE).unwrap().unwrap().peer();
        assert!(peer.starts_with(&format!("127.0.0.{}:", 2 + number)), "{peer}");
    }
}

/// Moves to another address again and again as soon as all lanes are open.
struct Restless {
    dialer: Arc<QuicDialer>,
    dialled: AtomicUsize,
    over: Arc<AtomicBool>,
    moving: Mutex<Option<JoinHandle<usize>>>,
}

impl Drop for Restless {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        let moving = self.moving.get_mut().unwrap().take().expect("the lanes were opened");
        assert!(moving.join().unwrap() >= 3, "it moved too seldom to mean anything");
    }
}

impl Dialer for Restless {
    fn dial(&self, role: LaneRole, timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        let lane = self.dialer.dial(role, timeout);
        if self.dialled.fetch_add(1, Ordering::SeqCst) == 2 {
            let (dialer, over) = (Arc::clone(&self.dialer), Arc::clone(&self.over));
            *self.moving.lock().unwrap() = Some(std::thread::spawn(move || {
                let mut moves = 0;
                while !over.load(Ordering::SeqCst) {
                    std::thread::sleep(Duration::from_millis(100));
                    dialer.rebind(other_address(moves % 200)).unwrap();
                    moves += 1;
                }
                moves
            }));
        }
        lane
    }

    fn capabilities(&self) -> Capabilities {
        self.dialer.capabilities()
    }
}

fn restless() -> Joined {
    let (dialer, acceptor) = ends();
    let (dialled, over) = (AtomicUsize::new(0), Arc::default());
    Joined::new(Restless { dialer: Arc::new(dialer), dialled, over, moving: Mutex::default() }, acceptor)
}

#[test]
fn a_migration_goes_on_from_another_address() {
    pageferry_conformance::migrations::a_slow_migration_arrives(restless);
}
