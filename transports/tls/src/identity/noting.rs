//! Remembers what was wrong with a peer's certificate, where the way of the error loses it.

use std::sync::{Arc, Mutex, PoisonError};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, Error, SignatureScheme};

use crate::error::CertificateFlaw;

/// The flaw that was found last.
#[derive(Clone, Default, Debug)]
pub struct FlawNote(Arc<Mutex<Option<CertificateFlaw>>>);

impl FlawNote {
    /// What it says; then it says nothing any more.
    pub fn take(&self) -> Option<CertificateFlaw> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Leaves the decision to another.
#[derive(Debug)]
pub(super) struct Noting {
    verifier: Arc<dyn ServerCertVerifier>,
    note: FlawNote,
}

impl Noting {
    pub(super) fn new(verifier: Arc<dyn ServerCertVerifier>, note: FlawNote) -> Self {
        Self { verifier, note }
    }
}

impl ServerCertVerifier for Noting {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.verifier.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        verified.inspect_err(|error| {
            *self.note.0.lock().unwrap_or_else(PoisonError::into_inner) = CertificateFlaw::of(error);
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.verifier.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[rustls::DistinguishedName]> {
        self.verifier.root_hint_subjects()
    }
}
