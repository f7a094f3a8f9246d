//! What lanes over stream sockets do beyond what every transport does.

mod common;

use std::io::{self, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use common::{body, dialer, frame, in_time, joined, listener, receive, send};
use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole, ReadyLanes};
use pageferry_tcp::{TcpOptions, lane_from_fd};

/// Sends `count` frames of the given lengths in turn, receives them meanwhile, compares.
fn exchange(lane: LaneHalves, count: u64, lens: &'static [usize]) {
    let LaneHalves { mut sender, mut receiver, .. } = lane;
    let len = move |number: u64| lens[number as usize % lens.len()];
    let sending = std::thread::spawn(move || {
        for number in 0..count {
            send(&mut sender, number, &body(number, len(number))).unwrap();
        }
        sender
    });
    in_time(move || {
        for number in 0..count {
            assert!(receive(&mut receiver).unwrap() == (number, body(number, len(number))), "frame {number}");
        }
    });
    drop(sending.join().unwrap());
}

/// One direction of a pair of joined lanes.
fn one_way((near, far): (LaneHalves, LaneHalves)) -> LaneHalves {
    LaneHalves { sender: near.sender, receiver: far.receiver, closer: near.closer }
}

#[test]
fn a_byte_at_a_time_still_makes_frames() {
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut slow = TcpStream::connect(listening.local_addr().unwrap()).unwrap();
    slow.set_nodelay(true).unwrap();
    let mut far = lane_from_fd(listening.accept().unwrap().0, &TcpOptions::default()).unwrap().split().unwrap();
    let writing = std::thread::spawn(move || {
        for byte in frame(3, &body(3, 600)) {
            slow.write_all(&[byte]).unwrap();
        }
        slow
    });
    assert_eq!(in_time(move || receive(&mut far.receiver)).unwrap(), (3, body(3, 600)));
    drop(writing.join().unwrap());
}

#[test]
fn the_end_of_a_lane_and_a_cut_frame_are_told_apart() {
    let (near, mut far) = joined();
    drop(near);
    let error = receive(&mut far.receiver).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(error.to_string().contains("closed the connection"), "{error}");

    for sent in [10, 32, 100, 5000] {
        let (mut first, second) = UnixStream::pair().unwrap();
        let mut far = lane_from_fd(second, &TcpOptions::default()).unwrap().split().unwrap();
        first.write_all(&frame(0, &[0; 6000])[..sent]).unwrap();
        drop(first);
        let error = receive(&mut far.receiver).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains("within a frame"), "{sent}: {error}");
    }
}

#[test]
fn bytes_that_are_no_frame_are_invalid_data() {
    let (mut first, second) = UnixStream::pair().unwrap();
    let mut far = lane_from_fd(second, &TcpOptions::default()).unwrap().split().unwrap();
    first.write_all(b"GET / HTTP/1.1\r\nHost: migration.example\r\n\r\n").unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn sending_to_a_peer_that_died_is_an_error_that_says_so() {
    let (mut near, far) = joined();
    drop(far);
    let error = in_time(move || {
        loop {
            if let Err(error) = send(&mut near.sender, 0, &body(0, 100_000)) {
                return error;
            }
        }
    });
    assert!(error.to_string().contains("peer's process has died"), "{error}");
}

#[test]
fn open_descriptors_become_lanes_on_either_side() {
    let (first, second) = UnixStream::pair().unwrap();
    first.set_nonblocking(true).unwrap();
    let options = TcpOptions::default();
    let dialer = ReadyLanes::new([lane_from_fd(first, &options).unwrap()]);
    let acceptor = ReadyLanes::new([lane_from_fd(second, &options).unwrap()]);
    exchange(one_way(common::join(&dialer, &acceptor)), 100, &[10, 300_000]);

    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let first = TcpStream::connect(listening.local_addr().unwrap()).unwrap();
    first.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    let local = first.local_addr().unwrap().to_string();
    let first = lane_from_fd(first, &options).unwrap();
    let second = lane_from_fd(listening.accept().unwrap().0, &options).unwrap();
    assert_eq!((first.peer(), second.peer()), (listening.local_addr().unwrap().to_string(), local));
    exchange(one_way((first.split().unwrap(), second.split().unwrap())), 100, &[10, 300_000]);
}

#[test]
fn descriptors_that_cannot_be_lanes_are_refused() {
    let options = TcpOptions::default();
    let datagrams = UdpSocket::bind("127.0.0.1:0").unwrap();
    let error = lane_from_fd(datagrams, &options).err().unwrap().to_string();
    assert!(error.contains("not a stream socket"), "{error}");
    let unconnected = TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(lane_from_fd(unconnected, &options).is_err());
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(lane_from_fd(file, &options).is_err());
}

#[test]
fn a_lane_names_its_peer() {
    let acceptor = listener("127.0.0.1:0");
    let dialled = dialer(acceptor.local_addr()).dial(LaneRole::Data(1), common::PATIENCE).unwrap();
    let accepted = acceptor.accept(common::PATIENCE).unwrap().unwrap();
    assert_eq!(dialled.peer(), acceptor.local_addr().to_string());
    assert!(accepted.peer().starts_with("127.0.0.1:"));
}
