//! What goes wrong with identities and handshakes, and what to do about it.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use rustls::{AlertDescription, CertificateError, InvalidMessage};

use crate::identity::Refusal;

/// The destination is not the one that the pairing string names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("fingerprint differs")]
pub(crate) struct WrongFingerprint;

/// Why an identity cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityFailure {
    /// A file is not there.
    #[error("{} does not exist: the folder must hold ca.pem, cert.pem and key.pem", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// A file holds something else.
    #[error("{} holds no {what} in PEM form (BEGIN ... END)", path.display())]
    NotPem {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        what: &'static str,
    },
    /// The key is not this user's alone.
    #[error("{} can be read by others (mode {mode:03o}): chmod 600 it, and have a new key made if others were on this host", path.display())]
    KeyExposed {
        /// The file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// The key belongs to another certificate.
    #[error("{}: key.pem is not the key of cert.pem", folder.display())]
    KeyOfAnother {
        /// The folder.
        folder: PathBuf,
    },
    /// The key cannot be used.
    #[error("{} cannot be used: {error}", path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Why.
        error: rustls::Error,
    },
    /// This side's own certificate would be refused.
    #[error("{} {flaw}", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        flaw: CertificateFlaw,
    },
    /// The CA cannot be used.
    #[error("{} cannot be used: {error}", path.display())]
    Verifier {
        /// The file.
        path: PathBuf,
        /// Why.
        error: rustls::server::VerifierBuilderError,
    },
    /// No certificate can have this name.
    #[error("{0:?} is neither a host name nor an address, so no certificate can be for it")]
    Name(String),
    /// The text is no pairing string.
    #[error(
        "a pairing string is `pair-` and 64 characters (letters, digits, - and _): copy all of what the receiver printed"
    )]
    PairingForm,
    /// No key could be made.
    #[error("cannot make a key: {0}")]
    Generate(rcgen::Error),
    /// The host gives no random numbers.
    #[error("this host gives no random numbers")]
    Randomness,
    /// Anything else that the TLS library finds.
    #[error(transparent)]
    Tls(#[from] rustls::Error),
}

/// What is wrong with a certificate.
#[derive(Clone, PartialEq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertificateFlaw {
    /// Its time is over.
    #[error("has expired{}: have it renewed, or set this host's clock", ago(*.0, "ago"))]
    Expired(Option<Duration>),
    /// Its time has not come.
    #[error("is not valid yet{}: set this host's clock", ago(*.0, "to go"))]
    NotYetValid(Option<Duration>),
    /// Another CA has signed it, or nobody.
    #[error("is not signed by the CA in ca.pem: both ends need certificates of one CA")]
    WrongCa,
    /// It is somebody else's.
    #[error("is not for {expected} but for {}: dial it by its name, or say which name to expect", presented.join(", "))]
    WrongName {
        /// Who was dialled.
        expected: String,
        /// Whose it is.
        presented: Vec<String>,
    },
    /// It may not be used so.
    #[error("is not meant for this: it needs the extended key usages serverAuth (destination) and clientAuth (source)")]
    Purpose,
    /// It is not the one in the pairing string.
    #[error(
        "is not the one in the pairing string: the string is an old one or meant for another receiver, or somebody is in between"
    )]
    WrongFingerprint,
    /// Anything else.
    #[error("is not acceptable: {0:?}")]
    Other(CertificateError),
}

fn ago(time: Option<Duration>, word: &str) -> String {
    let Some(seconds) = time.map(|time| time.as_secs()) else { return String::new() };
    match seconds {
        0..7200 => format!(" ({} minutes {word})", seconds / 60),
        7200..172_800 => format!(" ({} hours {word})", seconds / 3600),
        _ => format!(" ({} days {word})", seconds / 86400),
    }
}

