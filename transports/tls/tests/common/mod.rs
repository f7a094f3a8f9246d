//! What the tests of this crate share: a CA of their own, folders, and lanes that must still work after an attack.
#![allow(dead_code)] // Each test file uses its part.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry_conformance::frames::{PATIENCE, body, in_time, receive, send};
use pageferry_tcp::TcpOptions;
use pageferry_tls::{DestinationIdentity, Pairing, SourceIdentity, TlsAcceptor, TlsDialer};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A folder that goes when it is dropped.
pub(crate) struct Folder(pub(crate) PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        let name = format!("pageferry-tls-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn write(&self, name: &str, content: &str) {
        let path = self.0.join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Who signs.
pub(crate) struct Ca {
    pub(crate) pem: String,
    issuer: Issuer<'static, KeyPair>,
}

/// A certificate and its key.
pub(crate) struct Issued {
    pub(crate) certificate: rcgen::Certificate,
    pub(crate) key: KeyPair,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate for these names, changed as the test likes.
    pub(crate) fn issue(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Issued {
        let names: Vec<_> = names.iter().map(ToString::to_string).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Issued { certificate, key }
    }

    /// A folder with this CA and a certificate of its own for these names.
    pub(crate) fn folder(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Folder {
        self.folder_of(&self.issue(names, change))
    }

    pub(crate) fn folder_of(&self, issued: &Issued) -> Folder {
        let folder = Folder::new();
        folder.write("ca.pem", &self.pem);
        folder.write("cert.pem", &issued.certificate.pem());
        folder.write("key.pem", &issued.key.serialize_pem());
        folder
    }

    pub(crate) fn source(&self) -> SourceIdentity {
        SourceIdentity::from_pem_dir(self.folder(&["source"], |_| ()).path()).unwrap()
    }

    /// A destination whose certificate is for 127.0.0.1.
    pub(crate) fn destination(&self) -> DestinationIdentity {
        DestinationIdentity::from_pem_dir(self.folder(&["127.0.0.1"], |_| ()).path()).unwrap()
    }
}

pub(crate) fn listener(identity: DestinationIdentity) -> Arc<TlsAcceptor> {
    Arc::new(TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), identity).unwrap())
}

pub(crate) fn dialer(acceptor: &TlsAcceptor, identity: SourceIdentity) -> TlsDialer {
    TlsDialer::new(acceptor.local_addr().to_string(), TcpOptions::default(), identity)
}

/// A destination to pair with, and its string.
pub(crate) fn receiver() -> (Arc<TlsAcceptor>, Pairing) {
    let identity = DestinationIdentity::for_pairing().unwrap();
    let pairing = identity.pairing().unwrap().clone();
    (listener(identity), pairing)
}

/// Dials while the next caller is heard: what either end says of it.
pub(crate) fn meet(
    acceptor: &Arc<TlsAcceptor>,
    dialer: &dyn Dialer,
) -> (Result<LaneHalves, String>, Result<LaneHalves, String>) {
    let hearing = hear(acceptor);
    let near = dialer.dial(LaneRole::Control, PATIENCE).map_err(|error| error.to_string());
    let near = near.map(|lane| {
        let mut near = lane.split().unwrap();
        let _ = send(&mut near.sender, 1, &body(1, 100));
        near
    });
    (near, in_time(move || hearing.join().unwrap()))
}

/// Hears the next caller on a thread of its own, as the engine does: its lane, or why there is none.
pub(crate) fn hear(acceptor: &Arc<TlsAcceptor>) -> std::thread::JoinHandle<Result<LaneHalves, String>> {
    let acceptor = Arc::clone(acceptor);
    std::thread::spawn(move || {
        let mut far = acceptor.accept(PATIENCE).unwrap().expect("a caller comes").split().unwrap();
        match receive(&mut far.receiver) {
            Ok(frame) => {
                assert!(frame == (1, body(1, 100)));
                Ok(far)
            }
            Err(error) => Err(error.to_string()),
        }
    })
}

/// A real peer's lane, in use.
pub(crate) fn lane(acceptor: &Arc<TlsAcceptor>, dialer: &dyn Dialer) -> (LaneHalves, LaneHalves) {
    match meet(acceptor, dialer) {
        (Ok(near), Ok(far)) => (near, far),
        (near, far) => panic!("{:?} {:?}", near.err(), far.err()),
    }
}

/// Frames go both ways.
pub(crate) fn works((near, far): &mut (LaneHalves, LaneHalves)) {
    for number in 0..3 {
        send(&mut near.sender, number, &body(number, 50_000)).unwrap();
        assert!(receive(&mut far.receiver).unwrap() == (number, body(number, 50_000)));
        send(&mut far.sender, number, &body(number, 70)).unwrap();
        assert!(receive(&mut near.receiver).unwrap() == (number, body(number, 70)));
    }
}

/// Both ends' words for why this dialer is not let in.
pub(crate) fn refused(acceptor: &Arc<TlsAcceptor>, dialer: &dyn Dialer) -> (String, String) {
    match meet(acceptor, dialer) {
        (Err(near), Err(far)) => (near, far),
        (near, far) => panic!("let in: {} {}", near.is_ok(), far.is_ok()),
    }
}
