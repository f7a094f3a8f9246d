//! Attacks on the port of a destination, and mistakes that look like them: each is refused, both ends say why, and a
//! lane of the real peer, open since before, goes on.

mod common;

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;

use common::{Ca, dialer, hear, lane, listener, meet, receiver, refused, works};
use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry_conformance::frames::{PATIENCE, body, header, in_time, receive, send};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};
use pageferry_tls::{Pairing, SourceIdentity, TlsAcceptor, TlsDialer};
use rustls::pki_types::{PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, StreamOwned};

const ALPN: &[u8] = b"pageferry-link/1";

type Ends = (LaneHalves, LaneHalves);

/// A destination with certificates, and a real peer's lane.
fn certified() -> (Ca, Arc<TlsAcceptor>, Ends) {
    let ca = Ca::new("the CA");
    let acceptor = listener(ca.destination());
    let ends = lane(&acceptor, &dialer(&acceptor, ca.source()));
    (ca, acceptor, ends)
}

/// A destination that is paired, its string, who is paired with it, and that one's lane.
fn paired() -> (Pairing, Arc<TlsAcceptor>, TlsDialer, Ends) {
    let (acceptor, pairing) = receiver();
    let dialer = dialer(&acceptor, SourceIdentity::from_pairing(&pairing).unwrap());
    let ends = lane(&acceptor, &dialer);
    (pairing, acceptor, dialer, ends)
}

/// The pairing with one character of its text changed.
fn altered(pairing: &Pairing, at: usize) -> Pairing {
    let mut text = pairing.to_string().into_bytes();
    text[at] = if text[at] == b'A' { b'B' } else { b'A' };
    String::from_utf8(text).unwrap().parse().unwrap()
}

fn wrong_token(pairing: &Pairing) -> Pairing {
    altered(pairing, 5 + 63)
}

/// A client that is not ours: what it hears after the handshake, or why not.
fn strange_client(acceptor: &TlsAcceptor, tls: ClientConfig, says: &[u8]) -> Result<Vec<u8>, String> {
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into());
    let connection = ClientConnection::new(Arc::new(tls), name).map_err(|error| error.to_string())?;
    let socket = TcpStream::connect(acceptor.local_addr()).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    stream.write_all(says).map_err(|error| error.to_string())?;
    stream.flush().map_err(|error| error.to_string())?;
    let mut heard = [0; 1];
    stream.read_exact(&mut heard).map_err(|error| error.to_string())?;
    Ok(heard.to_vec())
}

fn client_of(ca: &Ca) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    let certificate = rustls::pki_types::pem::PemObject::from_pem_slice(ca.pem.as_bytes()).unwrap();
    roots.add(certificate).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
}

fn with_alpn(mut tls: ClientConfig) -> ClientConfig {
    tls.alpn_protocols = vec![ALPN.to_vec()];
    tls
}

#[test]
fn a_client_without_a_certificate_is_refused() {
    let (ca, acceptor, mut ends) = certified();
    let hearing = hear(&acceptor);
    let error = strange_client(&acceptor, with_alpn(client_of(&ca).with_no_client_auth()), b"").unwrap_err();
    assert!(error.contains("CertificateRequired"), "{error}");
    let said = hearing.join().unwrap().err().unwrap();
    assert!(said.contains("showed no certificate"), "{said}");
    works(&mut ends);
}

#[test]
fn a_client_that_wants_something_else_is_refused() {
    let (ca, acceptor, mut ends) = certified();
    for protocols in [vec![], vec![b"h2".to_vec()]] {
        let issued = ca.issue(&["source"], |_| ());
        let key = PrivatePkcs8KeyDer::from(issued.key.serialize_der()).into();
        let mut tls = client_of(&ca).with_client_auth_cert(vec![issued.certificate.der().clone()], key).unwrap();
        tls.alpn_protocols = protocols;
        let hearing = hear(&acceptor);
        strange_client(&acceptor, tls, b"").unwrap_err();
        let said = hearing.join().unwrap().err().unwrap();
        assert!(said.contains("speaks TLS, but it is no Pageferry"), "{said}");
    }
    works(&mut ends);
}

#[test]
fn a_client_from_another_ca_is_refused() {
    for other in ["another CA", "the CA"] {
        let (ca, acceptor, mut ends) = certified();
        // It knows the CA of the destination, and has its certificate from elsewhere.
        let issued = Ca::new(other).issue(&["source"], |_| ());
        let key = PrivatePkcs8KeyDer::from(issued.key.serialize_der()).into();
        let tls = client_of(&ca).with_client_auth_cert(vec![issued.certificate.der().clone()], key).unwrap();
        let hearing = hear(&acceptor);
        strange_client(&acceptor, with_alpn(tls), b"").unwrap_err();
        let said = hearing.join().unwrap().err().unwrap();
        assert!(said.contains("not signed by the CA in ca.pem"), "{said}");
        works(&mut ends);
    }
}

