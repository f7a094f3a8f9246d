//! Names and addresses.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};

use crate::failure::ConnectFailure;

/// The addresses of `host:port`, in the resolver's order.
pub(crate) fn resolve(target: &str) -> Result<Vec<SocketAddr>, ConnectFailure> {
    if let Ok(address) = target.parse() {
        return Ok(vec![address]);
    }
    let (host, port) = target.rsplit_once(':').ok_or(ConnectFailure::Form)?;
    let port: u16 = port.parse().map_err(|_| ConnectFailure::Form)?;
    let host = host.strip_prefix('[').and_then(|inner| inner.strip_suffix(']')).unwrap_or(host);
    let name_error = |error| ConnectFailure::Name { host: host.to_owned(), error };
    let found: Vec<_> = (host, port).to_socket_addrs().map_err(name_error)?.collect();
    if found.is_empty() { Err(name_error(io::ErrorKind::NotFound.into())) } else { Ok(found) }
}
