//! What a lane carries, and how it ends.

use std::io::{self, IoSlice};
use std::sync::mpsc;
use std::time::Duration;

use pageferry::limits::MAX_FRAME_BODY;
use pageferry::transport::{LaneHalves, LaneReceiver, LaneRole, LaneSender};
use pageferry::wire::FrameBuffer;

use crate::Joined;
use crate::frames::{PATIENCE, body, header, in_time, lane, receive, send};

/// A peer that took no frame for so long takes none any more.
const STUCK: Duration = Duration::from_millis(300);

fn control(join: fn() -> Joined) -> (LaneHalves, LaneHalves) {
    lane(&join(), LaneRole::Control)
}

/// Sends `count` frames of the given lengths in turn, receives them meanwhile, compares.
fn exchange(mut sender: Box<dyn LaneSender>, mut receiver: Box<dyn LaneReceiver>, count: u64, lens: &'static [usize]) {
    let len = move |number: u64| lens[number as usize % lens.len()];
    let sending = std::thread::spawn(move || {
        for number in 0..count {
            send(&mut sender, number, &body(number, len(number))).expect("the lane takes a frame");
        }
        sender
    });
    in_time(move || {
        for number in 0..count {
            let found = receive(&mut receiver).expect("the lane brings a frame");
            assert!(found == (number, body(number, len(number))), "frame {number}");
        }
    });
    drop(sending.join().expect("the sending thread does not panic"));
}

fn exchange_forth(join: fn() -> Joined, count: u64, lens: &'static [usize]) {
    let (near, far) = control(join);
    exchange(near.sender, far.receiver, count, lens);
}

/// Frames as long as they may be.
pub fn big_frames_arrive_intact(join: fn() -> Joined) {
    exchange_forth(join, 64, &[MAX_FRAME_BODY, 512 << 10, (512 << 10) + 700, 65_537]);
}

/// Frames as short as they may be, and around the sizes at which transports change their ways.
pub fn many_small_frames_arrive_intact(join: fn() -> Joined) {
    exchange_forth(join, 5000, &[0, 1, 31, 32, 33, 447, 480, 481, 2000]);
}

/// A short frame after a long one, and the other way round.
pub fn small_and_big_frames_mix(join: fn() -> Joined) {
    exchange_forth(join, 300, &[0, 300_000, 5, 479, 480, 481, 4096, 1]);
}

/// More parts than one system call takes.
pub fn a_frame_in_many_parts_arrives_intact(join: fn() -> Joined) {
    let (mut near, mut far) = control(join);
    let frame = [&header(7, 5000)[..], &body(7, 5000)].concat();
    let mut parts: Vec<_> = frame.chunks(2).map(IoSlice::new).collect();
    assert!(parts.len() > 2000);
    near.sender.send(&mut parts).expect("the lane takes a frame");
    assert_eq!(receive(&mut far.receiver).expect("it arrives"), (7, body(7, 5000)));
}

/// Both directions of one lane at the same time.
pub fn lanes_carry_both_ways_at_once(join: fn() -> Joined) {
    let (near, far) = control(join);
    let (sender, receiver) = (near.sender, far.receiver);
    let other = std::thread::spawn(|| exchange(sender, receiver, 100, &[200_000]));
    exchange(far.sender, near.receiver, 100, &[200_000, 10]);
    other.join().expect("the other direction works too");
}

/// A peer that is dropped ends the lane in order.
pub fn the_end_of_a_lane_is_told(join: fn() -> Joined) {
    let (near, mut far) = control(join);
    drop(near);
    let error = in_time(move || receive(&mut far.receiver)).expect_err("nothing was sent");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
}

/// The last message, such as why a peer gave up, is not lost with the lane.
pub fn what_was_sent_before_the_end_arrives(join: fn() -> Joined) {
    let (mut near, mut far) = control(join);
    for number in 0..3 {
        send(&mut near.sender, number, &body(number, 1000)).expect("the lane takes a frame");
    }
    drop(near);
    in_time(move || {
        for number in 0..3 {
            assert_eq!(receive(&mut far.receiver).expect("it was sent").0, number);
        }
        assert_eq!(receive(&mut far.receiver).expect_err("that was all").kind(), io::ErrorKind::UnexpectedEof);
    });
}

