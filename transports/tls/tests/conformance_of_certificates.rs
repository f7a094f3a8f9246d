//! The suite that every transport passes, with certificates of a common CA.

mod common;

use pageferry_conformance::Joined;
use pageferry_tcp::TcpOptions;
use pageferry_tls::{TlsAcceptor, TlsDialer};

fn join() -> Joined {
    let ca = common::Ca::new("the CA");
    let acceptor = TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), ca.destination()).unwrap();
    Joined::new(TlsDialer::new(acceptor.local_addr().to_string(), TcpOptions::default(), ca.source()), acceptor)
}

pageferry_conformance::suite!(join);
