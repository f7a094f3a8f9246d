//! Where the other side is: `HOST:PORT`, or a URL whose scheme names the transport.

use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::str::FromStr;

use pageferry_tls::Pairing;

/// An address, by the transport that reaches it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Address {
    /// Over a network.
    Net(NetAddress),
    /// Several network addresses of one host: lanes over several paths.
    Paths(Vec<NetAddress>),
    /// `unix:PATH`.
    Unix(PathBuf),
    /// `file:PATH`.
    File(PathBuf),
}

/// A host and a port, and how to speak to them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct NetAddress {
    pub(crate) scheme: Scheme,
    /// `host:port`, with the brackets of an IPv6 address.
    pub(crate) target: String,
    /// What the receiver printed for the sender.
    pub(crate) pairing: Option<Pairing>,
}

/// A transport over a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Scheme {
    /// None was named: plain TCP within this host, TLS to any other.
    Any,
    Tcp,
    Tls,
    Quic,
    Rdma,
}

impl Scheme {
    const NAMED: [(&'static str, Self); 4] =
        [("tcp", Self::Tcp), ("tls", Self::Tls), ("quic", Self::Quic), ("rdma", Self::Rdma)];

    /// What stands in front of the host.
    fn prefix(self) -> &'static str {
        match self {
            Self::Any => "",
            Self::Tcp => "tcp://",
            Self::Tls => "tls://",
            Self::Quic => "quic://",
            Self::Rdma => "rdma://",
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let path = |path: &str| match path {
            "" => Err(AddressError { text: text.to_owned(), what: Wrong::NoPath }),
            path => Ok(PathBuf::from(path)),
        };
        if let Some(socket) = text.strip_prefix("unix:") {
            return path(socket).map(Self::Unix);
        }
        if let Some(file) = text.strip_prefix("file:") {
            return path(file).map(Self::File);
        }
        let mut all: Vec<NetAddress> = text.split(',').map(str::parse).collect::<Result<_, _>>()?;
        Ok(if all.len() == 1 { Self::Net(all.remove(0)) } else { Self::Paths(all) })
    }
}

impl FromStr for NetAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        // What is wrong with a secret is not repeated with it.
        let shown = without_secret(text);
        let wrong = |what| AddressError { text: shown.clone(), what };
        let (scheme, rest) = match text.split_once("://") {
            None => (Scheme::Any, text),
            Some((name, rest)) => match Scheme::NAMED.into_iter().find(|(known, _)| *known == name) {
                Some((_, scheme)) => (scheme, rest),
                None => return Err(wrong(Wrong::Scheme(name.to_owned()))),
            },
        };
        let (target, pairing) = match rest.split_once('/') {
            None | Some((_, "")) => (rest.trim_end_matches('/'), None),
            Some((target, secret)) => {
                if !matches!(scheme, Scheme::Tls | Scheme::Quic) {
                    return Err(wrong(Wrong::NoPairing));
                }
                match secret.parse() {
                    Ok(pairing) => (target, Some(pairing)),
                    Err(_) => return Err(wrong(Wrong::Pairing)),
                }
            }
        };
        // The form only: whether a name can be resolved is the transport's question.
        let (host, port) = target.rsplit_once(':').ok_or_else(|| wrong(Wrong::Form))?;
        let bare_ipv6 = host.contains(':') && !(host.starts_with('[') && host.ends_with(']'));
        if port.parse::<u16>().is_err() || host.is_empty() || bare_ipv6 {
            return Err(wrong(Wrong::Form));
        }
        Ok(Self { scheme, target: target.to_owned(), pairing })
    }
}

/// The text of an address as far as everybody may see it: what follows the port may be a pairing, or a part of one.
fn without_secret(text: &str) -> String {
    let host = text.find("://").map_or(0, |at| at + 3);
    match text[host..].find('/') {
        Some(at) if host + at + 1 < text.len() => format!("{}/...", &text[..host + at]),
        _ => text.to_owned(),
    }
}

