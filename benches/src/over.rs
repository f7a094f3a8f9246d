//! The transports that a measurement can take.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use clap::ValueEnum;
use pageferry::transport::{Acceptor, Dialer};
use pageferry_paths::{PathOptions, PathsAcceptor, PathsDialer};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};
use pageferry_tls::{DestinationIdentity, Pairing, SourceIdentity, TlsAcceptor, TlsDialer};
use pageferry_unix::{UnixAcceptor, UnixDialer};
use serde::{Deserialize, Serialize};

use crate::BenchError;

/// A transport between two processes of this host.
#[derive(ValueEnum, Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Over {
    /// Plain TCP
    #[default]
    Tcp,
    /// TLS over TCP, paired
    Tls,
    /// A Unix socket
    Unix,
    /// TCP over two paths
    Paths,
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Tls => "TLS",
            Self::Unix => "Unix socket",
            Self::Paths => "two TCP paths",
        })
    }
}

/// Where the other process listens.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub(crate) enum Door {
    Tcp(String),
    /// With what was printed for the source.
    Tls(String, String),
    Unix(PathBuf),
    Paths(Vec<String>),
}

fn bind(host: &str) -> Result<(Arc<TcpAcceptor>, String), BenchError> {
    let acceptor = TcpAcceptor::bind(&format!("{host}:0"), TcpOptions::default())?;
    let address = acceptor.local_addr().to_string();
    Ok((Arc::new(acceptor), address))
}

impl Over {
    /// Listens on this host.
    pub(crate) fn accept(self) -> Result<(Arc<dyn Acceptor>, Door), BenchError> {
        let transport = |source: pageferry::vm::VmError| BenchError::Engine { what: "make an identity", source };
        Ok(match self {
            Self::Tcp => {
                let (acceptor, address) = bind("127.0.0.1")?;
                (acceptor, Door::Tcp(address))
            }
            Self::Tls => {
                let identity = DestinationIdentity::for_pairing().map_err(|error| transport(error.into()))?;
                let pairing = identity.pairing().map(ToString::to_string).unwrap_or_default();
                let acceptor = TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), identity)?;
                let address = acceptor.local_addr().to_string();
                (Arc::new(acceptor), Door::Tls(address, pairing))
            }
            Self::Unix => {
                let path = std::env::temp_dir().join(format!("pageferry-bench-{}.sock", std::process::id()));
                (Arc::new(UnixAcceptor::bind(&path)?), Door::Unix(path))
            }
            Self::Paths => {
                let (first, second) = (bind("127.0.0.1")?, bind("127.0.0.2")?);
                let paths = [first.0 as Arc<dyn Acceptor>, second.0];
                let acceptor = PathsAcceptor::new(paths, PathOptions::default());
                (Arc::new(acceptor), Door::Paths(vec![first.1, second.1]))
            }
        })
    }
}

impl Door {
    /// Dials whoever listens there.
    pub(crate) fn dial(&self) -> Result<Arc<dyn Dialer>, BenchError> {
        let transport = |source: pageferry::vm::VmError| BenchError::Engine { what: "use a pairing", source };
        let tcp = |address: &String| TcpDialer::new(address, TcpOptions::default());
        Ok(match self {
            Self::Tcp(address) => Arc::new(tcp(address)),
            Self::Tls(address, pairing) => {
                let pairing: Pairing = pairing.parse().map_err(|error| transport(Box::new(error)))?;
                let identity = SourceIdentity::from_pairing(&pairing).map_err(|error| transport(error.into()))?;
                Arc::new(TlsDialer::new(address, TcpOptions::default(), identity))
            }
            Self::Unix(path) => Arc::new(UnixDialer::new(path)),
            Self::Paths(addresses) => {
                let paths = addresses.iter().map(|address| Arc::new(tcp(address)) as Arc<dyn Dialer>);
                Arc::new(PathsDialer::new(paths, PathOptions::default()))
            }
        })
    }
}