impl CertificateFlaw {
    /// The flaw that an error is about, if it is about a certificate.
    pub(crate) fn of(error: &rustls::Error) -> Option<Self> {
        let rustls::Error::InvalidCertificate(error) = error else { return None };
        Some(match error {
            CertificateError::Expired => Self::Expired(None),
            CertificateError::ExpiredContext { time, not_after } => {
                Self::Expired(Some(Duration::from_secs(time.as_secs().saturating_sub(not_after.as_secs()))))
            }
            CertificateError::NotValidYet => Self::NotYetValid(None),
            CertificateError::NotValidYetContext { time, not_before } => {
                Self::NotYetValid(Some(Duration::from_secs(not_before.as_secs().saturating_sub(time.as_secs()))))
            }
            // A CA of the same name with another key.
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Self::WrongCa,
            CertificateError::NotValidForNameContext { expected, presented } => {
                Self::WrongName { expected: expected.to_str().into_owned(), presented: presented.clone() }
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => Self::Purpose,
            CertificateError::Other(other) if other.0.downcast_ref::<WrongFingerprint>().is_some() => {
                Self::WrongFingerprint
            }
            other => Self::Other(other.clone()),
        })
    }
}

/// Why a connection does not become a lane, or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsFailure {
    /// This side's identity does not serve.
    #[error(transparent)]
    Identity(#[from] IdentityFailure),
    /// The peer's certificate is refused.
    #[error("the peer's certificate {0}")]
    PeerCertificate(CertificateFlaw),
    /// The peer shows no certificate.
    #[error("the peer showed no certificate: both ends must prove who they are")]
    NoCertificate,
    /// The peer refuses ours.
    #[error("the peer does not trust our certificate: {0}")]
    OurCertificate(&'static str),
    /// The peer says who may come in, and we may not.
    #[error(transparent)]
    Refused(Refusal),
    /// The peer speaks something else.
    #[error("the peer does not speak TLS: is it plaintext, or another program's port?")]
    NotTls,
    /// The peer speaks TLS for another purpose.
    #[error("the peer speaks TLS, but it is no Pageferry of a version that this one can talk to")]
    NotPageferry,
    /// The connection ended within the handshake.
    #[error(
        "the peer closed the connection within the handshake: does it expect plaintext, or is it busy with too many callers?"
    )]
    Ended,
    /// Nothing came.
    #[error("connected, but the peer did not finish the handshake within {0:?}: is another program listening there?")]
    Silent(Duration),
    /// The peer sends a handshake that no honest peer sends.
    #[error("the peer's handshake takes more than {0} bytes")]
    Oversized(usize),
    /// The lane was closed here before it was opened.
    #[error("the lane was closed")]
    ClosedHere,
    /// An earlier attempt to open the lane has failed.
    #[error("the lane could not be opened: {0}")]
    NeverOpened(String),
    /// The stream ended and the peer did not say so.
    #[error("the connection was cut: it ended without the peer's word for it")]
    Cut,
    /// Anything else that the TLS library finds.
    #[error("TLS: {0}")]
    Tls(rustls::Error),
}

impl From<rustls::Error> for TlsFailure {
    fn from(error: rustls::Error) -> Self {
        if let Some(flaw) = CertificateFlaw::of(&error) {
            return Self::PeerCertificate(flaw);
        }
        match error {
            rustls::Error::NoCertificatesPresented => Self::NoCertificate,
            rustls::Error::NoApplicationProtocol => Self::NotPageferry,
            rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge
                | InvalidMessage::InvalidEmptyPayload,
            ) => Self::NotTls,
            rustls::Error::AlertReceived(alert) => Self::of_alert(alert).unwrap_or(Self::Tls(error)),
            error => Self::Tls(error),
        }
    }
}

impl TlsFailure {
    /// What the peer's alert says about this side.
    pub fn of_alert(alert: AlertDescription) -> Option<Self> {
        Some(match alert {
            AlertDescription::NoApplicationProtocol => Self::NotPageferry,
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                Self::OurCertificate("it is signed by another CA than the one it knows")
            }
            AlertDescription::CertificateExpired => {
                Self::OurCertificate("by its clock the certificate has expired or is not valid yet")
            }
            AlertDescription::CertificateRequired => Self::OurCertificate("we have shown none"),
            AlertDescription::UnsupportedCertificate => {
                Self::OurCertificate("it is not meant for a source (clientAuth)")
            }
            AlertDescription::CertificateRevoked => Self::OurCertificate("it has been revoked"),
            AlertDescription::BadCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => Self::OurCertificate("its log may say why"),
            _ => return None,
        })
    }

    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Identity(_) => io::ErrorKind::InvalidInput,
            Self::PeerCertificate(_)
            | Self::NoCertificate
            | Self::OurCertificate(_)
            | Self::Refused(_)
            | Self::NotPageferry => io::ErrorKind::PermissionDenied,
            Self::NotTls | Self::Oversized(_) | Self::Tls(_) => io::ErrorKind::InvalidData,
            Self::Ended | Self::Cut => io::ErrorKind::UnexpectedEof,
            Self::Silent(_) => io::ErrorKind::TimedOut,
            Self::ClosedHere | Self::NeverOpened(_) => io::ErrorKind::NotConnected,
        }
    }
}

impl From<TlsFailure> for io::Error {
    fn from(failure: TlsFailure) -> Self {
        Self::new(failure.kind(), failure)
    }
}
