//! The transport that an address asks for, and what makes it safe.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pageferry::transport::{Acceptor, Dialer};
use pageferry::vm::VmError;
use pageferry_file::{FileAcceptor, FileDialer, RestoreOptions, SaveOptions};
use pageferry_paths::{PathOptions, PathsAcceptor, PathsDialer};
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};
use pageferry_tls::{DestinationIdentity, Pairing, SourceIdentity, TlsAcceptor, TlsDialer};
use pageferry_unix::{Descriptors, UnixAcceptor, UnixDialer};

use super::rdma;
use crate::cli::{Address, Lane, NetAddress, Rdma, Scheme, Security};
use crate::progress::Screen;

/// What cannot be as the command line says.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("--bind and --interface choose a network; {0} has none")]
    NoNetwork(Address),
    #[error(
        "{0} leaves this host, and whoever can read the network could read and change the guest's memory: use tls:// in place of \
         tcp://, or say --insecure-plaintext on both sides"
    )]
    Plaintext(NetAddress),
    #[error(
        "{0} is another host, to which nothing is sent that is not encrypted: copy the whole address that `migrate receive` has \
         printed there (it ends in /pair-...), or give --pairing-file, or certificates with --tls-dir, or say --insecure-plaintext on both sides"
    )]
    NoIdentity(NetAddress),
    #[error(
        "nothing says whom to expect at {0}: copy the whole address that `migrate receive` has printed there (it ends in /pair-...), \
         or give --pairing-file, or certificates with --tls-dir; within this host tcp:// needs neither"
    )]
    NoIdentityHere(NetAddress),
    #[error("--pairing-file {path}: {source}", path = path.display())]
    PairingFile { path: PathBuf, source: std::io::Error },
    #[error(
        "--pairing-file {path} holds no pairing: write what `migrate receive` has printed there, the whole address or what follows the \
         last / of it", path = path.display()
    )]
    NotAPairing { path: PathBuf },
    #[error(
        "--pairing-file is of no use for {0}: only tls:// and quic:// addresses, or host:port of another host, have a pairing"
    )]
    NoUseOfPairing(Address),
    #[error("{0} has a pairing: where to listen is said without one, the receiver makes its own")]
    PairingToListen(NetAddress),
    #[error("--bind names {binds} addresses for {paths} paths; give one, or one for each")]
    Binds { binds: usize, paths: usize },
}

/// The address with the pairing that a file holds, or the first line of standard input if it is named `-`.
pub(super) fn with_pairing_of(to: &Address, path: &Path) -> Result<Address, VmError> {
    let failed = |source| LinkError::PairingFile { path: path.to_owned(), source };
    let mut text = String::new();
    if path.as_os_str() == "-" {
        io::stdin().lock().take(LONGEST_PAIRING).read_line(&mut text).map_err(failed)?;
    } else {
        File::open(path).and_then(|file| file.take(LONGEST_PAIRING).read_to_string(&mut text)).map_err(failed)?;
    }
    // Of several paths all have the same.
    let last = text.trim().rsplit('/').next().unwrap_or_default();
    let pairing: Pairing = last.parse().map_err(|_| LinkError::NotAPairing { path: path.to_owned() })?;
    to.clone().paired(&pairing).ok_or_else(|| LinkError::NoUseOfPairing(to.clone()).into())
}

/// Bytes that a file with a pairing may have: an address for each of many paths.
const LONGEST_PAIRING: u64 = 16 << 10;

/// How connections are made, whatever the address.
struct Means<'a> {
    interface: Option<&'a String>,
    rdma: Rdma,
    security: &'a Security,
    peer_timeout: Duration,
    screen: &'a Screen,
}

/// Opens connections to an address the way the command line says.
pub(super) fn dialer(
    to: &Address,
    lane: &Lane,
    security: &Security,
    peer_timeout: Duration,
    screen: &Screen,
) -> Result<Arc<dyn Dialer>, VmError> {
    let means = Means { interface: lane.interface.as_ref(), rdma: lane.rdma, security, peer_timeout, screen };
    match to {
        Address::Net(address) => means.dialer(address, lane, sources(&lane.bind, 1)?[0]),
        Address::Paths(all) => {
            let options = PathOptions::within(peer_timeout);
            let means = Means { peer_timeout: options.dead_path_after(), ..means };
            let sources = sources(&lane.bind, all.len())?;
            let paths: Vec<_> = all
                .iter()
                .zip(sources)
                .map(|(address, source)| means.dialer(address, lane, source))
                .collect::<Result<_, _>>()?;
            Ok(Arc::new(PathsDialer::new(paths, options)))
        }
        Address::Unix(_) | Address::File(_) if !lane.names_no_network() => Err(LinkError::NoNetwork(to.clone()).into()),
        Address::Unix(path) => Ok(Arc::new(UnixDialer::new(path))),
        Address::File(path) => Ok(Arc::new(FileDialer::new(path, SaveOptions::default())?)),
    }
}

