//! What the tests of this crate share: joined lanes, frames, and a way to notice that something hangs.
#![allow(dead_code)]

use std::io::{self, IoSlice};
use std::sync::mpsc;
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneReceiver, LaneRole, LaneSender};
use pageferry::wire::{FrameBuffer, HEADER_LEN, Header, Kind};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

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

/// A body that no other number has.
pub(crate) fn body(number: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|index| (index.wrapping_mul(31) ^ index >> 8 ^ number.wrapping_mul(0x9E37)) as u8).collect()
}

/// A whole frame.
pub(crate) fn frame(sequence: u64, body: &[u8]) -> Vec<u8> {
    [&header(sequence, body.len()), body].concat()
}

pub(crate) fn header(sequence: u64, body_len: usize) -> [u8; HEADER_LEN] {
    Header { kind: Kind::State, body_len: body_len as u32, step: 0, sequence, checksum: 0 }.encode()
}

pub(crate) fn send(sender: &mut Box<dyn LaneSender>, sequence: u64, body: &[u8]) -> io::Result<()> {
    sender.send(&mut [IoSlice::new(&header(sequence, body.len())), IoSlice::new(&[]), IoSlice::new(body)])
}

pub(crate) fn receive(receiver: &mut Box<dyn LaneReceiver>) -> io::Result<(u64, Vec<u8>)> {
    let mut frame = FrameBuffer::new();
    receiver.receive(&mut frame)?;
    assert_eq!(frame.bytes().len(), HEADER_LEN + frame.body().len());
    Ok((frame.header().unwrap().sequence, frame.body().to_vec()))
}

/// Runs `work` on a thread of its own; panics when it takes longer than anything should.
pub(crate) fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    finished.recv_timeout(PATIENCE).expect("it hangs, or its thread panicked")
}