#[test]
fn ends_of_two_cas_do_not_meet() {
    let (_, acceptor, mut ends) = certified();
    let stranger = dialer(&acceptor, Ca::new("another CA").source());
    let (near, far) = refused(&acceptor, &stranger);
    assert!(near.contains("the peer's certificate is not signed by the CA in ca.pem"), "{near}");
    assert!(far.contains("does not trust our certificate") && far.contains("another CA"), "{far}");
    works(&mut ends);
}

#[test]
fn a_source_hears_that_the_destination_does_not_trust_it() {
    let (ca, acceptor, mut ends) = certified();
    let issued = Ca::new("another CA");
    // A folder whose certificate is of its own CA, with which it would dial a destination that has that CA's certificate.
    let folder = issued.folder(&["source"], |_| ());
    folder.write("ca.pem", &format!("{}{}", issued.pem, ca.pem));
    let stranger = dialer(&acceptor, SourceIdentity::from_pem_dir(folder.path()).unwrap());
    let (near, far) = refused(&acceptor, &stranger);
    assert!(near.contains("the peer does not trust our certificate") && near.contains("another CA"), "{near}");
    assert!(far.contains("not signed by the CA"), "{far}");
    works(&mut ends);
}

#[test]
fn a_certificate_that_has_expired_since_is_refused() {
    let (ca, acceptor, mut ends) = certified();
    let issued = ca.issue(&["source"], |params| params.not_after = rcgen::date_time_ymd(2021, 1, 1));
    let key = PrivatePkcs8KeyDer::from(issued.key.serialize_der()).into();
    let tls = client_of(&ca).with_client_auth_cert(vec![issued.certificate.der().clone()], key).unwrap();
    let hearing = hear(&acceptor);
    let error = strange_client(&acceptor, with_alpn(tls), b"").unwrap_err();
    assert!(error.contains("CertificateExpired"), "{error}");
    let said = hearing.join().unwrap().err().unwrap();
    assert!(said.contains("the peer's certificate has expired"), "{said}");
    works(&mut ends);
}

/// A server that is not ours, for one caller.
fn strange_server(tls: ServerConfig) -> String {
    let listening = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listening.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        let (socket, _) = listening.accept().unwrap();
        let mut stream = StreamOwned::new(ServerConnection::new(Arc::new(tls)).unwrap(), socket);
        let _ = stream.read(&mut [0]);
    });
    address
}

fn server_of(ca: &Ca, change: impl FnOnce(&mut rcgen::CertificateParams)) -> ServerConfig {
    let issued = ca.issue(&["127.0.0.1"], change);
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![issued.certificate.der().clone()],
            PrivatePkcs8KeyDer::from(issued.key.serialize_der()).into(),
        )
        .unwrap()
}

fn failure(dialer: &dyn Dialer) -> String {
    dialer.dial(LaneRole::Control, PATIENCE).err().expect("nobody should be there").to_string()
}

#[test]
fn servers_that_are_not_the_destination_are_refused() {
    let ca = Ca::new("the CA");
    let mut expired = server_of(&ca, |params| params.not_after = rcgen::date_time_ymd(2021, 1, 1));
    expired.alpn_protocols = vec![ALPN.to_vec()];
    for (server, expected) in [
        (expired, "the peer's certificate has expired"),
        (server_of(&ca, |_| ()), "speaks TLS, but it is no Pageferry"),
        (server_of(&Ca::new("another CA"), |_| ()), "not signed by the CA in ca.pem"),
    ] {
        let error = failure(&TlsDialer::new(strange_server(server), TcpOptions::default(), ca.source()));
        assert!(error.contains(expected), "{expected}: {error}");
    }
}

#[test]
fn a_certificate_for_another_name_is_refused_unless_it_is_expected() {
    let (ca, _, mut ends) = certified();
    let folder = ca.folder(&["standby.example"], |_| ());
    let acceptor = listener(pageferry_tls::DestinationIdentity::from_pem_dir(folder.path()).unwrap());
    let (near, far) = refused(&acceptor, &dialer(&acceptor, ca.source()));
    assert!(near.contains("is not for 127.0.0.1 but for") && near.contains("standby.example"), "{near}");
    assert!(far.contains("does not trust our certificate"), "{far}");
    works(&mut ends);
    works(&mut lane(&acceptor, &dialer(&acceptor, ca.source().expecting("standby.example").unwrap())));
}

#[test]
fn a_wrong_fingerprint_is_refused() {
    let (pairing, acceptor, _, mut ends) = paired();
    let wrong = SourceIdentity::from_pairing(&altered(&pairing, 5)).unwrap();
    let (near, far) = refused(&acceptor, &dialer(&acceptor, wrong));
    assert!(near.contains("not the one in the pairing string"), "{near}");
    assert!(far.contains("does not trust our certificate"), "{far}");
    works(&mut ends);
}

