//! Peers that speak the protocol by hand: late, slow, silent, or strangers.

mod common;

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer, InMemoryAcceptor, InMemoryDialer, LaneHalves, LaneRole, in_memory};
use pageferry::wire::{FrameBuffer, Header, Kind};
use pageferry_conformance::frames::{PATIENCE, body, in_time, receive, send};
use pageferry_paths::{PathOptions, PathsAcceptor, PathsDialer};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

/// A frame of the kind that both ends use among themselves.
fn own(body: &[u8]) -> Vec<u8> {
    let mut header = Header { kind: Kind::Transport, body_len: body.len() as u32, step: 0, sequence: 0, checksum: 0 };
    header.checksum = header.checksum_of(body);
    [&header.encode(), body].concat()
}

fn tell(lane: &mut LaneHalves, body: &[u8]) {
    lane.sender.send(&mut [IoSlice::new(&own(body))]).unwrap();
}

/// The next frame of that kind; the engine's are passed over.
fn hear(lane: &mut LaneHalves) -> Option<Vec<u8>> {
    loop {
        let mut frame = FrameBuffer::new();
        lane.receiver.receive(&mut frame).ok()?;
        if frame.header().unwrap().kind == Kind::Transport {
            return Some(frame.body().to_vec());
        }
    }
}

fn number(message: &[u8]) -> u64 {
    u64::from_le_bytes(message[message.len() - 8..].try_into().unwrap())
}

/// A dialler over one TCP path, and whoever it reaches.
fn dialler(options: PathOptions) -> (PathsDialer, impl Fn() -> LaneHalves) {
    let tcp = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap();
    let target = tcp.local_addr().to_string();
    let path = Arc::new(TcpDialer::new(target, TcpOptions::default())) as Arc<dyn Dialer>;
    let accept = move || tcp.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    (PathsDialer::new([path], options), accept)
}

#[test]
fn a_peer_is_never_told_less_than_before() {
    let (dialler, accept) = dialler(PathOptions::default());
    let near = dialler.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    let (mut sender, mut receiver) = (near.sender, near.receiver);
    let mut peer = accept();
    assert_eq!(hear(&mut peer).unwrap()[0], 0);
    tell(&mut peer, &[&[2][..], &[0; 8]].concat());
    // More than sockets hold, and the peer reads nothing: it is in the middle of a frame from some time on.
    let (enough, sent) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (stop, count) = (enough.clone(), sent.clone());
    let sending = std::thread::spawn(move || {
        for number in 0.. {
            if stop.load(Ordering::SeqCst) || send(&mut sender, number, &body(number, 50_000)).is_err() {
                return sender;
            }
            count.store(number + 1, Ordering::SeqCst);
        }
        sender
    });
    let mut before = 0;
    while before < 2 || before != sent.load(Ordering::SeqCst) {
        before = sent.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(300));
    }
    let frames = 1024 + 10;
    for number in 0..frames {
        send(&mut peer.sender, number, &[]).unwrap();
        assert_eq!(receive(&mut receiver).unwrap().0, number);
    }
    enough.store(true, Ordering::SeqCst);
    peer.closer.close();
    let mut peer = accept();
    let message = hear(&mut peer).unwrap();
    assert_eq!((message[0], number(&message)), (1, frames));
    tell(&mut peer, &[&[2][..], &[0; 8]].concat());
    // It sends again what was sent before; whatever it says meanwhile is no less.
    for _ in 0..2 {
        let mut frame = FrameBuffer::new();
        peer.receiver.receive(&mut frame).unwrap();
        if frame.header().unwrap().kind == Kind::Transport {
            assert!(number(frame.body()) >= frames, "told {frames}, and then {}", number(frame.body()));
        }
    }
    peer.closer.close();
    drop(receiver);
    near.closer.close();
    in_time(move || drop(sending.join().unwrap()));
}

/// Both ends over lanes within this process, which hold four frames.
fn over_memory(options: &PathOptions) -> (LaneHalves, LaneHalves) {
    let (dialer, acceptor): (InMemoryDialer, InMemoryAcceptor) = in_memory();
    let dialer = PathsDialer::new([Arc::new(dialer) as Arc<dyn Dialer>], options.clone());
    let acceptor = PathsAcceptor::new([Arc::new(acceptor) as Arc<dyn Acceptor>], options.clone());
    let mut near = dialer.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    send(&mut near.sender, 0, b"first").unwrap();
    let mut far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    send(&mut near.sender, 1, b"second").unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap().1, b"first");
    assert_eq!(receive(&mut far.receiver).unwrap().1, b"second");
    std::mem::forget((dialer, acceptor));
    (near, far)
}