/// A place where guests arrive.
pub(super) struct Listening {
    pub(super) acceptor: Arc<dyn Acceptor>,
    /// With the port that the host has chosen, and what a sender needs besides.
    pub(super) local: Address,
    /// Where memory comes that is handed over.
    pub(super) descriptors: Option<Descriptors>,
}

/// Listens at an address.
pub(super) fn acceptor(
    at: &Address,
    interface: Option<&String>,
    rdma: Rdma,
    security: &Security,
    peer_timeout: Duration,
    screen: &Screen,
) -> Result<Listening, VmError> {
    let means = Means { interface, rdma, security, peer_timeout, screen };
    // Made once: all paths show the same certificate and know the same token.
    let mut identity = None;
    let mut descriptors = None;
    let (acceptor, local): (Arc<dyn Acceptor>, _) = match at {
        Address::Net(address) => {
            let (acceptor, local) = means.acceptor(address, &mut identity)?;
            (acceptor, Address::Net(local))
        }
        Address::Paths(all) => {
            let options = PathOptions::within(peer_timeout);
            let means = Means { peer_timeout: options.dead_path_after(), ..means };
            let bound: Vec<_> =
                all.iter().map(|address| means.acceptor(address, &mut identity)).collect::<Result<_, _>>()?;
            let (acceptors, locals): (Vec<_>, _) = bound.into_iter().unzip();
            let acceptor = PathsAcceptor::new(acceptors, options);
            (Arc::new(acceptor), Address::Paths(locals))
        }
        Address::Unix(_) | Address::File(_) if interface.is_some() => {
            return Err(LinkError::NoNetwork(at.clone()).into());
        }
        Address::Unix(path) => {
            let acceptor = UnixAcceptor::bind(path)?;
            descriptors = Some(acceptor.descriptors());
            (Arc::new(acceptor), at.clone())
        }
        Address::File(path) => (Arc::new(FileAcceptor::open(path, RestoreOptions::default())?), at.clone()),
    };
    Ok(Listening { acceptor, local, descriptors })
}

