//! How connections are made, and what is said when they cannot be.

mod common;

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use common::{PATIENCE, body, dialer, in_time, join, listener, receive, send};
use pageferry::transport::{Acceptor, Dialer, LaneRole, TransportError};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

fn ipv6_works() -> bool {
    let works = TcpListener::bind("[::1]:0").is_ok();
    if !works {
        drop(std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("skipped: this host has no IPv6 loopback\n"),
        ));
    }
    works
}

fn works(dialer: &TcpDialer, acceptor: &TcpAcceptor) {
    let (mut near, mut far) = join(dialer, acceptor);
    send(&mut near.sender, 1, &body(1, 100)).unwrap();
    assert_eq!(receive(&mut far.receiver).unwrap(), (1, body(1, 100)));
    send(&mut far.sender, 2, &body(2, 100)).unwrap();
    assert_eq!(receive(&mut near.receiver).unwrap(), (2, body(2, 100)));
}

fn failure(dialer: &TcpDialer, timeout: Duration) -> String {
    dialer.dial(LaneRole::Control, timeout).err().expect("a failure").to_string()
}

#[test]
fn port_zero_is_replaced_by_a_free_port() {
    let acceptor = listener("127.0.0.1:0");
    assert_ne!(acceptor.local_addr().port(), 0);
    works(&dialer(acceptor.local_addr()), &acceptor);
}

#[test]
fn ipv6_loopback_works() {
    if ipv6_works() {
        let acceptor = listener("[::1]:0");
        assert!(acceptor.local_addr().is_ipv6());
        works(&dialer(acceptor.local_addr()), &acceptor);
    }
}

#[test]
fn the_ipv6_wildcard_takes_both_families_and_names_ipv4_peers_as_such() {
    if ipv6_works() {
        let acceptor = listener("[::]:0");
        let port = acceptor.local_addr().port();
        works(&dialer(format!("[::1]:{port}")), &acceptor);
        works(&dialer(format!("127.0.0.1:{port}")), &acceptor);
        let _caller = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).unwrap();
        assert!(acceptor.accept(PATIENCE).unwrap().unwrap().peer().starts_with("127.0.0.1:"));
    }
}

#[test]
fn names_are_resolved_and_their_addresses_tried_in_turn() {
    // "localhost" is ::1 and 127.0.0.1 on most hosts; only the second listens here.
    let acceptor = listener("127.0.0.1:0");
    let dialer = dialer(format!("localhost:{}", acceptor.local_addr().port()));
    works(&dialer, &acceptor);
    works(&dialer, &acceptor);
}

#[test]
fn a_refused_connection_asks_for_the_receiver() {
    // Bound, so that nobody else takes the port, but not listening.
    let bound = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    bound.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    let free = bound.local_addr().unwrap().as_socket().unwrap();
    let error = failure(&dialer(free), PATIENCE);
    assert!(error.contains(&free.to_string()) && error.contains("is the receiver running there"), "{error}");
}

#[test]
fn bad_targets_are_explained() {
    for (target, expected) in [
        ("no-port", "HOST:PORT"),
        ("host:99999", "HOST:PORT"),
        ("name.invalid:4000", "cannot be resolved"),
        ("127.0.0.1", "HOST:PORT"),
    ] {
        let error = failure(&dialer(target), PATIENCE);
        assert!(error.contains(target) && error.contains(expected), "{error}");
    }
}

#[test]
fn a_destination_that_does_not_answer_is_given_up() {
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    full.listen(0).unwrap();
    let address = full.local_addr().unwrap().as_socket().unwrap();
    let mut waiting = Vec::new();
    // The queue of a listener that nobody serves fills up; then connections are not answered.
    while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        waiting.push(stream);
        assert!(waiting.len() < 1000, "the queue never fills up");
    }
    let error = failure(&dialer(address), Duration::from_millis(200));
    assert!(error.contains("did not answer within") && error.contains("is the host up"), "{error}");
}

