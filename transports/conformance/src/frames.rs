//! Frames to send and compare, and a way to notice that something hangs.

use std::io::{self, IoSlice};
use std::sync::mpsc;
use std::time::Duration;

use pageferry::transport::{LaneHalves, LaneReceiver, LaneRole, LaneSender};
use pageferry::wire::{FrameBuffer, HEADER_LEN, Header, Kind};

use crate::Joined;

/// Nothing here takes so long.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A new lane's ends: (dialled, accepted). An acceptor may need the first frame before it has a lane to give
/// away, so one is sent.
pub(crate) fn lane(joined: &Joined, role: LaneRole) -> (LaneHalves, LaneHalves) {
    let Joined { dialer, acceptor } = joined;
    let (dialer, acceptor) = (dialer.clone(), acceptor.clone());
    let accepting = std::thread::spawn(move || acceptor.accept(PATIENCE));
    let dialled = dialer.dial(role, PATIENCE).expect("the acceptor is there");
    let mut near = dialled.split().expect("a lane has two halves");
    send(&mut near.sender, u64::MAX, b"here I am").expect("a new lane takes a frame");
    let accepted = accepting.join().expect("accepting does not panic").expect("a lane comes");
    let mut far = accepted.expect("a lane comes in time").split().expect("a lane has two halves");
    assert_eq!(receive(&mut far.receiver).expect("the first frame").1, b"here I am");
    (near, far)
}

/// A body that no other number has.
pub fn body(number: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|index| (index.wrapping_mul(31) ^ index >> 8 ^ number.wrapping_mul(0x9E37)) as u8).collect()
}

/// A header, with nothing right about it but the lengths.
pub fn header(sequence: u64, body_len: usize) -> [u8; HEADER_LEN] {
    Header { kind: Kind::State, body_len: body_len as u32, step: 0, sequence, checksum: 0 }.encode()
}

/// Sends a body as a frame, in three parts of which one is empty.
pub fn send(sender: &mut Box<dyn LaneSender>, sequence: u64, body: &[u8]) -> io::Result<()> {
    sender.send(&mut [IoSlice::new(&header(sequence, body.len())), IoSlice::new(&[]), IoSlice::new(body)])
}

/// The next frame's sequence and body.
pub fn receive(receiver: &mut Box<dyn LaneReceiver>) -> io::Result<(u64, Vec<u8>)> {
    let mut frame = FrameBuffer::new();
    receiver.receive(&mut frame)?;
    assert_eq!(frame.bytes().len(), HEADER_LEN + frame.body().len());
    let header = frame.header().map_err(io::Error::other)?;
    Ok((header.sequence, frame.body().to_vec()))
}

/// Runs `work` on a thread of its own; panics when it takes longer than anything should.
pub fn in_time<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, finished) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    finished.recv_timeout(PATIENCE).expect("it hangs, or its thread panicked")
}
