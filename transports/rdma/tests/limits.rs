//! A process that may lock little memory, as most may. The emulated machine runs this, and the suite, as such a user.

mod common;

use common::{acceptor, dialer, missing};
use pageferry::transport::{Acceptor, Dialer, LaneRole};
use pageferry_conformance::frames::{PATIENCE, receive, send};
use pageferry_conformance::skips;

fn limited() -> Option<String> {
    missing().or_else(|| {
        let unlimited = dialer("192.0.2.1:1").capabilities().max_lanes > 100;
        unlimited.then(|| "this process may lock as much memory as it likes".to_owned())
    })
}

#[test]
fn a_limit_allows_few_lanes_and_says_so() {
    if skips(limited()) {
        return;
    }
    let acceptor = acceptor();
    for capabilities in [acceptor.capabilities(), dialer(acceptor.local_addr()).capabilities()] {
        assert!((2..=5).contains(&capabilities.max_lanes), "{capabilities:?}");
        assert!(capabilities.one_sided);
    }
}

#[test]
fn an_exhausted_limit_is_explained_and_over_when_lanes_are_gone() {
    if skips(limited()) {
        return;
    }
    let acceptor = acceptor();
    let dialer = dialer(acceptor.local_addr());
    let accepting = std::thread::spawn(move || {
        let mut lanes = Vec::new();
        while let Some(lane) = acceptor.accept(PATIENCE).unwrap() {
            let mut lane = lane.split().unwrap();
            let last = receive(&mut lane.receiver).unwrap().0 == 1;
            lanes.push(lane);
            if last {
                break;
            }
        }
        lanes.len()
    });
    let mut lanes = Vec::new();
    let error = loop {
        match dialer.dial(LaneRole::Data(0), PATIENCE) {
            Ok(lane) => {
                let mut lane = lane.split().unwrap();
                send(&mut lane.sender, 0, b"one more").unwrap();
                lanes.push(lane);
            }
            Err(error) => break error.to_string(),
        }
        assert!(lanes.len() < 200, "there is no limit");
    };
    assert!(error.contains("ulimit -l"), "{error}");
    assert!(error.contains("this process may lock") || error.contains("no lockable memory left"), "{error}");
    let before = lanes.len();
    lanes.truncate(1);
    let mut lane = dialer.dial(LaneRole::Data(0), PATIENCE).unwrap().split().unwrap();
    send(&mut lane.sender, 1, b"last").unwrap();
    assert_eq!(accepting.join().unwrap(), before + 1);
}
