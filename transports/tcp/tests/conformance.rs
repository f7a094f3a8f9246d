//! The suite that every transport passes.

use pageferry_conformance::Joined;
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

fn join() -> Joined {
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).expect("a free port");
    let dialer = TcpDialer::new(acceptor.local_addr().to_string(), TcpOptions::default());
    Joined::new(dialer, acceptor)
}

pageferry_conformance::suite!(join);
