//! A CA of the tests' own, and folders with what it signs.
#![allow(dead_code)] // Each test file uses its part.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use pageferry_tls::{DestinationIdentity, SourceIdentity};
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tempfile::TempDir;

/// A folder that goes when it is dropped.
pub(crate) struct Folder(TempDir);

impl Folder {
    pub(crate) fn new() -> Self {
        Self(TempDir::with_prefix("pageferry-tls-").unwrap())
    }

    pub(crate) fn write(&self, name: &str, content: &str) {
        let path = self.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
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
