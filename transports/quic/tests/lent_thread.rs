//! Everything on one thread that the host lends, at either end.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use pageferry::host::{Joiner, Spawner, StdSpawner, ThreadRole};
use pageferry::transport::LaneRole;
use pageferry_conformance::frames::{PATIENCE, receive, send};
use pageferry_conformance::{Joined, lanes, migrations};
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions};
use pageferry_tls::{DestinationIdentity, SourceIdentity};

/// Counts the threads that run, and those that were asked for.
#[derive(Default)]
struct Lending {
    running: Arc<AtomicUsize>,
    lent: AtomicUsize,
}

impl Spawner for Lending {
    fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Joiner>> {
        assert_eq!(role, ThreadRole::Transport("quic"));
        self.lent.fetch_add(1, Ordering::SeqCst);
        let running = self.running.clone();
        running.fetch_add(1, Ordering::SeqCst);
        let work = move || {
            work();
            running.fetch_sub(1, Ordering::SeqCst);
        };
        StdSpawner.spawn(role, Box::new(work))
    }
}

fn ends(lending: Arc<dyn Spawner>) -> Joined {
    let receiver = DestinationIdentity::for_pairing().unwrap();
    let sender = SourceIdentity::from_pairing(receiver.pairing().unwrap()).unwrap();
    let mut options = QuicOptions::default();
    options.spawner = Some(lending);
    let acceptor = QuicAcceptor::bind("127.0.0.1:0", &options, receiver).unwrap();
    Joined::new(QuicDialer::new(acceptor.local_addr().to_string(), options, sender), acceptor)
}

fn join() -> Joined {
    ends(Arc::new(Lending::default()))
}

#[test]
fn frames_and_guests_come_through() {
    lanes::big_frames_arrive_intact(join);
    migrations::a_guest_that_writes_moves_with_every_page(join);
}

#[test]
fn the_thread_ends_with_its_end() {
    let lending = Arc::new(Lending::default());
    let Joined { dialer, acceptor } = ends(lending.clone());
    let mut near = dialer.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    send(&mut near.sender, 0, b"frame").unwrap();
    let mut far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap().1, b"frame");
    assert_eq!((lending.lent.load(Ordering::SeqCst), lending.running.load(Ordering::SeqCst)), (2, 2));
    drop((near, dialer));
    assert_eq!(lending.running.load(Ordering::SeqCst), 1);
    drop((far, acceptor));
    assert_eq!(lending.running.load(Ordering::SeqCst), 0);
}
