//! Pairing without a CA: the receiver makes a key and a token for one migration, and a person carries the key's
//! fingerprint and the token to the sender.
//!
//! The source takes only the certificate with that fingerprint. It then proves that it knows the token, bound to the
//! keys of both ends: HMAC-SHA256 by the token of a label and both fingerprints. Since the handshake has shown that
//! each end holds its key, the proof says "whoever holds this source key was given the string", and is of no use to
//! anybody else, nor with any other receiver. The destination remembers the first key that shows it.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use data_encoding::BASE64URL_NOPAD;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ServerConfig};

use super::crypto::{client, hmac_sha256, provider, random, same, server, sha256};
use super::pinned::{AnyClient, PinnedServer};
use super::verdict::{Refusal, Verdict};
use crate::attempts::Attempts;
use crate::error::IdentityFailure;

/// Bytes of the proof.
pub(super) const PROOF_LEN: usize = 32;

const FINGERPRINT_LEN: usize = 32;

const TOKEN_LEN: usize = 16;

/// What the proof is about, so that it is a proof of nothing else.
const LABEL: &[u8] = b"pageferry pairing 1";

const PREFIX: &str = "pair-";

/// What a person carries to the source: the destination's fingerprint and the token. As text, `pair-` and 64
/// characters, which is a secret until it has been used.
#[derive(Clone, PartialEq, Eq)]
pub struct Pairing {
    fingerprint: [u8; FINGERPRINT_LEN],
    token: [u8; TOKEN_LEN],
}

impl fmt::Debug for Pairing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pairing").finish_non_exhaustive()
    }
}

impl fmt::Display for Pairing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = [&self.fingerprint[..], &self.token].concat();
        write!(f, "{PREFIX}{}", BASE64URL_NOPAD.encode(&bytes))
    }
}

impl FromStr for Pairing {
    type Err = IdentityFailure;

    fn from_str(text: &str) -> Result<Self, IdentityFailure> {
        let encoded = text.strip_prefix(PREFIX).ok_or(IdentityFailure::PairingForm)?;
        let bytes = BASE64URL_NOPAD.decode(encoded.as_bytes()).map_err(|_| IdentityFailure::PairingForm)?;
        let (fingerprint, token) = bytes.split_at_checked(FINGERPRINT_LEN).ok_or(IdentityFailure::PairingForm)?;
        Ok(Self {
            fingerprint: fingerprint.try_into().map_err(|_| IdentityFailure::PairingForm)?,
            token: token.try_into().map_err(|_| IdentityFailure::PairingForm)?,
        })
    }
}

impl Pairing {
    fn proof(&self, source: &[u8; FINGERPRINT_LEN]) -> [u8; PROOF_LEN] {
        hmac_sha256(&self.token, &[LABEL, &self.fingerprint, source])
    }
}

/// The name in the handshake, where nobody has one: it is checked by nobody.
pub(super) fn name() -> ServerName<'static> {
    ServerName::IpAddress(IpAddr::from([0, 0, 0, 0]).into())
}

/// A key for one migration, and its certificate.
fn fresh() -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), IdentityFailure> {
    let key = rcgen::KeyPair::generate().map_err(IdentityFailure::Generate)?;
    let certificate = rcgen::CertificateParams::default().self_signed(&key).map_err(IdentityFailure::Generate)?;
    Ok((certificate.der().clone(), PrivatePkcs8KeyDer::from(key.serialize_der()).into()))
}

/// The source's side: how it does the handshake, and its proof.
pub(super) fn source(pairing: &Pairing) -> Result<(ClientConfig, [u8; PROOF_LEN]), IdentityFailure> {
    let provider = provider();
    let (certificate, key) = fresh()?;
    let proof = pairing.proof(&sha256(&certificate));
    let verifier = Arc::new(PinnedServer::new(pairing.fingerprint, &provider));
    let mut tls = client(&provider)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![certificate], key)?;
    tls.enable_sni = false;
    Ok((tls, proof))
}