#[test]
fn connections_come_from_the_chosen_source_address() {
    let acceptor = listener("127.0.0.1:0");
    let dialer = dialer(acceptor.local_addr()).with_source(Ipv4Addr::new(127, 0, 0, 9).into());
    let _lane = dialer.dial(LaneRole::Control, PATIENCE).unwrap();
    assert!(acceptor.accept(PATIENCE).unwrap().unwrap().peer().starts_with("127.0.0.9:"));
}

#[test]
fn a_source_address_that_does_not_fit_is_explained() {
    let acceptor = listener("127.0.0.1:0");
    let foreign = dialer(acceptor.local_addr()).with_source(Ipv4Addr::new(192, 0, 2, 77).into());
    let error = failure(&foreign, PATIENCE);
    assert!(error.contains("192.0.2.77") && error.contains("an address of this host"), "{error}");
    let other_family = dialer(acceptor.local_addr()).with_source(Ipv6Addr::LOCALHOST.into());
    assert!(failure(&other_family, PATIENCE).contains("same family"));
}

fn on_interface(name: &str) -> TcpOptions {
    let mut options = TcpOptions::default();
    options.interface = Some(name.to_owned());
    options
}

#[test]
fn both_ends_can_be_bound_to_an_interface() {
    let acceptor = match TcpAcceptor::bind("127.0.0.1:0", on_interface("lo")) {
        Ok(acceptor) => acceptor,
        Err(TransportError::Option { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
            drop(std::io::Write::write_fmt(
                &mut std::io::stderr(),
                format_args!("skipped: this user may not bind to an interface\n"),
            ));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    works(&TcpDialer::new(acceptor.local_addr().to_string(), on_interface("lo")), &acceptor);
}

#[test]
fn an_interface_that_does_not_exist_is_named() {
    let error = TcpAcceptor::bind("127.0.0.1:0", on_interface("nothere0")).unwrap_err().to_string();
    assert!(error.contains("nothere0"), "{error}");
    let error = failure(&TcpDialer::new("127.0.0.1:9", on_interface("nothere0")), PATIENCE);
    assert!(error.contains("nothere0"), "{error}");
}

#[test]
fn addresses_that_cannot_be_listened_on_are_explained() {
    let first = listener("127.0.0.1:0");
    let taken = first.local_addr().to_string();
    for (address, expected) in [
        (taken.as_str(), "another program listens there"),
        ("192.0.2.77:0", "no interface of this host"),
        ("nowhere", "HOST:PORT"),
    ] {
        let error = TcpAcceptor::bind(address, TcpOptions::default()).unwrap_err().to_string();
        assert!(error.contains(address) && error.contains(expected), "{error}");
    }
}

#[test]
fn accepting_ends_with_its_timeout_and_goes_on_afterwards() {
    let acceptor = listener("127.0.0.1:0");
    assert!(acceptor.accept(Duration::ZERO).unwrap().is_none());
    assert!(acceptor.accept(Duration::from_millis(20)).unwrap().is_none());
    works(&dialer(acceptor.local_addr()), &acceptor);
}

#[test]
fn callers_that_hang_up_before_they_are_accepted_disturb_nobody() {
    let acceptor = listener("127.0.0.1:0");
    for _ in 0..20 {
        let hasty = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        hasty.connect(&acceptor.local_addr().into()).unwrap();
        hasty.set_linger(Some(Duration::ZERO)).unwrap();
    }
    let mut dialled = dialer(acceptor.local_addr()).dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    send(&mut dialled.sender, 5, &[]).unwrap();
    let found = in_time(move || {
        // Some of the hasty ones may come out as lanes that are over already.
        loop {
            let mut lane = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
            if let Ok((sequence, _)) = receive(&mut lane.receiver) {
                return sequence;
            }
        }
    });
    assert_eq!(found, 5);
}