#[test]
fn both_ways_may_be_full_at_once() {
    let (mut near, mut far) = over_memory(&PathOptions::default());
    let big = |sender: &mut _, count: std::ops::Range<u64>| {
        count.for_each(|number| send(sender, number, &vec![0; 1 << 20]).unwrap());
        // Until all of it is where it can go.
        std::thread::sleep(Duration::from_millis(200));
    };
    // Four in the lane, two in front of the engine, one in between; what the near end has to tell finds no room.
    big(&mut near.sender, 0..7);
    big(&mut far.sender, 0..1);
    big(&mut far.sender, 1..5);
    in_time(move || {
        (0..7).for_each(|number| assert_eq!(receive(&mut far.receiver).unwrap().0, number));
        (0..5).for_each(|number| assert_eq!(receive(&mut near.receiver).unwrap().0, number));
    });
}

#[test]
fn little_may_be_unacknowledged() {
    let mut options = PathOptions::default();
    options.unacknowledged = 64 << 10;
    let (mut near, mut far) = over_memory(&options);
    let sending = std::thread::spawn(move || {
        (0..100).for_each(|number| send(&mut near.sender, number, &body(number, 30_000)).unwrap());
        near
    });
    in_time(move || {
        for number in 0..100 {
            assert_eq!(receive(&mut far.receiver).unwrap(), (number, body(number, 30_000)));
        }
    });
    drop(sending.join().unwrap());
}

/// An acceptor over one TCP path, with somebody at its door, and connections to it.
fn acceptor(options: PathOptions) -> (common::Doorman, impl Fn() -> LaneHalves) {
    let tcp = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap();
    let path = TcpDialer::new(tcp.local_addr().to_string(), TcpOptions::default());
    let acceptor = PathsAcceptor::new([Arc::new(tcp) as Arc<dyn Acceptor>], options);
    let connect = move || path.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    (common::Doorman::new(Arc::new(acceptor)), connect)
}

const NAME: [u8; 16] = [7; 16];

fn begin(attempt: u32) -> Vec<u8> {
    [&[0][..], &NAME, &attempt.to_le_bytes()].concat()
}

fn go_on(attempt: u32, received: u64) -> Vec<u8> {
    [&[1][..], &NAME, &attempt.to_le_bytes(), &received.to_le_bytes()].concat()
}

#[test]
fn a_connection_that_was_given_up_and_comes_late_changes_nothing() {
    let (acceptor, connect) = acceptor(PathOptions::default());
    let mut peer = connect();
    tell(&mut peer, &begin(0));
    send(&mut peer.sender, 0, b"first").unwrap();
    let mut far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap().1, b"first");
    assert_eq!(hear(&mut peer).unwrap(), [&[2][..], &[0; 8]].concat());
    // It was cut off, tried to go on twice, and was heard the second time.
    let (mut late, mut later) = (connect(), connect());
    peer.closer.close();
    peer = connect();
    tell(&mut peer, &go_on(3, 0));
    assert_eq!(number(&hear(&mut peer).unwrap()), 1);
    for sequence in 0..5 {
        send(&mut far.sender, sequence, b"answer").unwrap();
        assert_eq!(receive(&mut peer.receiver).unwrap(), (sequence, b"answer".to_vec()));
    }
    tell(&mut peer, &[&[3][..], &5u64.to_le_bytes()].concat());
    send(&mut peer.sender, 1, b"second").unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap().1, b"second");
    // Now the earlier ones come through.
    tell(&mut late, &go_on(2, 0));
    assert_eq!(hear(&mut late), None);
    tell(&mut later, &begin(1));
    assert_eq!(hear(&mut later), None);
    send(&mut peer.sender, 2, b"third").unwrap();
    assert_eq!(in_time(move || receive(&mut far.receiver)).unwrap().1, b"third");
    send(&mut far.sender, 5, b"answer").unwrap();
    assert_eq!(receive(&mut peer.receiver).unwrap(), (5, b"answer".to_vec()));
}

