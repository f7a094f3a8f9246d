//! The suite that every transport passes.

use std::sync::atomic::{AtomicU32, Ordering};

use pageferry_conformance::Joined;
use pageferry_unix::{UnixAcceptor, UnixDialer};

static NEXT: AtomicU32 = AtomicU32::new(0);

fn join() -> Joined {
    let name = format!("conformance-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let acceptor = UnixAcceptor::bind(&path).expect("a path that nobody has");
    Joined::new(UnixDialer::new(path), acceptor)
}

pageferry_conformance::suite!(join);
