//! The transport that an address asks for.

use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer};
use pageferry::vm::VmError;
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};
use pageferry_unix::{UnixAcceptor, UnixDialer};

use crate::cli::{Address, Lane};

/// What the command line says of TCP only.
#[derive(Debug, thiserror::Error)]
#[error("--bind and --interface choose a network; {0} has none")]
struct NoNetwork(Address);

/// Opens connections to an address the way the command line says.
pub(super) fn dialer(to: &Address, lane: &Lane, peer_timeout: Duration) -> Result<Arc<dyn Dialer>, VmError> {
    match to {
        Address::Tcp(target) => {
            let dialer = TcpDialer::new(target, tcp_options(lane.interface.as_ref(), peer_timeout));
            Ok(match lane.bind {
                Some(address) => Arc::new(dialer.with_source(address)),
                None => Arc::new(dialer),
            })
        }
        Address::Unix(_) if lane.bind.is_some() || lane.interface.is_some() => Err(NoNetwork(to.clone()).into()),
        Address::Unix(path) => Ok(Arc::new(UnixDialer::new(path))),
    }
}

/// Listens at an address; says where, with the port that the host has chosen.
pub(super) fn acceptor(
    at: &Address,
    interface: Option<&String>,
    peer_timeout: Duration,
) -> Result<(Arc<dyn Acceptor>, Address), VmError> {
    match at {
        Address::Tcp(local) => {
            let acceptor = TcpAcceptor::bind(local, tcp_options(interface, peer_timeout))?;
            let local = Address::Tcp(acceptor.local_addr().to_string());
            Ok((Arc::new(acceptor), local))
        }
        Address::Unix(_) if interface.is_some() => Err(NoNetwork(at.clone()).into()),
        Address::Unix(path) => Ok((Arc::new(UnixAcceptor::bind(path)?), at.clone())),
    }
}

fn tcp_options(interface: Option<&String>, peer_timeout: Duration) -> TcpOptions {
    let mut options = TcpOptions::default();
    options.interface = interface.cloned();
    options.dead_peer_after = peer_timeout;
    options
}
