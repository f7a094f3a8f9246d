//! Datagrams are as long as the path allows, and stay so.

use std::net::SocketAddr;

use pageferry_quic::{QuicOptions, bare};
use pageferry_tls::{DestinationIdentity, SourceIdentity};

const BYTES: usize = 256 << 20;

const PIECE: usize = 1 << 20;

/// QUIC's own start is at 1,200 bytes; this is half of what loopback allows with this transport.
const LONG: u64 = 3_000;

#[test]
fn a_path_that_carries_long_datagrams_gets_them_until_the_end() {
    let destination = DestinationIdentity::for_pairing().unwrap();
    let source = SourceIdentity::from_pairing(destination.pairing().unwrap()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (local, options): (SocketAddr, _) = ("127.0.0.1:0".parse().unwrap(), QuicOptions::default());
    let path = runtime.block_on(async move {
        let server = bare::server(local, &options, &destination).unwrap();
        let address = server.local_addr().unwrap();
        let receiving = tokio::spawn(async move {
            let connection = server.accept().await.unwrap().await.unwrap();
            let mut stream = connection.accept_uni().await.unwrap();
            let (mut buffer, mut received) = (vec![0; PIECE], 0);
            while let Some(len) = stream.read(&mut buffer).await.unwrap() {
                received += len;
            }
            connection.close(0_u32.into(), b"");
            received
        });
        let connection = bare::client(local, address, &options, &source).unwrap().await.unwrap();
        let mut stream = connection.open_uni().await.unwrap();
        let piece = vec![0x5a; PIECE];
        for _ in 0..BYTES / PIECE {
            stream.write_all(&piece).await.unwrap();
        }
        stream.finish().unwrap();
        assert_eq!(receiving.await.unwrap(), BYTES);
        connection.stats().path
    });
    assert!(path.sent_packets < BYTES as u64 / LONG, "{path:?}");
}
