//! The suite that every transport passes, with certificates of a common CA.

#[path = "../../tls/tests/common/ca.rs"]
mod ca;

use pageferry_conformance::Joined;
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions};

fn join() -> Joined {
    let ca = ca::Ca::new("the CA");
    let acceptor = QuicAcceptor::bind("127.0.0.1:0", &QuicOptions::default(), ca.destination()).unwrap();
    Joined::new(QuicDialer::new(acceptor.local_addr().to_string(), QuicOptions::default(), ca.source()), acceptor)
}

pageferry_conformance::suite!(join);
