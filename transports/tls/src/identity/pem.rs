//! Certificates of a common CA, from a folder of PEM files. Whatever is wrong with this side's own files is found when
//! they are read, not in the middle of a night of migrations.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

use super::crypto;
use crate::error::{CertificateFlaw, IdentityFailure};

/// Most bytes of a file: a chain of many certificates, or a bundle of many CAs, and nothing like a device that never ends.
const MAX_FILE: u64 = 1 << 20;

const CA: &str = "ca.pem";
const CERTIFICATE: &str = "cert.pem";
const KEY: &str = "key.pem";

/// What the files hold.
pub(super) struct Folder {
    path: PathBuf,
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Folder {
    pub(super) fn read(path: &Path) -> Result<Self, IdentityFailure> {
        Ok(Self {
            path: path.to_owned(),
            provider: crypto::provider(),
            roots: Arc::new(roots(&path.join(CA))?),
            chain: certificates(&path.join(CERTIFICATE))?,
            key: private_key(&path.join(KEY))?,
        })
    }

    pub(super) fn source(self) -> Result<ClientConfig, IdentityFailure> {
        let clients = self.client_verifier()?;
        let (leaf, intermediates) = self.leaf()?;
        self.check(clients.verify_client_cert(leaf, intermediates, UnixTime::now()).map(drop))?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| IdentityFailure::Verifier { path: self.path.join(CA), error })?;
        let builder = crypto::client(&self.provider)?.with_webpki_verifier(verifier);
        let (path, chain, key) = (self.path, self.chain, self.key);
        builder.with_client_auth_cert(chain, key).map_err(|error| key_failure(&path, error))
    }

    pub(super) fn destination(self) -> Result<ServerConfig, IdentityFailure> {
        let (leaf, intermediates) = self.leaf()?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        let trusted = ParsedCertificate::try_from(leaf).and_then(|leaf| {
            verify_server_cert_signed_by_trust_anchor(&leaf, &self.roots, intermediates, UnixTime::now(), algorithms)
        });
        self.check(trusted)?;
        let builder = crypto::server(&self.provider)?.with_client_cert_verifier(self.client_verifier()?);
        let (path, chain, key) = (self.path, self.chain, self.key);
        builder.with_single_cert(chain, key).map_err(|error| key_failure(&path, error))
    }

    fn client_verifier(&self) -> Result<Arc<dyn ClientCertVerifier>, IdentityFailure> {
        WebPkiClientVerifier::builder_with_provider(Arc::clone(&self.roots), Arc::clone(&self.provider))
            .build()
            .map_err(|error| IdentityFailure::Verifier { path: self.path.join(CA), error })
    }

    fn leaf(&self) -> Result<(&CertificateDer<'static>, &[CertificateDer<'static>]), IdentityFailure> {
        self.chain.split_first().ok_or_else(|| not_pem(&self.path.join(CERTIFICATE), "certificate"))
    }

    /// What verifying this side's own certificate has found.
    fn check(&self, found: Result<(), rustls::Error>) -> Result<(), IdentityFailure> {
        let path = self.path.join(CERTIFICATE);
        found.map_err(|error| match CertificateFlaw::of(&error) {
            Some(flaw) => IdentityFailure::Certificate { path, flaw },
            None => IdentityFailure::Tls(error),
        })
    }
}

fn roots(path: &Path) -> Result<RootCertStore, IdentityFailure> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        let added = roots.add(certificate);
        added.map_err(|_| IdentityFailure::NotPem { path: path.to_owned(), what: "CA certificate" })?;
    }
    Ok(roots)
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityFailure> {
    let bytes = read(path, |_| Ok(()))?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        _ => Err(not_pem(path, "certificate")),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, IdentityFailure> {
    let bytes = read(path, |file| {
        let mode = file.metadata().map_err(|source| unreadable(path, source))?.permissions().mode() & 0o777;
        let others = mode & 0o077;
        if others == 0 { Ok(()) } else { Err(IdentityFailure::KeyExposed { path: path.to_owned(), mode }) }
    })?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|_| not_pem(path, "private key"))
}

/// Reads a file that has passed a check.
fn read(path: &Path, check: impl FnOnce(&File) -> Result<(), IdentityFailure>) -> Result<Vec<u8>, IdentityFailure> {
    let file = File::open(path).map_err(|source| unreadable(path, source))?;
    check(&file)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE).read_to_end(&mut bytes).map_err(|source| unreadable(path, source))?;
    Ok(bytes)
}

fn unreadable(path: &Path, source: io::Error) -> IdentityFailure {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => IdentityFailure::Missing { path },
        _ => IdentityFailure::Unreadable { path, source },
    }
}

fn not_pem(path: &Path, what: &'static str) -> IdentityFailure {
    IdentityFailure::NotPem { path: path.to_owned(), what }
}

fn key_failure(folder: &Path, error: rustls::Error) -> IdentityFailure {
    match error {
        rustls::Error::InconsistentKeys(_) => IdentityFailure::KeyOfAnother { folder: folder.to_owned() },
        error => IdentityFailure::Key { path: folder.join(KEY), error },
    }
}
