//! Lanes over RDMA, in a build that has them (`--features rdma`).

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use pageferry::transport::{Acceptor, Dialer};
use pageferry::vm::VmError;

#[cfg(feature = "rdma")]
mod built {
    use pageferry_rdma::{RdmaAcceptor, RdmaDialer, RdmaOptions};

    use super::{Acceptor, Arc, Dialer, IpAddr, SocketAddr, VmError};

    /// As it is without RDMA, where it fails.
    #[allow(clippy::unnecessary_wraps)]
    pub(crate) fn dialer(target: &str, source: Option<IpAddr>) -> Result<Arc<dyn Dialer>, VmError> {
        let dialer = RdmaDialer::new(target, RdmaOptions::default());
        Ok(match source {
            Some(address) => Arc::new(dialer.with_source(address)),
            None => Arc::new(dialer),
        })
    }

    pub(crate) fn acceptor(target: &str) -> Result<(Arc<dyn Acceptor>, SocketAddr), VmError> {
        let acceptor = RdmaAcceptor::bind(target, RdmaOptions::default())?;
        let local = acceptor.local_addr();
        Ok((Arc::new(acceptor), local))
    }

    pub(crate) fn own_address() -> Option<IpAddr> {
        pageferry_rdma::first_address()
    }
}

#[cfg(not(feature = "rdma"))]
mod built {
    use super::{Acceptor, Arc, Dialer, IpAddr, SocketAddr, VmError};

    const MISSING: &str = "this program was built without RDMA: see transports/rdma/README.md";

    pub(crate) fn dialer(_target: &str, _source: Option<IpAddr>) -> Result<Arc<dyn Dialer>, VmError> {
        Err(MISSING.into())
    }

    pub(crate) fn acceptor(_target: &str) -> Result<(Arc<dyn Acceptor>, SocketAddr), VmError> {
        Err(MISSING.into())
    }

    pub(crate) fn own_address() -> Option<IpAddr> {
        None
    }
}

pub(crate) use built::{acceptor, dialer, own_address};
