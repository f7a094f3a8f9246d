//! Lanes over two paths: the suite that every transport has to pass.

use std::sync::Arc;

use pageferry::transport::{Acceptor, Dialer};
use pageferry_conformance::Joined;
use pageferry_paths::{PathOptions, PathsAcceptor, PathsDialer};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};

fn join() -> Joined {
    let acceptors = [(); 2].map(|()| TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap());
    let dialers = [0, 1].map(|index| {
        let target = acceptors[index].local_addr().to_string();
        Arc::new(TcpDialer::new(target, TcpOptions::default())) as Arc<dyn Dialer>
    });
    let acceptors = acceptors.map(|acceptor| Arc::new(acceptor) as Arc<dyn Acceptor>);
    let (near, far) = (PathOptions::default(), PathOptions::default());
    Joined::new(PathsDialer::new(dialers, near), PathsAcceptor::new(acceptors, far))
}

pageferry_conformance::suite!(join);
