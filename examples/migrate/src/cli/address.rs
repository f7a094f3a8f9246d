//! Where the other side is: `HOST:PORT`, or the same with a scheme.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// An address, by the transport that reaches it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    /// `tcp://HOST:PORT`, or without the scheme.
    Tcp(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let wrong = |what| AddressError { text: text.to_owned(), what };
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(wrong(Wrong::NoPath)) } else { Ok(Self::Unix(path.into())) };
        }
        let host_and_port = match text.split_once("://") {
            None => text,
            Some(("tcp", rest)) => rest,
            Some((scheme, _)) => return Err(wrong(Wrong::Scheme(scheme.to_owned()))),
        };
        // The form only: whether a name can be resolved is the transport's question.
        let (host, port) = host_and_port.rsplit_once(':').ok_or_else(|| wrong(Wrong::Form))?;
        let bare_ipv6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
        if port.parse::<u16>().is_err() || host.is_empty() || bare_ipv6 {
            return Err(wrong(Wrong::Form));
        }
        Ok(Self::Tcp(host_and_port.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_and_port) => f.write_str(host_and_port),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Text that cannot be an address.
#[derive(Debug, thiserror::Error)]
#[error("{text:?} {what}")]
pub(crate) struct AddressError {
    text: String,
    what: Wrong,
}

#[derive(Debug, thiserror::Error)]
enum Wrong {
    #[error(
        "is not of the form 192.0.2.7:7000, [2001:db8::7]:7000, host:7000, tcp://host:7000 or unix:/run/guest.sock"
    )]
    Form,
    #[error("names no path; a socket's address is unix:/run/guest.sock")]
    NoPath,
    #[error("asks for {0:?}; there are tcp://HOST:PORT (or HOST:PORT) and unix:PATH")]
    Scheme(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, String> {
        text.parse().map_err(|error: AddressError| error.to_string())
    }

    #[test]
    fn addresses_have_a_host_and_a_port_or_a_path() {
        for good in ["127.0.0.1:7000", "[::1]:7000", "host.example:1"] {
            assert_eq!(parse(good), Ok(Address::Tcp(good.to_owned())));
            assert_eq!(parse(&format!("tcp://{good}")), Ok(Address::Tcp(good.to_owned())));
        }
        assert_eq!(parse("unix:/run/guest.sock"), Ok(Address::Unix("/run/guest.sock".into())));
        assert_eq!(parse("unix:guest:1"), Ok(Address::Unix("guest:1".into())));
    }

    #[test]
    fn what_is_no_address_is_explained() {
        for bad in ["7000", ":7000", "127.0.0.1", "::1:7000", "host:99999", "host:", "tcp://host", ""] {
            assert!(parse(bad).unwrap_err().contains("192.0.2.7:7000"), "{bad}");
        }
        assert!(parse("unix:").unwrap_err().contains("no path"));
        let error = parse("ftp://host:1").unwrap_err();
        assert!(error.contains("\"ftp\"") && error.contains("unix:PATH"), "{error}");
    }

    #[test]
    fn an_address_is_written_as_it_is_read() {
        for text in ["127.0.0.1:7000", "unix:/run/guest.sock"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }
}
