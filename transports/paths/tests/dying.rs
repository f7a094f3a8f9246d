//! Paths that die for good.

mod common;

use std::io::IoSlice;
use std::sync::Arc;
use std::time::Duration;

use common::over_relays;
use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry::wire::{FrameBuffer, Kind};
use pageferry_conformance::frames::{PATIENCE, body, in_time, receive, send};
use pageferry_conformance::{Joined, migrations};
use pageferry_paths::{PathOptions, PathsAcceptor};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

fn open(joined: &Joined, role: LaneRole) -> (LaneHalves, LaneHalves) {
    let mut near = joined.dialer.dial(role, PATIENCE).unwrap().split().unwrap();
    send(&mut near.sender, 0, b"first").unwrap();
    let acceptor = joined.acceptor.clone();
    let mut far = in_time(move || acceptor.accept(PATIENCE)).unwrap().unwrap().split().unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap().1, b"first");
    (near, far)
}

fn short() -> PathOptions {
    let mut options = PathOptions::default();
    (options.give_up_after, options.redial_timeout) = (Duration::from_millis(500), Duration::from_millis(200));
    options
}

#[test]
fn lanes_are_spread_over_the_paths_and_go_on_when_one_dies() {
    let (joined, relays) = over_relays(&PathOptions::default());
    let Joined { dialer, acceptor } = joined;
    let joined = Joined { dialer, acceptor: Arc::new(common::Doorman::new(acceptor)) };
    let mut lanes: Vec<_> = (0..4).map(|index| open(&joined, LaneRole::Data(index))).collect();
    for number in 1..60 {
        for (near, far) in &mut lanes {
            send(&mut near.sender, number, &body(number, 30_000)).unwrap();
            assert_eq!(receive(&mut far.receiver).unwrap(), (number, body(number, 30_000)));
        }
        if number == 30 {
            assert!(relays.iter().all(|relay| relay.bytes() > 2 * 29 * 30_000), "both paths carry lanes");
            relays[1].kill();
        }
    }
    assert!(relays[0].bytes() > 2 * 85 * 30_000, "{}", relays[0].bytes());
}

#[test]
fn a_migration_goes_on_over_the_path_that_is_left() {
    fn join() -> Joined {
        let (joined, relays) = over_relays(&PathOptions::default());
        std::thread::spawn(move || {
            while relays[0].bytes() < 400_000 {
                std::thread::sleep(Duration::from_millis(1));
            }
            relays[0].kill();
        });
        joined
    }
    migrations::a_guest_that_writes_moves_with_every_page(join);
    migrations::a_capped_migration_arrives(join);
}

#[test]
fn a_lane_without_any_path_breaks_on_both_sides() {
    let (joined, relays) = over_relays(&short());
    let (mut near, mut far) = open(&joined, LaneRole::Control);
    for relay in &relays {
        relay.kill();
    }
    let error = in_time(move || near.receiver.receive(&mut FrameBuffer::new())).unwrap_err();
    assert!(error.to_string().contains("no path to the peer works any more"), "{error}");
    let error = in_time(move || far.receiver.receive(&mut FrameBuffer::new())).unwrap_err();
    assert!(error.to_string().contains("did not come back within 500ms"), "{error}");
    // What is sent comes to nobody, but it does not wait for ever.
    in_time(move || while near.sender.send(&mut [IoSlice::new(&[0; 1000])]).is_ok() {});
    assert!(joined.dialer.dial(LaneRole::Control, Duration::from_millis(300)).is_err());
}

#[test]
fn all_paths_dead_leave_the_guest_at_the_source() {
    fn join() -> Joined {
        let (joined, relays) = over_relays(&short());
        std::thread::spawn(move || {
            while relays.iter().map(common::Relay::bytes).sum::<u64>() < 800_000 {
                std::thread::sleep(Duration::from_millis(1));
            }
            relays.iter().for_each(common::Relay::kill);
        });
        joined
    }
    migrations::a_guest_stays_when_the_link_dies(join);
}

#[test]
fn a_stranger_cannot_go_on_with_a_lane() {
    let tcp = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap();
    let target = tcp.local_addr().to_string();
    let acceptor = PathsAcceptor::new([Arc::new(tcp) as Arc<dyn Acceptor>], PathOptions::default());
    let dialer = TcpDialer::new(target, TcpOptions::default());
    let connect = |first: &[u8]| {
        let mut near = dialer.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
        near.sender.send(&mut [IoSlice::new(first)]).unwrap();
        let lane = acceptor.accept(PATIENCE).unwrap().unwrap();
        let mut far = lane.split().unwrap();
        let hearing = std::thread::spawn(move || (far.receiver.receive(&mut FrameBuffer::new()), far));
        (near, hearing)
    };
    let frame = |body: &[u8]| {
        let len = body.len() as u32;
        let mut header =
            pageferry::wire::Header { kind: Kind::Transport, body_len: len, step: 0, sequence: 0, checksum: 0 };
        header.checksum = header.checksum_of(body);
        [&header.encode(), body].concat()
    };
    // A name that nobody has.
    let (mut near, hearing) = connect(&frame(&[&[1][..], &[9; 16], &[0; 4], &[0; 8]].concat()));
    assert!(hearing.join().unwrap().0.is_err());
    let mut answer = FrameBuffer::new();
    in_time(move || near.receiver.receive(&mut answer).map(|()| assert_eq!(answer.body(), [5]))).unwrap();
    // And nonsense.
    for nonsense in [frame(&[77]), vec![0; 64], frame(&[0, 1, 2])] {
        let (_near, hearing) = connect(&nonsense);
        assert!(in_time(move || hearing.join().unwrap().0.is_err()));
    }
}
