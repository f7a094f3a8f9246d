//! What an endpoint is given for its connections: identity and parameters together.

use std::sync::Arc;

use pageferry_tls::{DestinationIdentity, FlawNote, SourceIdentity, TlsFailure};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ClientConfig, ServerConfig, TransportConfig};

/// The source's.
pub(crate) fn client(
    identity: &SourceIdentity,
    transport: TransportConfig,
) -> Result<(ClientConfig, FlawNote), TlsFailure> {
    let (tls, note) = identity.tls_with_note();
    // Fails only without the cipher suite with which every QUIC connection begins.
    let tls = QuicClientConfig::try_from(tls).map_err(|_| TlsFailure::NotPageferry)?;
    let mut client = ClientConfig::new(Arc::new(tls));
    client.transport_config(Arc::new(transport));
    Ok((client, note))
}

/// The destination's.
pub(crate) fn server(identity: &DestinationIdentity, transport: TransportConfig) -> Result<ServerConfig, TlsFailure> {
    let tls = QuicServerConfig::try_from(identity.tls()).map_err(|_| TlsFailure::NotPageferry)?;
    let mut server = ServerConfig::with_crypto(Arc::new(tls));
    server.transport_config(Arc::new(transport));
    Ok(server)
}