#[test]
fn a_wrong_token_is_refused() {
    let (pairing, acceptor, _, mut ends) = paired();
    let wrong = SourceIdentity::from_pairing(&wrong_token(&pairing)).unwrap();
    let (near, far) = refused(&acceptor, &dialer(&acceptor, wrong));
    assert!(near.contains("does not accept the token") && far.contains("does not accept the token"), "{near} {far}");
    works(&mut ends);
}

#[test]
fn a_token_that_somebody_else_has_used_is_refused() {
    let (pairing, acceptor, first, mut ends) = paired();
    let second = SourceIdentity::from_pairing(&pairing).unwrap();
    let (near, far) = refused(&acceptor, &dialer(&acceptor, second));
    let expected = "already been used by another source";
    assert!(near.contains(expected) && far.contains(expected), "{near} {far}");
    works(&mut ends);
    works(&mut lane(&acceptor, &first));
}

#[test]
fn guessing_tokens_is_slowed_down_and_locks_out_nobody_else() {
    let (pairing, acceptor, first, mut ends) = paired();
    let wrong = SourceIdentity::from_pairing(&wrong_token(&pairing)).unwrap();
    let guesser = dialer(&acceptor, wrong).with_source(Ipv4Addr::new(127, 0, 0, 66).into());
    let said: Vec<_> = (0..6).map(|_| refused(&acceptor, &guesser).0).collect();
    assert!(said[0].contains("does not accept the token"), "{said:?}");
    // A try that comes after its pause is judged again, and doubles the pause.
    let paused = |words: &String| words.contains("too many wrong tokens came from this host's address");
    assert!(said[3..].iter().any(paused), "{said:?}");
    works(&mut ends);
    works(&mut lane(&acceptor, &first));
}

#[test]
fn certificates_and_pairing_do_not_mix() {
    let (ca, acceptor, mut ends) = certified();
    let (_, pairing) = receiver();
    let paired = SourceIdentity::from_pairing(&pairing).unwrap();
    assert!(refused(&acceptor, &dialer(&acceptor, paired)).0.contains("not the one in the pairing string"));
    works(&mut ends);
    let (acceptor, _) = receiver();
    assert!(refused(&acceptor, &dialer(&acceptor, ca.source())).0.contains("the peer's certificate"));
}

#[test]
fn plaintext_on_the_encrypted_port_is_refused() {
    let (_, acceptor, mut ends) = certified();
    let (near, far) = meet(&acceptor, &TcpDialer::new(acceptor.local_addr().to_string(), TcpOptions::default()));
    let said = far.err().unwrap();
    assert!(said.contains("the peer does not speak TLS"), "{said}");
    in_time(move || receive(&mut near.unwrap().receiver)).unwrap_err();
    works(&mut ends);
}

#[test]
fn a_plaintext_port_is_not_taken_for_an_encrypted_one() {
    let ca = Ca::new("the CA");
    let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).unwrap();
    let dialer = TlsDialer::new(acceptor.local_addr().to_string(), TcpOptions::default(), ca.source());
    let hearing = std::thread::spawn(move || {
        let mut far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
        receive(&mut far.receiver).unwrap_err().kind()
    });
    let error = failure(&dialer);
    assert!(error.contains("does it expect plaintext"), "{error}");
    assert_eq!(hearing.join().unwrap(), ErrorKind::InvalidData);

    let talkative = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialer = TlsDialer::new(talkative.local_addr().unwrap().to_string(), TcpOptions::default(), ca.source());
    std::thread::spawn(move || {
        let (mut socket, _) = talkative.accept().unwrap();
        socket.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    let error = failure(&dialer);
    assert!(error.contains("the peer does not speak TLS"), "{error}");
}

#[test]
fn a_port_that_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let dialer = TlsDialer::new(address, TcpOptions::default(), Ca::new("the CA").source());
    let error = dialer.dial(LaneRole::Control, std::time::Duration::from_millis(200)).err().unwrap().to_string();
    assert!(error.contains("did not finish the handshake within 200ms"), "{error}");
}

#[test]
fn garbage_is_refused() {
    let (_, acceptor, mut ends) = certified();
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: migration.example\r\n\r\n"[..],
        &[0; 100],
        &[0x16, 3, 1, 0xff, 0xff, 1, 2, 3],
        &[0x16, 3, 1, 0, 4, 1, 0, 0, 0],
        &[0x17, 3, 3, 0, 4, 1, 2, 3, 4],
        &[0x14, 3, 3, 0, 1, 1, 0x16, 3, 3, 0, 1, 9],
    ] {
        let hearing = hear(&acceptor);
        let mut socket = TcpStream::connect(acceptor.local_addr()).unwrap();
        socket.write_all(garbage).unwrap();
        let said = in_time(move || hearing.join().unwrap()).err().unwrap();
        assert!(said.contains("TLS"), "{garbage:?}: {said}");
    }
    works(&mut ends);
}

