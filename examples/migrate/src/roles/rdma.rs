//! Lanes over RDMA, in a build that has them (`--features rdma`).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer};
use pageferry::vm::VmError;

use crate::cli::Rdma;

#[cfg(feature = "rdma")]
mod built {
    use pageferry_rdma::{RdmaAcceptor, RdmaDialer, RdmaOptions};

    use super::{Acceptor, Arc, Dialer, Duration, IpAddr, Rdma, SocketAddr, VmError};

    /// As it is without RDMA, where it fails.
    #[allow(clippy::unnecessary_wraps)]
    pub(crate) fn dialer(
        target: &str,
        source: Option<IpAddr>,
        choices: Rdma,
        peer_timeout: Duration,
    ) -> Result<Arc<dyn Dialer>, VmError> {
        let dialer = RdmaDialer::new(target, options(choices, peer_timeout));
        Ok(match source {
            Some(address) => Arc::new(dialer.with_source(address)),
            None => Arc::new(dialer),
        })
    }

    pub(crate) fn acceptor(
        target: &str,
        choices: Rdma,
        peer_timeout: Duration,
    ) -> Result<(Arc<dyn Acceptor>, SocketAddr), VmError> {
        let acceptor = RdmaAcceptor::bind(target, options(choices, peer_timeout))?;
        let local = acceptor.local_addr();
        Ok((Arc::new(acceptor), local))
    }

    fn options(choices: Rdma, peer_timeout: Duration) -> RdmaOptions {
        let mut options = RdmaOptions::default();
        options.pin_all = choices.rdma_pin_all;
        options.locked_memory = choices.rdma_locked_memory;
        // The device needs a second or so to find that there is no answer.
        options.probe_after = peer_timeout / 2;
        options
    }

    pub(crate) fn own_address() -> Option<IpAddr> {
        pageferry_rdma::first_address()
    }
}

#[cfg(not(feature = "rdma"))]
mod built {
    use super::{Acceptor, Arc, Dialer, Duration, IpAddr, Rdma, SocketAddr, VmError};

    const MISSING: &str = "this program was built without RDMA: see transports/rdma/README.md";

    pub(crate) fn dialer(
        _target: &str,
        _source: Option<IpAddr>,
        _choices: Rdma,
        _peer_timeout: Duration,
    ) -> Result<Arc<dyn Dialer>, VmError> {
        Err(MISSING.into())
    }

    pub(crate) fn acceptor(
        _target: &str,
        _choices: Rdma,
        _peer_timeout: Duration,
    ) -> Result<(Arc<dyn Acceptor>, SocketAddr), VmError> {
        Err(MISSING.into())
    }

    pub(crate) fn own_address() -> Option<IpAddr> {
        None
    }
}

pub(crate) use built::{acceptor, dialer, own_address};
