//! The suite that every transport passes, with ends that were paired.

use pageferry_conformance::Joined;
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions};
use pageferry_tls::{DestinationIdentity, SourceIdentity};

fn join() -> Joined {
    let receiver = DestinationIdentity::for_pairing().unwrap();
    let sender = SourceIdentity::from_pairing(receiver.pairing().unwrap()).unwrap();
    let acceptor = QuicAcceptor::bind("127.0.0.1:0", &QuicOptions::default(), receiver).unwrap();
    Joined::new(QuicDialer::new(acceptor.local_addr().to_string(), QuicOptions::default(), sender), acceptor)
}

pageferry_conformance::suite!(join);