#[test]
fn a_handshake_that_never_ends_is_cut_short() {
    let (_, acceptor, mut ends) = certified();
    let hearing = hear(&acceptor);
    let mut socket = TcpStream::connect(acceptor.local_addr()).unwrap();
    // A greeting of 60,000 bytes, in records of 1,000.
    let mut first = vec![0x16, 3, 1, 3, 0xe8, 1, 0, 0xea, 0x60];
    first.resize(5 + 1000, 0);
    let mut record = vec![0x16, 3, 1, 3, 0xe8];
    record.resize(5 + 1000, 0);
    socket.write_all(&first).unwrap();
    while socket.write_all(&record).is_ok() {}
    let said = in_time(move || hearing.join().unwrap()).err().unwrap();
    assert!(said.contains("handshake takes more than 32768 bytes"), "{said}");
    works(&mut ends);
}

#[test]
fn a_caller_that_goes_in_the_middle_of_the_handshake_is_forgotten() {
    let (_, acceptor, mut ends) = certified();
    let hearing = hear(&acceptor);
    drop(TcpStream::connect(acceptor.local_addr()).unwrap());
    let said = in_time(move || hearing.join().unwrap()).err().unwrap();
    assert!(said.contains("closed the connection within the handshake"), "{said}");
    works(&mut ends);
}

#[test]
fn closing_ends_a_handshake_that_hangs() {
    let (_, acceptor, _ends) = certified();
    let _silent = TcpStream::connect(acceptor.local_addr()).unwrap();
    let LaneHalves { mut receiver, mut sender, closer } = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    let hearing = std::thread::spawn(move || receive(&mut receiver).unwrap_err());
    let speaking = std::thread::spawn(move || send(&mut sender, 0, b"").unwrap_err());
    closer.close();
    in_time(move || (hearing.join().unwrap(), speaking.join().unwrap()));
}

#[test]
fn a_lane_that_is_cut_is_told_from_one_that_ends() {
    for (ends_in_order, expected) in [(true, "the peer closed the connection"), (false, "was cut")] {
        let (ca, acceptor, _ends) = certified();
        let issued = ca.issue(&["source"], |_| ());
        let key = PrivatePkcs8KeyDer::from(issued.key.serialize_der()).into();
        let tls = client_of(&ca).with_client_auth_cert(vec![issued.certificate.der().clone()], key).unwrap();
        let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into());
        let connection = ClientConnection::new(Arc::new(with_alpn(tls)), name).unwrap();
        let hearing = hear(&acceptor);
        let mut stream = StreamOwned::new(connection, TcpStream::connect(acceptor.local_addr()).unwrap());
        stream.read_exact(&mut [0]).unwrap();
        stream.write_all(&[&header(1, 100)[..], &body(1, 100)].concat()).unwrap();
        let mut far = hearing.join().unwrap().unwrap();
        if ends_in_order {
            stream.conn.send_close_notify();
            stream.flush().unwrap();
        }
        drop(stream);
        let error = in_time(move || receive(&mut far.receiver)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn keys_can_be_changed_in_the_middle_of_a_lane() {
    let (ca, acceptor, _ends) = certified();
    let issued = ca.issue(&["source"], |_| ());
    let key = PrivatePkcs8KeyDer::from(issued.key.serialize_der()).into();
    let tls = client_of(&ca).with_client_auth_cert(vec![issued.certificate.der().clone()], key).unwrap();
    let name = ServerName::IpAddress(IpAddr::V4(Ipv4Addr::LOCALHOST).into());
    let connection = ClientConnection::new(Arc::new(with_alpn(tls)), name).unwrap();
    let hearing = hear(&acceptor);
    let mut stream = StreamOwned::new(connection, TcpStream::connect(acceptor.local_addr()).unwrap());
    stream.read_exact(&mut [0]).unwrap();
    stream.write_all(&[&header(1, 100)[..], &body(1, 100)].concat()).unwrap();
    let mut far = hearing.join().unwrap().unwrap();
    for number in 0..5 {
        // Asks the peer to change its keys too.
        stream.conn.refresh_traffic_keys().unwrap();
        let frame = [&header(number, 40_000)[..], &body(number, 40_000)].concat();
        stream.write_all(&frame).unwrap();
        assert!(receive(&mut far.receiver).unwrap() == (number, body(number, 40_000)));
        send(&mut far.sender, number, &body(number, 40_000)).unwrap();
        let mut back = vec![0; frame.len()];
        stream.read_exact(&mut back).unwrap();
        assert!(back == frame, "{number}");
    }
}
