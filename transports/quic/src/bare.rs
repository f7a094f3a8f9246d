//! quinn's own endpoints with the parameters of this transport: what lanes are compared with.

use std::net::SocketAddr;
use std::sync::Arc;

use pageferry_tls::{DestinationIdentity, SourceIdentity};
use quinn::{Connecting, Endpoint, TokioRuntime, TransportConfig, VarInt};

use crate::config;
use crate::options::{LANE_WINDOW, QuicOptions};

/// Whatever went wrong.
pub type Failure = Box<dyn std::error::Error + Send + Sync>;

/// As many bytes as quinn lets wait if it is not told otherwise.
const SEND_WINDOW: u64 = 10_000_000;

fn transport(options: &QuicOptions) -> TransportConfig {
    let mut transport = options.transport();
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(1))
        .receive_window(VarInt::from_u32(LANE_WINDOW))
        .send_window(SEND_WINDOW);
    transport
}

/// Listens at an address of the loopback interface.
pub fn server(local: SocketAddr, options: &QuicOptions, identity: &DestinationIdentity) -> Result<Endpoint, Failure> {
    let server = config::server(identity, transport(options))?;
    Ok(Endpoint::new(QuicOptions::endpoint(), Some(server), options.socket(local)?, Arc::new(TokioRuntime))?)
}

/// Connects to it.
pub fn client(
    local: SocketAddr,
    address: SocketAddr,
    options: &QuicOptions,
    identity: &SourceIdentity,
) -> Result<Connecting, Failure> {
    let (client, _) = config::client(identity, transport(options))?;
    let endpoint = Endpoint::new(QuicOptions::endpoint(), None, options.socket(local)?, Arc::new(TokioRuntime))?;
    let name = identity.server_name(&address.to_string())?.to_str().into_owned();
    Ok(endpoint.connect_with(client, address, &name)?)
}
