//! A peer that vanishes without a word, in a network namespace whose only link goes down.
#![allow(unsafe_code)]

mod common;

use std::process::Command;
use std::time::Duration;

use common::{body, join, receive, send};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

/// Moves the calling thread into a network of its own; `Err` says why that is not possible here.
fn own_network() -> Result<(), String> {
    // SAFETY: takes no pointers; only this thread changes its network.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(format!("no network namespace: {}", std::io::Error::last_os_error()));
    }
    loopback("up")
}

fn loopback(state: &str) -> Result<(), String> {
    match Command::new("ip").args(["link", "set", "lo", state]).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("ip link: {status}")),
        Err(error) => Err(format!("ip: {error}")),
    }
}

fn on_a_lost_link(test: fn(pageferry::transport::LaneHalves) -> std::io::Error) {
    common::in_time(move || {
        if let Err(reason) = own_network() {
            drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("skipped: {reason}\n")));
            return;
        }
        let mut options = TcpOptions::default();
        options.dead_peer_after = Duration::from_secs(2);
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", options.clone()).unwrap();
        let dialer = TcpDialer::new(acceptor.local_addr().to_string(), options);
        let (near, far) = join(&dialer, &acceptor);
        loopback("down").unwrap();
        let error = test(near);
        assert!(error.to_string().contains("down, hung or cut off"), "{error}");
        drop(far);
    });
}

#[test]
fn a_silent_lane_breaks_when_the_peer_is_gone() {
    on_a_lost_link(|mut near| receive(&mut near.receiver).unwrap_err());
}

#[test]
fn a_busy_lane_breaks_when_the_peer_is_gone() {
    on_a_lost_link(|mut near| {
        loop {
            if let Err(error) = send(&mut near.sender, 0, &body(0, 100_000)) {
                return error;
            }
        }
    });
}
