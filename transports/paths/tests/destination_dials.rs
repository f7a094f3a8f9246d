//! The destination dials: the source's host accepts the lanes, and the engine is given them before it begins.

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use pageferry::host::{Joiner, Spawner, StdSpawner, ThreadRole};
use pageferry::transport::{Acceptor, Dialer, Lane, LaneRole, ReadyLanes};
use pageferry_conformance::frames::{PATIENCE, body, in_time, receive, send};
use pageferry_conformance::{Joined, migrations};
use pageferry_paths::{PathOptions, PathsAcceptor, PathsDialer};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

const LANES: u16 = 3;

/// Both ends, and what breaks connections in between.
fn ends(options: &PathOptions) -> (PathsDialer, PathsAcceptor, Vec<common::Relay>) {
    let acceptors = [(); 2].map(|()| TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap());
    let relays: Vec<_> = acceptors.iter().map(|acceptor| common::Relay::new(acceptor.local_addr())).collect();
    let dialers = relays
        .iter()
        .map(|relay| Arc::new(TcpDialer::new(relay.address.to_string(), TcpOptions::default())) as Arc<dyn Dialer>);
    let dialer = PathsDialer::new(dialers, options.clone());
    let acceptors = acceptors.map(|acceptor| Arc::new(acceptor) as Arc<dyn Acceptor>);
    (dialer, PathsAcceptor::attended(acceptors, options.clone()).unwrap(), relays)
}

/// Lanes that the destination has dialled, as both engines are given them.
fn join() -> Joined {
    let (dialer, acceptor, relays) = ends(&PathOptions::default());
    let roles = (0..LANES).map(LaneRole::Data).chain([LaneRole::Control]);
    let dialled: Vec<_> = roles.map(|role| dialer.dial(role, PATIENCE).unwrap()).collect();
    let accepted: Vec<Box<dyn Lane>> = dialled.iter().map(|_| acceptor.accept(PATIENCE).unwrap().unwrap()).collect();
    std::thread::spawn(move || {
        // Kept as long as the lanes.
        let _ends = (dialer, acceptor);
        for turn in 0..400 {
            std::thread::sleep(Duration::from_millis(25));
            relays[turn % 2].cut();
        }
        loop {
            std::thread::park();
        }
    });
    Joined { dialer: Arc::new(ReadyLanes::new(accepted)), acceptor: Arc::new(ReadyLanes::new(dialled)) }
}

#[test]
fn a_guest_moves_though_connections_break_all_the_time() {
    migrations::a_guest_that_writes_moves_with_every_page(join);
}

#[test]
fn a_lane_goes_on_though_nobody_accepts() {
    let (dialer, acceptor, relays) = ends(&PathOptions::default());
    let mut near = dialer.dial(LaneRole::Data(0), PATIENCE).unwrap().split().unwrap();
    let mut far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    // The accepting end may speak first, and its data lanes hear nothing.
    for number in 0..40 {
        send(&mut far.sender, number, &body(number, 30_000)).unwrap();
        if number % 10 == 5 {
            relays.iter().for_each(common::Relay::cut);
        }
    }
    in_time(move || {
        for number in 0..40 {
            assert_eq!(receive(&mut near.receiver).unwrap(), (number, body(number, 30_000)));
        }
    });
    drop((far, acceptor));
}

/// Counts the threads that were asked for.
#[derive(Default)]
struct Lending(AtomicUsize);

impl Spawner for Lending {
    fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Joiner>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        assert!(matches!(role, ThreadRole::Transport(_)));
        StdSpawner.spawn(role, work)
    }
}

#[test]
fn threads_are_those_that_the_host_lends() {
    let lending = Arc::new(Lending::default());
    let mut options = PathOptions::default();
    options.spawner = lending.clone();
    let (dialer, acceptor, _relays) = ends(&options);
    let near = dialer.dial(LaneRole::Data(0), PATIENCE).unwrap();
    let far = acceptor.accept(PATIENCE).unwrap().unwrap();
    // The attendant, one that hears and its patience, and a pump at either end.
    assert!(lending.0.load(Ordering::SeqCst) >= 5);
    drop((near, far));
}
