//! Attacks on the port of a destination: each is refused, the dialling end says why, and a lane of the real peer, open
//! since before, goes on.

#[path = "../../tls/tests/common/ca.rs"]
mod ca;

use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use ca::Ca;
use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry_conformance::frames::{PATIENCE, body, receive, send};
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions};
use pageferry_tls::{DestinationIdentity, Pairing, SourceIdentity};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Connection, Endpoint};

type Ends = (LaneHalves, LaneHalves);

fn listener(identity: DestinationIdentity) -> QuicAcceptor {
    QuicAcceptor::bind("127.0.0.1:0", &QuicOptions::default(), identity).unwrap()
}

fn dialer(acceptor: &QuicAcceptor, identity: SourceIdentity) -> QuicDialer {
    QuicDialer::new(acceptor.local_addr().to_string(), QuicOptions::default(), identity)
}

/// A real peer's lane, in use.
fn lane(acceptor: &QuicAcceptor, dialer: &QuicDialer) -> Ends {
    let mut near = dialer.dial(LaneRole::Control, PATIENCE).unwrap().split().unwrap();
    send(&mut near.sender, 0, b"").unwrap();
    let mut far = acceptor.accept(PATIENCE).unwrap().expect("it comes").split().unwrap();
    receive(&mut far.receiver).unwrap();
    (near, far)
}

fn works((near, far): &mut Ends) {
    for number in 0..3 {
        send(&mut near.sender, number, &body(number, 50_000)).unwrap();
        assert!(receive(&mut far.receiver).unwrap() == (number, body(number, 50_000)));
        send(&mut far.sender, number, &body(number, 70)).unwrap();
        assert!(receive(&mut near.receiver).unwrap() == (number, body(number, 70)));
    }
}

/// Why this dialer is not let in; and nothing comes out of the acceptor.
fn refused(acceptor: &QuicAcceptor, dialer: &dyn Dialer) -> String {
    let error = dialer.dial(LaneRole::Control, PATIENCE).err().expect("it should not be let in").to_string();
    assert!(acceptor.accept(Duration::from_millis(20)).unwrap().is_none(), "a stranger's lane");
    error
}

fn certified() -> (Ca, QuicAcceptor, QuicDialer, Ends) {
    let ca = Ca::new("the CA");
    let acceptor = listener(ca.destination());
    let dialer = dialer(&acceptor, ca.source());
    let ends = lane(&acceptor, &dialer);
    (ca, acceptor, dialer, ends)
}

fn paired() -> (Pairing, QuicAcceptor, QuicDialer, Ends) {
    let identity = DestinationIdentity::for_pairing().unwrap();
    let pairing = identity.pairing().unwrap().clone();
    let acceptor = listener(identity);
    let dialer = dialer(&acceptor, SourceIdentity::from_pairing(&pairing).unwrap());
    let ends = lane(&acceptor, &dialer);
    (pairing, acceptor, dialer, ends)
}

/// A source with the pairing string, but for one character of its text.
fn altered(pairing: &Pairing, at: usize) -> SourceIdentity {
    let mut text = pairing.to_string().into_bytes();
    text[at] = if text[at] == b'A' { b'B' } else { b'A' };
    SourceIdentity::from_pairing(&String::from_utf8(text).unwrap().parse().unwrap()).unwrap()
}

const FINGERPRINT: usize = 5;
const TOKEN: usize = 5 + 63;

#[test]
fn ends_of_two_cas_do_not_meet() {
    for other in ["another CA", "the CA"] {
        let (_, acceptor, _dialer, mut ends) = certified();
        let error = refused(&acceptor, &dialer(&acceptor, Ca::new(other).source()));
        assert!(error.contains("the peer's certificate is not signed by the CA in ca.pem"), "{error}");
        works(&mut ends);
    }
}

#[test]
fn a_source_from_another_ca_is_refused_and_hears_it() {
    let (ca, acceptor, _dialer, mut ends) = certified();
    let another = Ca::new("another CA");
    let folder = another.folder(&["source"], |_| ());
    folder.write("ca.pem", &format!("{}{}", another.pem, ca.pem));
    let stranger = SourceIdentity::from_pem_dir(folder.path()).unwrap();
    let error = refused(&acceptor, &dialer(&acceptor, stranger));
    assert!(error.contains("the peer does not trust our certificate"), "{error}");
    works(&mut ends);
}

#[test]
fn a_certificate_for_another_name_is_refused_unless_it_is_expected() {
    let ca = Ca::new("the CA");
    let folder = ca.folder(&["standby.example"], |_| ());
    let acceptor = listener(DestinationIdentity::from_pem_dir(folder.path()).unwrap());
    let error = refused(&acceptor, &dialer(&acceptor, ca.source()));
    assert!(error.contains("is not for 127.0.0.1 but for") && error.contains("standby.example"), "{error}");
    let expecting = dialer(&acceptor, ca.source().expecting("standby.example").unwrap());
    works(&mut lane(&acceptor, &expecting));
}

#[test]
fn wrong_fingerprints_and_tokens_are_refused() {
    let (pairing, acceptor, _dialer, mut ends) = paired();
    let error = refused(&acceptor, &dialer(&acceptor, altered(&pairing, FINGERPRINT)));
    assert!(error.contains("not the one in the pairing string"), "{error}");
    let error = refused(&acceptor, &dialer(&acceptor, altered(&pairing, TOKEN)));
    assert!(error.contains("does not accept the token"), "{error}");
    works(&mut ends);
}