/// Sends until the peer, who reads nothing, takes no more.
fn stick(mut sender: Box<dyn LaneSender>) -> std::thread::JoinHandle<io::Error> {
    let (sent, progress) = mpsc::channel();
    let sending = std::thread::spawn(move || {
        loop {
            if let Err(error) = send(&mut sender, 0, &body(0, MAX_FRAME_BODY)) {
                return error;
            }
            let _ = sent.send(());
        }
    });
    while progress.recv_timeout(STUCK).is_ok() {}
    sending
}

/// From any thread, and more than once.
pub fn closing_ends_a_blocked_send_and_a_blocked_receive(join: fn() -> Joined) {
    let (near, far) = control(join);
    let LaneHalves { sender, mut receiver, closer } = near;
    let receiving = std::thread::spawn(move || receiver.receive(&mut FrameBuffer::new()).expect_err("it was closed"));
    let sending = stick(sender);
    closer.close();
    closer.close();
    in_time(move || (sending.join().expect("no panic"), receiving.join().expect("no panic")));
    drop(far);
}

/// Whoever reads finds the end.
pub fn the_peer_notices_a_close(join: fn() -> Joined) {
    let (near, mut far) = control(join);
    near.closer.close();
    let error = in_time(move || receive(&mut far.receiver)).expect_err("it was closed");
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "{error}");
}

/// Sooner or later.
pub fn sending_to_a_peer_that_is_gone_is_an_error(join: fn() -> Joined) {
    let (mut near, far) = control(join);
    drop(far);
    in_time(move || while send(&mut near.sender, 0, &body(0, 100_000)).is_ok() {});
}

/// One lane's reader may be busy for long.
pub fn a_stuck_lane_holds_up_no_other(join: fn() -> Joined) {
    let joined = join();
    let (stuck, unread) = lane(&joined, LaneRole::Data(0));
    let sending = stick(stuck.sender);
    let (near, far) = lane(&joined, LaneRole::Data(1));
    exchange(near.sender, far.receiver, 50, &[100_000, 10]);
    exchange(far.sender, near.receiver, 50, &[10]);
    stuck.closer.close();
    in_time(move || sending.join().expect("no panic"));
    drop(unread);
}

/// Frames go to the lane that they were sent on, whatever the order in which lanes were opened.
pub fn many_lanes_are_open_at_once(join: fn() -> Joined) {
    let joined = join();
    let lanes: Vec<_> = (0..16).map(|index| lane(&joined, LaneRole::Data(index))).collect();
    let threads: Vec<_> = lanes
        .into_iter()
        .enumerate()
        .map(|(index, (mut near, mut far))| {
            std::thread::spawn(move || {
                let number = index as u64;
                for round in 0..20 {
                    send(&mut near.sender, number, &body(number, 10_000 + round)).expect("the lane takes a frame");
                    assert_eq!(receive(&mut far.receiver).expect("it arrives"), (number, body(number, 10_000 + round)));
                }
            })
        })
        .collect();
    in_time(move || threads.into_iter().for_each(|thread| thread.join().expect("the lane works")));
}

/// Nobody came: that is no error.
pub fn accepting_ends_with_its_timeout_and_goes_on_afterwards(join: fn() -> Joined) {
    let joined = join();
    let none = |timeout| joined.acceptor.accept(timeout).expect("accepting works").is_none();
    assert!(none(Duration::ZERO) && none(Duration::from_millis(20)));
    let (near, far) = lane(&joined, LaneRole::Control);
    exchange(near.sender, far.receiver, 3, &[100]);
}

/// For messages to people.
pub fn a_lane_names_its_peer(join: fn() -> Joined) {
    let Joined { dialer, acceptor } = join();
    let accepting = std::thread::spawn(move || acceptor.accept(PATIENCE));
    let dialled = dialer.dial(LaneRole::Data(1), PATIENCE).expect("the acceptor is there");
    assert!(!dialled.peer().is_empty());
    let mut near = dialled.split().expect("a lane has two halves");
    send(&mut near.sender, 0, &[]).expect("a new lane takes a frame");
    let accepted = accepting.join().expect("no panic").expect("a lane comes").expect("in time");
    assert!(!accepted.peer().is_empty());
}