/// A text that repeats what was typed, without the pairings in it; `None` if there is none.
pub(crate) fn without_pairings(text: &str) -> Option<String> {
    const PAIRING: &str = "/pair-";
    let mut rest = text;
    let mut shown = String::new();
    while let Some(at) = rest.find(PAIRING) {
        let secret = &rest[at + PAIRING.len()..];
        shown += &rest[..at];
        shown += "/pair-...";
        rest = secret.trim_start_matches(|c: char| c.is_ascii_alphanumeric() || "-_.=+".contains(c));
    }
    (rest.len() < text.len()).then(|| shown + rest)
}

impl NetAddress {
    /// Whether nothing that is sent there leaves this host. Of names that is certain of `localhost` only: what a name server says
    /// now it may not say when a connection is made.
    pub(crate) fn is_within_this_host(&self) -> bool {
        let loopback = |ip: IpAddr| ip.to_canonical().is_loopback();
        let host = self.target.rsplit_once(':').map_or("", |(host, _)| host);
        if self.target.parse::<SocketAddr>().is_err() && !host.eq_ignore_ascii_case("localhost") {
            return false;
        }
        match self.target.to_socket_addrs() {
            Ok(mut found) => found.len() > 0 && found.all(|address| loopback(address.ip())),
            Err(_) => false,
        }
    }

    /// The same with its secret, for the sender.
    pub(crate) fn connection_string(&self) -> String {
        match &self.pairing {
            Some(pairing) => format!("{self}/{pairing}"),
            None => self.to_string(),
        }
    }
}

impl NetAddress {
    /// The same with a secret; `None` if it is none that can have one.
    fn paired(mut self, pairing: &Pairing) -> Option<Self> {
        match self.scheme {
            Scheme::Any if !self.is_within_this_host() => self.scheme = Scheme::Tls,
            Scheme::Tls | Scheme::Quic => {}
            _ => return None,
        }
        self.pairing = Some(pairing.clone());
        Some(self)
    }
}

impl Address {
    /// The same with this secret; `None` if it is none that can have one.
    pub(crate) fn paired(self, pairing: &Pairing) -> Option<Self> {
        match self {
            Self::Net(address) => address.paired(pairing).map(Self::Net),
            Self::Paths(all) => {
                all.into_iter().map(|address| address.paired(pairing)).collect::<Option<_>>().map(Self::Paths)
            }
            Self::Unix(_) | Self::File(_) => None,
        }
    }

    /// The same with its secret, for the sender.
    pub(crate) fn connection_string(&self) -> String {
        match self {
            Self::Net(address) => address.connection_string(),
            Self::Paths(all) => joined(all.iter().map(NetAddress::connection_string)),
            Self::Unix(_) | Self::File(_) => self.to_string(),
        }
    }
}

fn joined(all: impl Iterator<Item = String>) -> String {
    all.collect::<Vec<_>>().join(",")
}

/// Without the secret: for everybody to see.
impl fmt::Display for NetAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.scheme.prefix(), self.target)
    }
}

