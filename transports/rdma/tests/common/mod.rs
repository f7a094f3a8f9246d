//! What the tests of this crate share: the address of an RDMA device, where there is one.
#![allow(dead_code)] // Each test file uses its part.

use pageferry_conformance::Joined;
use pageferry_rdma::{RdmaAcceptor, RdmaDialer, RdmaOptions};

/// An address of an RDMA device of this host.
const ADDRESS: &str = "PAGEFERRY_RDMA_ADDRESS";

/// Bytes that each end may lock, for tests that have both ends in one process with a limit.
const LOCKED: &str = "PAGEFERRY_RDMA_LOCKED";

/// Why nothing can be tested here.
pub(crate) fn missing() -> Option<String> {
    std::env::var(ADDRESS).is_err().then(|| {
        format!(
            "no RDMA device: set {ADDRESS} to an address of one, or run transports/rdma/vm/test.sh, which emulates one"
        )
    })
}

pub(crate) fn options() -> RdmaOptions {
    let mut options = RdmaOptions::default();
    options.locked_memory = std::env::var(LOCKED).ok().and_then(|bytes| bytes.parse().ok());
    options
}

pub(crate) fn acceptor() -> RdmaAcceptor {
    acceptor_with(options())
}

pub(crate) fn acceptor_with(options: RdmaOptions) -> RdmaAcceptor {
    let address = std::env::var(ADDRESS).expect("tests are skipped without it");
    RdmaAcceptor::bind(&format!("{address}:0"), options).expect("the device takes a listener")
}

pub(crate) fn dialer(target: impl std::fmt::Display) -> RdmaDialer {
    RdmaDialer::new(format!("{target}"), options())
}

pub(crate) fn join() -> Joined {
    let acceptor = acceptor();
    Joined::new(dialer(acceptor.local_addr()), acceptor)
}