#[test]
fn a_token_that_somebody_else_has_used_is_refused() {
    let (pairing, acceptor, first, mut ends) = paired();
    let error = refused(&acceptor, &dialer(&acceptor, SourceIdentity::from_pairing(&pairing).unwrap()));
    assert!(error.contains("already been used by another source"), "{error}");
    works(&mut ends);
    works(&mut lane(&acceptor, &first));
}

#[test]
fn guessing_tokens_is_slowed_down_and_locks_out_nobody_else() {
    let (pairing, acceptor, first, mut ends) = paired();
    let guesser = dialer(&acceptor, altered(&pairing, TOKEN)).with_source(Ipv4Addr::new(127, 0, 0, 66).into());
    let said: Vec<_> = (0..5).map(|_| refused(&acceptor, &guesser)).collect();
    assert!(said[0].contains("does not accept the token"), "{said:?}");
    // A try that comes after its pause is judged again, and doubles the pause.
    let paused = |words: &String| words.contains("too many wrong tokens came from this host's address");
    assert!(said[3..].iter().any(paused), "{said:?}");
    works(&mut ends);
    works(&mut lane(&acceptor, &first));
}

#[test]
fn nobody_there_is_said_so() {
    // An address that no acceptor of another test has.
    let free = UdpSocket::bind("127.0.0.77:0").unwrap().local_addr().unwrap();
    let dialer = QuicDialer::new(free.to_string(), QuicOptions::default(), Ca::new("the CA").source());
    let error = dialer.dial(LaneRole::Control, Duration::from_millis(300)).err().unwrap().to_string();
    assert!(error.contains("did not answer within") && error.contains("UDP"), "{error}");
}

#[test]
fn garbage_disturbs_nobody() {
    let (_, acceptor, first, mut ends) = certified();
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut state = 7_u64;
    for index in 0..5000 {
        let mut datagram: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) as u8
        })
        .take(1 + index % 1400)
        .collect();
        if index % 2 == 0 {
            // A long header of version 1, as of a first packet.
            datagram.splice(..0, [0xc3, 0, 0, 0, 1, 8]);
        }
        let _ = socket.send_to(&datagram, acceptor.local_addr());
    }
    works(&mut ends);
    works(&mut lane(&acceptor, &first));
}

/// A client that is not ours, with the runtime that it needs.
struct Strange {
    runtime: tokio::runtime::Runtime,
    endpoint: Endpoint,
    client: ClientConfig,
}

impl Strange {
    fn new(tls: rustls::ClientConfig) -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).enable_all().build().unwrap();
        let entered = runtime.enter();
        let endpoint = Endpoint::client(([127, 0, 0, 1], 0).into()).unwrap();
        drop(entered);
        let client = ClientConfig::new(Arc::new(QuicClientConfig::try_from(tls).unwrap()));
        Self { runtime, endpoint, client }
    }

    fn connect(&self, acceptor: &QuicAcceptor) -> Result<Connection, String> {
        let connecting = {
            let _entered = self.runtime.enter();
            self.endpoint.connect_with(self.client.clone(), acceptor.local_addr(), "127.0.0.1").unwrap()
        };
        self.runtime.block_on(connecting).map_err(|error| error.to_string())
    }
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let (ca, acceptor, _dialer, mut ends) = certified();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls::pki_types::pem::PemObject::from_pem_slice(ca.pem.as_bytes()).unwrap()).unwrap();
    let mut tls = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    tls.alpn_protocols = vec![b"pageferry-link/1".to_vec()];
    let strange = Strange::new(tls);
    let error = match strange.connect(&acceptor) {
        Ok(connection) => strange.runtime.block_on(connection.closed()).to_string(),
        Err(error) => error,
    };
    assert!(error.contains("116"), "no alert that a certificate is required: {error}");
    works(&mut ends);
}

#[test]
fn strangers_that_say_nothing_have_no_lanes_and_disturb_nobody() {
    let (pairing, acceptor, first, mut ends) = paired();
    // They know the fingerprint, but do not show a token.
    let tls = SourceIdentity::from_pairing(&pairing).unwrap().tls();
    let strange = Strange::new(rustls::ClientConfig::clone(&tls));
    let strangers: Vec<_> = (0..100).map(|_| strange.connect(&acceptor).unwrap()).collect();
    strange.runtime.block_on(async {
        // The last: the time in which the first was to greet may be over.
        let stranger = strangers.last().unwrap();
        let mut streams = stranger.open_bi().await.unwrap();
        let second = tokio::time::timeout(Duration::from_millis(100), stranger.open_bi()).await;
        assert!(second.is_err(), "it may have more than one stream");
        // Far more than a proof; what the destination takes of it is bounded.
        let flood = tokio::time::timeout(Duration::from_millis(200), streams.0.write_all(&vec![0; 64 << 20])).await;
        assert!(!matches!(flood, Ok(Ok(()))), "it took everything");
    });
    assert!(acceptor.accept(Duration::from_millis(20)).unwrap().is_none());
    works(&mut ends);
    works(&mut lane(&acceptor, &first));
}