#[test]
fn a_lane_goes_on_while_the_engine_takes_nothing() {
    let mut options = PathOptions::default();
    (options.give_up_after, options.redial_timeout) = (Duration::from_secs(3), Duration::from_secs(1));
    let (joined, relays) = common::over_relays(&options);
    let doorman = common::Doorman::new(joined.acceptor);
    let mut near = joined.dialer.dial(LaneRole::Data(0), PATIENCE).unwrap().split().unwrap();
    for number in 0..20 {
        send(&mut near.sender, number, &body(number, 200)).unwrap();
    }
    let mut far = doorman.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    for number in 0..2 {
        assert_eq!(receive(&mut far.receiver).unwrap(), (number, body(number, 200)));
    }
    // The engine waits at a barrier now, longer than lanes bear to be without a connection.
    std::thread::sleep(Duration::from_millis(100));
    for turn in 0..4 {
        relays[turn % 2].cut();
        std::thread::sleep(Duration::from_secs(1));
    }
    send(&mut near.sender, 20, &body(20, 200)).unwrap();
    in_time(move || {
        for number in 2..21 {
            assert_eq!(receive(&mut far.receiver).unwrap(), (number, body(number, 200)));
        }
    });
    drop(near);
}

#[test]
fn a_stranger_is_let_go_without_a_word() {
    let (acceptor, connect) = acceptor(PathOptions::default());
    let mut peer = connect();
    tell(&mut peer, &begin(0));
    send(&mut peer.sender, 0, b"a greeting").unwrap();
    let far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    assert_eq!(hear(&mut peer).unwrap()[0], 2);
    far.closer.close();
    // No thread waits for it to say that it has heard the end.
    assert_eq!(hear(&mut peer), None);
    drop(far);
}

#[test]
fn without_any_path_there_is_nothing_to_accept_or_to_dial() {
    let acceptor = PathsAcceptor::new([], PathOptions::default());
    assert!(acceptor.accept(Duration::ZERO).is_err() && !acceptor.capabilities().encrypted);
    let dialler = PathsDialer::new([], PathOptions::default());
    assert!(dialler.dial(LaneRole::Control, PATIENCE).is_err() && !dialler.capabilities().encrypted);
}

#[test]
fn what_was_sent_before_the_end_arrives_though_the_connection_broke() {
    let (dialler, accept) = dialler(PathOptions::default());
    let mut near = dialler.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    let mut peer = accept();
    assert_eq!(hear(&mut peer).unwrap()[0], 0);
    tell(&mut peer, &[&[2][..], &[0; 8]].concat());
    peer.closer.close();
    for number in 0..3 {
        send(&mut near.sender, number, &body(number, 100_000)).unwrap();
    }
    near.closer.close();
    let mut peer = accept();
    let first = hear(&mut peer).unwrap()[0];
    assert!(first <= 1);
    tell(&mut peer, &[&[2][..], &[0; 8]].concat());
    for number in 0..3 {
        assert_eq!(receive(&mut peer.receiver).unwrap(), (number, body(number, 100_000)));
    }
    assert_eq!(hear(&mut peer), Some(vec![4]));
}

#[test]
fn a_path_that_opens_and_breaks_at_once_is_not_tried_without_a_pause() {
    let (dialler, accept) = dialler(PathOptions::default());
    let near = dialler.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    let (count, over) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let (tries, ended) = (count.clone(), over.clone());
    let peer = std::thread::spawn(move || {
        while !ended.load(Ordering::SeqCst) {
            let mut peer = accept();
            assert!(hear(&mut peer).unwrap()[0] <= 1);
            tell(&mut peer, &[&[2][..], &[0; 8]].concat());
            tries.fetch_add(1, Ordering::SeqCst);
        }
    });
    std::thread::sleep(Duration::from_millis(1500));
    // On a slow host there are fewer still.
    assert!((2..12).contains(&count.load(Ordering::SeqCst)), "{count:?}");
    over.store(true, Ordering::SeqCst);
    peer.join().unwrap();
    near.closer.close();
}

#[test]
fn what_is_kept_to_be_sent_again_counts_as_a_lanes_memory() {
    let memory = |unacknowledged| {
        let mut options = PathOptions::default();
        options.unacknowledged = unacknowledged;
        let path = Arc::new(in_memory().0) as Arc<dyn Dialer>;
        PathsDialer::new([path], options).capabilities().lane_memory
    };
    assert!(memory(16 << 20) >= 16 << 20);
    assert_eq!(memory(64 << 20) - memory(16 << 20), 48 << 20);
}