impl Means<'_> {
    fn dialer(&self, to: &NetAddress, lane: &Lane, source: Option<IpAddr>) -> Result<Arc<dyn Dialer>, VmError> {
        let (target, options) = (&to.target, self.tcp_options());
        match self.scheme(to)? {
            Scheme::Tls => {
                let identity = self.source_identity(to, lane)?;
                let dialer = TlsDialer::new(target, options, identity);
                Ok(match source {
                    Some(address) => Arc::new(dialer.with_source(address)),
                    None => Arc::new(dialer),
                })
            }
            Scheme::Quic => {
                let identity = self.source_identity(to, lane)?;
                let dialer = QuicDialer::new(target, self.quic_options(), identity);
                Ok(match source {
                    Some(address) => Arc::new(dialer.with_source(address)),
                    None => Arc::new(dialer),
                })
            }
            Scheme::Rdma => rdma::dialer(target, source, self.rdma, self.peer_timeout),
            Scheme::Any | Scheme::Tcp => {
                let dialer = TcpDialer::new(target, options);
                Ok(match source {
                    Some(address) => Arc::new(dialer.with_source(address)),
                    None => Arc::new(dialer),
                })
            }
        }
    }

    fn acceptor(
        &self,
        at: &NetAddress,
        identity: &mut Option<DestinationIdentity>,
    ) -> Result<(Arc<dyn Acceptor>, NetAddress), VmError> {
        if at.pairing.is_some() {
            return Err(LinkError::PairingToListen(at.clone()).into());
        }
        let (target, options) = (&at.target, self.tcp_options());
        match self.scheme(at)? {
            Scheme::Tls => {
                let identity = self.destination_identity(identity)?;
                let pairing = identity.pairing().cloned();
                let acceptor = TlsAcceptor::bind(target, options, identity)?;
                let local = reachable(acceptor.local_addr(), Scheme::Tls, pairing);
                Ok((Arc::new(acceptor), local))
            }
            Scheme::Quic => {
                let identity = self.destination_identity(identity)?;
                let pairing = identity.pairing().cloned();
                let acceptor = QuicAcceptor::bind(target, &self.quic_options(), identity)?;
                let local = reachable(acceptor.local_addr(), Scheme::Quic, pairing);
                Ok((Arc::new(acceptor), local))
            }
            Scheme::Rdma => {
                let (acceptor, local) = rdma::acceptor(target, self.rdma, self.peer_timeout)?;
                Ok((acceptor, reachable(local, Scheme::Rdma, None)))
            }
            scheme @ (Scheme::Any | Scheme::Tcp) => {
                let acceptor = TcpAcceptor::bind(target, options)?;
                let local = reachable(acceptor.local_addr(), scheme, None);
                Ok((Arc::new(acceptor), local))
            }
        }
    }

    /// The transport, with a choice where none was named: what leaves the host is encrypted unless somebody insists.
    fn scheme(&self, address: &NetAddress) -> Result<Scheme, LinkError> {
        let (within, insecure) = (address.is_within_this_host(), self.security.insecure_plaintext);
        let scheme = match address.scheme {
            Scheme::Any if within || insecure => Scheme::Any,
            Scheme::Any => Scheme::Tls,
            Scheme::Tcp | Scheme::Rdma if !within && !insecure => {
                return Err(LinkError::Plaintext(address.clone()));
            }
            named => named,
        };
        if !within && !matches!(scheme, Scheme::Tls | Scheme::Quic) {
            let text = format!(
                "WARNING: nothing is encrypted on the way to or from {address}, and nobody proves who they are"
            );
            self.screen.note(&text);
        }
        Ok(scheme)
    }

    fn source_identity(&self, to: &NetAddress, lane: &Lane) -> Result<SourceIdentity, VmError> {
        match (&to.pairing, &self.security.tls_dir) {
            (Some(pairing), _) => Ok(SourceIdentity::from_pairing(pairing)?),
            (None, Some(folder)) => {
                let identity = SourceIdentity::from_pem_dir(folder)?;
                Ok(match &lane.tls_name {
                    Some(name) => identity.expecting(name)?,
                    None => identity,
                })
            }
            (None, None) if to.is_within_this_host() => Err(LinkError::NoIdentityHere(to.clone()).into()),
            (None, None) => Err(LinkError::NoIdentity(to.clone()).into()),
        }
    }

    fn destination_identity(&self, made: &mut Option<DestinationIdentity>) -> Result<DestinationIdentity, VmError> {
        if let Some(identity) = made {
            return Ok(identity.clone());
        }
        let identity = match &self.security.tls_dir {
            Some(folder) => DestinationIdentity::from_pem_dir(folder)?,
            None => DestinationIdentity::for_pairing()?,
        };
        Ok(made.insert(identity).clone())
    }

    fn quic_options(&self) -> QuicOptions {
        let mut options = QuicOptions::default();
        options.interface = self.interface.cloned();
        options.dead_peer_after = self.peer_timeout;
        options
    }

    fn tcp_options(&self) -> TcpOptions {
        let mut options = TcpOptions::default();
        options.interface = self.interface.cloned();
        options.dead_peer_after = self.peer_timeout;
        options
    }
}

/// Where a sender finds a listener: at an address of this host, if it listens on all of them.
fn reachable(local: SocketAddr, scheme: Scheme, pairing: Option<Pairing>) -> NetAddress {
    let mut address = local;
    if let (true, Some(own)) = (local.ip().is_unspecified(), own_address(local)) {
        address.set_ip(own);
    }
    NetAddress { scheme, target: address.to_string(), pairing }
}

/// The address of this host on the way to other networks. Nothing is sent: the kernel only looks up the route.
fn own_address(local: SocketAddr) -> Option<IpAddr> {
    let v4 = || {
        let socket = UdpSocket::bind(("0.0.0.0", 0)).ok()?;
        socket.connect(("192.0.2.1", 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    let v6 = || {
        let socket = UdpSocket::bind(("::", 0)).ok()?;
        socket.connect(("2001:db8::1", 9)).ok()?;
        Some(socket.local_addr().ok()?.ip())
    };
    if local.is_ipv6() { v6().or_else(v4) } else { v4() }
}

/// Where each path begins: everywhere the same, or each at its own address.
fn sources(binds: &[IpAddr], paths: usize) -> Result<Vec<Option<IpAddr>>, LinkError> {
    match binds {
        [] => Ok(vec![None; paths]),
        [one] => Ok(vec![Some(*one); paths]),
        all if all.len() == paths => Ok(all.iter().copied().map(Some).collect()),
        all => Err(LinkError::Binds { binds: all.len(), paths }),
    }
}
