//! The engine's own lanes, within one process.

use pageferry::transport::in_memory;
use pageferry_conformance::Joined;

fn join() -> Joined {
    let (dialer, acceptor) = in_memory();
    Joined::new(dialer, acceptor)
}

pageferry_conformance::suite!(join);
