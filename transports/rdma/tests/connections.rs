//! Making connections: what is refused, and in which words.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use common::{acceptor, dialer, missing};
use pageferry::transport::{Acceptor, Dialer, LaneRole};
use pageferry_conformance::frames::{PATIENCE, in_time, receive, send};
use pageferry_conformance::skips;
use pageferry_rdma::{RdmaAcceptor, RdmaDialer, RdmaOptions, first_address};

fn failure(dialer: &RdmaDialer, timeout: Duration) -> String {
    dialer.dial(LaneRole::Control, timeout).err().expect("nobody can be reached there").to_string()
}

#[test]
fn a_host_without_a_device_says_so() {
    if missing().is_none() {
        skips(Some("this host has an RDMA device".to_owned()));
        return;
    }
    let error = RdmaAcceptor::bind("127.0.0.1:0", RdmaOptions::default()).err().map(|error| error.to_string());
    let Some(error) = error else {
        skips(Some("this host has an RDMA device, without an address for tests".to_owned()));
        return;
    };
    assert!(error.contains("no RDMA device") || error.contains("may not use RDMA"), "{error}");
    let error = failure(&dialer("127.0.0.1:9"), PATIENCE);
    assert!(error.contains("no RDMA device") || error.contains("may not use RDMA"), "{error}");
}

#[test]
fn a_refused_connection_asks_for_the_receiver() {
    if skips(missing()) {
        return;
    }
    let address = acceptor().local_addr();
    let error = failure(&dialer(address), PATIENCE);
    assert!(error.contains(&address.to_string()) && error.contains("is the receiver running there"), "{error}");
}

#[test]
fn an_address_without_a_device_is_named() {
    if skips(missing()) {
        return;
    }
    let error = RdmaAcceptor::bind("198.51.100.7:0", RdmaOptions::default()).unwrap_err().to_string();
    assert!(error.contains("198.51.100.7") && error.contains("not an address of an RDMA device"), "{error}");
    let error = failure(&dialer("127.0.0.1:9"), PATIENCE);
    assert!(error.contains("127.0.0.1") && error.contains("not an address of an RDMA device"), "{error}");
}

#[test]
fn bad_targets_are_explained() {
    if skips(missing()) {
        return;
    }
    for (target, expected) in
        [("no-port", "HOST:PORT"), ("host:99999", "HOST:PORT"), ("name.invalid:4000", "cannot be resolved")]
    {
        let error = failure(&dialer(target), PATIENCE);
        assert!(error.contains(target) && error.contains(expected), "{error}");
    }
    let other = dialer("192.0.2.1:9").with_source(Ipv6Addr::LOCALHOST.into());
    assert!(failure(&other, PATIENCE).contains("same family"));
    let foreign = dialer("192.0.2.1:9").with_source(Ipv4Addr::new(198, 51, 100, 7).into());
    assert!(failure(&foreign, PATIENCE).contains("192.0.2.1"));
}

#[test]
fn a_port_that_is_taken_is_named() {
    if skips(missing()) {
        return;
    }
    let first = acceptor();
    let error = RdmaAcceptor::bind(&first.local_addr().to_string(), RdmaOptions::default()).unwrap_err().to_string();
    assert!(error.contains("another program listens there"), "{error}");
}

#[test]
fn a_receiver_that_does_not_accept_is_given_up() {
    if skips(missing()) {
        return;
    }
    let acceptor = acceptor();
    let error = failure(&dialer(acceptor.local_addr()), Duration::from_millis(300));
    assert!(error.contains("did not answer within"), "{error}");
}

/// More callers than may stand in the door, none of whom says anything.
#[test]
fn silent_callers_keep_nobody_out() {
    if skips(missing()) {
        return;
    }
    let acceptor = acceptor();
    let (strangers, caller) = (dialer(acceptor.local_addr()), dialer(acceptor.local_addr()));
    let (told, hear) = std::sync::mpsc::channel();
    let calling = std::thread::spawn(move || {
        let silent: Vec<_> = (0..40).map(|_| strangers.dial(LaneRole::Data(0), PATIENCE).unwrap()).collect();
        let mut lane = caller.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
        send(&mut lane.sender, 7, b"it is me").unwrap();
        told.send(()).unwrap();
        (silent, lane)
    });
    let (mut accepted, started) = (Vec::new(), Instant::now());
    let found = loop {
        assert!(started.elapsed() < PATIENCE, "nobody comes in");
        if let Some(lane) = acceptor.accept(Duration::from_millis(50)).unwrap() {
            accepted.push(lane);
            break accepted.len();
        }
    };
    assert_eq!(found, 1, "a silent caller is no lane");
    let mut lane = accepted.remove(0).split().unwrap();
    assert_eq!(in_time(move || receive(&mut lane.receiver).unwrap().0), 7);
    hear.recv().unwrap();
    drop(calling.join().unwrap());
}

#[test]
fn the_address_of_a_device_is_found() {
    if skips(missing()) {
        return;
    }
    let found = first_address().expect("there is a device");
    RdmaAcceptor::bind(&format!("{found}:0"), RdmaOptions::default()).unwrap();
}

#[test]
fn all_devices_can_be_listened_on() {
    if skips(missing()) {
        return;
    }
    let acceptor = RdmaAcceptor::bind("0.0.0.0:0", RdmaOptions::default()).unwrap();
    let host = std::env::var("PAGEFERRY_RDMA_ADDRESS").unwrap();
    let dialer = dialer(format!("{host}:{}", acceptor.local_addr().port()));
    let calling = std::thread::spawn(move || {
        let mut lane = dialer.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
        send(&mut lane.sender, 3, b"x").unwrap();
        lane
    });
    let mut lane = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    assert_eq!(receive(&mut lane.receiver).unwrap().0, 3);
    drop(calling.join().unwrap());
}