/// The destination's side: how it does the handshake, and whom it lets in.
pub(super) fn destination() -> Result<(ServerConfig, Receiver), IdentityFailure> {
    let provider = provider();
    let (certificate, key) = fresh()?;
    let pairing = Pairing { fingerprint: sha256(&certificate), token: random()? };
    let tls = server(&provider)?
        .with_client_cert_verifier(Arc::new(AnyClient::new(&provider)))
        .with_single_cert(vec![certificate], key)?;
    Ok((tls, Receiver { pairing, heard: Mutex::default() }))
}

/// Whom a receiver lets in.
#[derive(Debug)]
pub(super) struct Receiver {
    pairing: Pairing,
    heard: Mutex<Heard>,
}

/// What the receiver knows of its callers.
#[derive(Default, Debug)]
struct Heard {
    /// The fingerprint of the one that showed the token.
    source: Option<[u8; FINGERPRINT_LEN]>,
    attempts: Attempts,
}

impl Receiver {
    pub(super) fn pairing(&self) -> &Pairing {
        &self.pairing
    }

    pub(super) fn judge(&self, proof: &[u8], certificate: &[u8], from: IpAddr, now: Instant) -> Verdict {
        let caller = sha256(certificate);
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let known = heard.source == Some(caller);
        // The one that is known already is not locked out by strangers at its address.
        if !known && heard.attempts.must_pause(from, now) {
            return Err(Refusal::TooManyAttempts);
        }
        if !same(proof, &self.pairing.proof(&caller)) {
            heard.attempts.failed(from, now);
            return Err(Refusal::WrongToken);
        }
        match heard.source {
            Some(source) if source != caller => Err(Refusal::TokenTaken),
            _ => {
                heard.source = Some(caller);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn receiver() -> Receiver {
        destination().unwrap().1
    }

    fn proof(receiver: &Receiver, certificate: &[u8]) -> [u8; PROOF_LEN] {
        receiver.pairing.proof(&sha256(certificate))
    }

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

    #[test]
    fn the_string_survives_text_and_hides_in_debug_output() {
        let pairing = receiver().pairing;
        let text = pairing.to_string();
        assert_eq!(text.len(), PREFIX.len() + 64);
        assert_eq!(text.parse::<Pairing>().unwrap(), pairing);
        assert_eq!(format!("{pairing:?}"), "Pairing { .. }");
        for broken in ["", "pair-", &text[1..], &text[..68], &format!("{text}A"), &text.replace("pair-", "pair+")] {
            assert!(broken.parse::<Pairing>().unwrap_err().to_string().contains("64 characters"), "{broken}");
        }
    }

    #[test]
    fn the_first_key_with_the_token_is_the_only_one() {
        let (receiver, now) = (receiver(), Instant::now());
        assert_eq!(receiver.judge(&[0; PROOF_LEN], b"first", HERE, now), Err(Refusal::WrongToken));
        assert_eq!(receiver.judge(&[], b"first", HERE, now), Err(Refusal::WrongToken));
        // Somebody else's proof.
        assert_eq!(receiver.judge(&proof(&receiver, b"first"), b"second", HERE, now), Err(Refusal::WrongToken));
        for _ in 0..3 {
            assert_eq!(receiver.judge(&proof(&receiver, b"first"), b"first", HERE, now), Ok(()));
        }
        assert_eq!(receiver.judge(&proof(&receiver, b"second"), b"second", THERE, now), Err(Refusal::TokenTaken));
    }

    #[test]
    fn guessing_locks_out_its_address_and_nobody_else() {
        let (receiver, now) = (receiver(), Instant::now());
        while receiver.judge(&[7; PROOF_LEN], b"guesser", HERE, now) != Err(Refusal::TooManyAttempts) {}
        assert_eq!(receiver.judge(&proof(&receiver, b"first"), b"first", HERE, now), Err(Refusal::TooManyAttempts));
        assert_eq!(receiver.judge(&proof(&receiver, b"first"), b"first", THERE, now), Ok(()));
        // Known by now, it may come from where somebody guesses.
        assert_eq!(receiver.judge(&proof(&receiver, b"first"), b"first", HERE, now), Ok(()));
        let later = now + Duration::from_secs(3600);
        assert_eq!(receiver.judge(&[7; PROOF_LEN], b"guesser", HERE, later), Err(Refusal::WrongToken));
    }
}
