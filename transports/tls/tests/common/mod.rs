//! What the tests of this crate share: a CA of their own, and lanes that must still work after an attack.
#![allow(dead_code, unused_imports)] // Each test file uses its part.

mod ca;

pub(crate) use ca::{Ca, Folder, Issued};

use std::sync::Arc;

use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry_conformance::frames::{PATIENCE, body, in_time, receive, send};
use pageferry_tcp::TcpOptions;
use pageferry_tls::{DestinationIdentity, Pairing, SourceIdentity, TlsAcceptor, TlsDialer};

pub(crate) fn listener(identity: DestinationIdentity) -> Arc<TlsAcceptor> {
    Arc::new(TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), identity).unwrap())
}

pub(crate) fn dialer(acceptor: &TlsAcceptor, identity: SourceIdentity) -> TlsDialer {
    TlsDialer::new(acceptor.local_addr().to_string(), TcpOptions::default(), identity)
}

/// A destination to pair with, and its string.
pub(crate) fn receiver() -> (Arc<TlsAcceptor>, Pairing) {
    let identity = DestinationIdentity::for_pairing().unwrap();
    let pairing = identity.pairing().unwrap().clone();
    (listener(identity), pairing)
}

/// Dials while the next caller is heard: what either end says of it.
pub(crate) fn meet(
    acceptor: &Arc<TlsAcceptor>,
    dialer: &dyn Dialer,
) -> (Result<LaneHalves, String>, Result<LaneHalves, String>) {
    let hearing = hear(acceptor);
    let near = dialer.dial(LaneRole::Control, PATIENCE).map_err(|error| error.to_string());
    let near = near.map(|lane| {
        let mut near = lane.split().unwrap();
        let _ = send(&mut near.sender, 1, &body(1, 100));
        near
    });
    (near, in_time(move || hearing.join().unwrap()))
}

/// Hears the next caller on a thread of its own, as the engine does: its lane, or why there is none.
pub(crate) fn hear(acceptor: &Arc<TlsAcceptor>) -> std::thread::JoinHandle<Result<LaneHalves, String>> {
    let acceptor = Arc::clone(acceptor);
    std::thread::spawn(move || {
        let mut far = acceptor.accept(PATIENCE).unwrap().expect("a caller comes").split().unwrap();
        match receive(&mut far.receiver) {
            Ok(frame) => {
                assert!(frame == (1, body(1, 100)));
                Ok(far)
            }
            Err(error) => Err(error.to_string()),
        }
    })
}

/// A real peer's lane, in use.
pub(crate) fn lane(acceptor: &Arc<TlsAcceptor>, dialer: &dyn Dialer) -> (LaneHalves, LaneHalves) {
    match meet(acceptor, dialer) {
        (Ok(near), Ok(far)) => (near, far),
        (near, far) => panic!("{:?} {:?}", near.err(), far.err()),
    }
}

/// Frames go both ways.
pub(crate) fn works((near, far): &mut (LaneHalves, LaneHalves)) {
    for number in 0..3 {
        send(&mut near.sender, number, &body(number, 50_000)).unwrap();
        assert!(receive(&mut far.receiver).unwrap() == (number, body(number, 50_000)));
        send(&mut far.sender, number, &body(number, 70)).unwrap();
        assert!(receive(&mut near.receiver).unwrap() == (number, body(number, 70)));
    }
}

/// Both ends' words for why this dialer is not let in.
pub(crate) fn refused(acceptor: &Arc<TlsAcceptor>, dialer: &dyn Dialer) -> (String, String) {
    match meet(acceptor, dialer) {
        (Err(near), Err(far)) => (near, far),
        (near, far) => panic!("let in: {} {}", near.is_ok(), far.is_ok()),
    }
}