/// Without the secret: for everybody to see.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Net(address) => address.fmt(f),
            Self::Paths(all) => f.write_str(&joined(all.iter().map(ToString::to_string))),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::File(path) => write!(f, "file:{}", path.display()),
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
        "is not of the form 192.0.2.7:7000, [2001:db8::7]:7000, host:7000, tls://host:7000 or unix:/run/guest.sock"
    )]
    Form,
    #[error("names no path; give unix:/run/guest.sock or file:/var/lib/guest.save")]
    NoPath,
    #[error("asks for {0:?}; there are tls://, quic://, tcp:// and rdma://HOST:PORT, unix:PATH and file:PATH")]
    Scheme(String),
    #[error("has something after the port; only tls:// and quic:// addresses can have a pairing there")]
    NoPairing,
    #[error("does not end in a pairing: copy all of what `migrate receive` has printed")]
    Pairing,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Address, String> {
        text.parse().map_err(|error: AddressError| error.to_string())
    }

    fn net(scheme: Scheme, target: &str) -> NetAddress {
        NetAddress { scheme, target: target.to_owned(), pairing: None }
    }

    #[test]
    fn addresses_have_a_host_and_a_port_or_a_path() {
        for good in ["127.0.0.1:7000", "[::1]:7000", "host.example:1"] {
            assert_eq!(parse(good), Ok(Address::Net(net(Scheme::Any, good))));
            for (name, scheme) in Scheme::NAMED {
                assert_eq!(parse(&format!("{name}://{good}")), Ok(Address::Net(net(scheme, good))));
                assert_eq!(parse(&format!("{name}://{good}/")), Ok(Address::Net(net(scheme, good))));
            }
        }
        assert_eq!(parse("unix:/run/guest.sock"), Ok(Address::Unix("/run/guest.sock".into())));
        assert_eq!(parse("unix:guest:1"), Ok(Address::Unix("guest:1".into())));
        assert_eq!(parse("file:a,b"), Ok(Address::File("a,b".into())));
        let both = vec![net(Scheme::Any, "192.0.2.7:1"), net(Scheme::Tls, "198.51.100.7:2")];
        assert_eq!(parse("192.0.2.7:1,tls://198.51.100.7:2"), Ok(Address::Paths(both)));
    }

    #[test]
    fn what_is_no_address_is_explained() {
        for bad in ["7000", ":7000", "127.0.0.1", "::1:7000", "host:99999", "host:", "tcp://host", "", "a:1,", ",a:1"] {
            assert!(parse(bad).unwrap_err().contains("192.0.2.7:7000"), "{bad}");
        }
        assert!(parse("unix:").unwrap_err().contains("no path") && parse("file:").unwrap_err().contains("no path"));
        let error = parse("ftp://host:1").unwrap_err();
        assert!(error.contains("\"ftp\"") && error.contains("unix:PATH"), "{error}");
        assert!(parse("tcp://host:1/pair-x").unwrap_err().contains("only tls://"));
    }

    #[test]
    fn a_pairing_is_a_secret() {
        let secret = format!("pair-{}", "A".repeat(64));
        let text = format!("tls://192.0.2.7:7000/{secret}");
        let address = parse(&text).unwrap();
        assert_eq!(address.connection_string(), text);
        assert_eq!(address.to_string(), "tls://192.0.2.7:7000");
        assert!(!format!("{address:?}").contains("AAAA"));
        let error = parse(&text[..text.len() - 1]).unwrap_err();
        assert!(error.contains("copy all") && !error.contains("AAAA"), "{error}");
        // However it is mistaken.
        for wrong in ["192.0.2.7", "tsl://192.0.2.7:7000", "tls://192.0.2.7", "tls://:7000", "tcp://192.0.2.7:7000"] {
            let error = parse(&format!("{wrong}/{secret}")).unwrap_err();
            assert!(error.contains("/...") && !error.contains("AAAA"), "{error}");
        }
        let both = format!("{text},quic://[2001:db8::7]:1/{secret}");
        assert_eq!(parse(&both).unwrap().connection_string(), both);
    }

    #[test]
    fn a_pairing_can_be_added_where_it_is_of_use() {
        let pairing: Pairing = format!("pair-{}", "A".repeat(64)).parse().unwrap();
        for (bare, paired) in [
            ("192.0.2.7:1", Some("tls://192.0.2.7:1/")),
            ("tls://127.0.0.1:1", Some("tls://127.0.0.1:1/")),
            ("quic://host:1", Some("quic://host:1/")),
            ("tcp://192.0.2.7:1", None),
            ("127.0.0.1:1", None),
            ("unix:/run/s", None),
        ] {
            let found = parse(bare).unwrap().paired(&pairing).map(|address| address.connection_string());
            assert_eq!(found, paired.map(|paired| format!("{paired}{pairing}")), "{bare}");
        }
        assert!(parse("tls://a:1,quic://b:2").unwrap().paired(&pairing).is_some());
        assert!(parse("tls://a:1,tcp://b:2").unwrap().paired(&pairing).is_none());
    }

    #[test]
    fn an_address_is_written_as_it_is_read() {
        for text in ["127.0.0.1:7000", "unix:/run/guest.sock", "file:guest.save", "rdma://h:1", "a:1,tcp://b:2"] {
            assert_eq!(parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn only_loopback_is_within_this_host() {
        for (text, within) in [
            ("127.0.0.1:1", true),
            ("[::1]:1", true),
            ("[::ffff:127.0.0.9]:1", true),
            ("localhost:1", true),
            ("0.0.0.0:1", false),
            ("[::]:1", false),
            ("192.0.2.7:1", false),
        ] {
            assert_eq!(text.parse::<NetAddress>().unwrap().is_within_this_host(), within, "{text}");
        }
    }
}
