//! What the tests of this crate share: joined lanes, and the suite's frames.
#![allow(dead_code, unused_imports)] // Each test file uses its part.

pub(crate) use pageferry_conformance::frames::{PATIENCE, body, header, in_time, receive, send};

use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

pub(crate) fn listener(address: &str) -> TcpAcceptor {
    TcpAcceptor::bind(address, TcpOptions::default()).unwrap()
}

pub(crate) fn dialer(target: impl std::fmt::Display) -> TcpDialer {
    TcpDialer::new(format!("{target}"), TcpOptions::default())
}

/// Both ends of a new connection: (dialled, accepted).
pub(crate) fn join(dialer: &dyn Dialer, acceptor: &dyn Acceptor) -> (LaneHalves, LaneHalves) {
    let dialled = dialer.dial(LaneRole::Control, PATIENCE).unwrap();
    let accepted = acceptor.accept(PATIENCE).unwrap().expect("the connection that was just made");
    (dialled.split().unwrap(), accepted.split().unwrap())
}

pub(crate) fn joined() -> (LaneHalves, LaneHalves) {
    let acceptor = listener("127.0.0.1:0");
    join(&dialer(acceptor.local_addr()), &acceptor)
}

/// A whole frame.
pub(crate) fn frame(sequence: u64, body: &[u8]) -> Vec<u8> {
    [&header(sequence, body.len()), body].concat()
}
