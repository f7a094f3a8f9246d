//! The suite that every transport passes, with ends that were paired.

use pageferry_conformance::Joined;
use pageferry_tcp::TcpOptions;
use pageferry_tls::{DestinationIdentity, SourceIdentity, TlsAcceptor, TlsDialer};

fn join() -> Joined {
    let receiver = DestinationIdentity::for_pairing().unwrap();
    let sender = SourceIdentity::from_pairing(receiver.pairing().unwrap()).unwrap();
    let acceptor = TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), receiver).unwrap();
    Joined::new(TlsDialer::new(acceptor.local_addr().to_string(), TcpOptions::default(), sender), acceptor)
}

pageferry_conformance::suite!(join);
