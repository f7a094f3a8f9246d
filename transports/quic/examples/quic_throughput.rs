//! One lane, and one bare stream of quinn with the same parameters, in turns, on loopback: `cargo run --release -p
//! pageferry-quic --example quic_throughput [GiB] [turns] [lanes] [only bare or lanes]`. Both ends are in this process; frames are of 512 KiB.
#![allow(missing_docs, clippy::print_stdout)]

use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use pageferry::transport::{Acceptor, Dialer, LaneRole};
use pageferry::wire::{FrameBuffer, HEADER_LEN, Header, Kind};
use pageferry_quic::{QuicAcceptor, QuicDialer, QuicOptions, bare};
use pageferry_tls::{DestinationIdentity, SourceIdentity};

const FRAME: usize = 512 << 10;

const PATIENCE: Duration = Duration::from_secs(10);

fn header(body_len: usize) -> [u8; HEADER_LEN] {
    Header { kind: Kind::State, body_len: body_len as u32, step: 0, sequence: 0, checksum: 0 }.encode()
}

fn identities() -> (SourceIdentity, DestinationIdentity) {
    let receiver = DestinationIdentity::for_pairing().expect("a key");
    (SourceIdentity::from_pairing(receiver.pairing().expect("it pairs")).expect("a key"), receiver)
}

fn speed(frames: usize, started: Instant) -> f64 {
    (frames * FRAME) as f64 / started.elapsed().as_secs_f64() / 1e9
}

/// Gigabytes per second through our lanes.
fn lanes(frames: usize, lanes: u16) -> f64 {
    let (source, destination) = identities();
    let acceptor = QuicAcceptor::bind("127.0.0.1:0", &QuicOptions::default(), destination).expect("a port is free");
    let dialer = QuicDialer::new(acceptor.local_addr().to_string(), QuicOptions::default(), source);
    let share = frames / usize::from(lanes);
    let open = |index| {
        let mut near = dialer.dial(LaneRole::Data(index), PATIENCE).expect("it is there").split().expect("it splits");
        near.sender.send(&mut [IoSlice::new(&header(0))]).expect("it is taken");
        let mut far = acceptor.accept(PATIENCE).expect("accepting works").expect("in time").split().expect("it splits");
        far.receiver.receive(&mut FrameBuffer::new()).expect("a frame");
        (near, far)
    };
    let pairs: Vec<_> = (0..lanes).map(open).collect();
    let started = Instant::now();
    let threads: Vec<_> = pairs
        .into_iter()
        .map(|(mut near, mut far)| {
            let sending = std::thread::spawn(move || {
                let body = vec![0x5a; FRAME];
                for _ in 0..share {
                    near.sender.send(&mut [IoSlice::new(&header(FRAME)), IoSlice::new(&body)]).expect("it is taken");
                }
                near
            });
            let receiving = std::thread::spawn(move || {
                let mut frame = FrameBuffer::new();
                for _ in 0..share {
                    far.receiver.receive(&mut frame).expect("a frame");
                }
            });
            (sending, receiving)
        })
        .collect();
    let mut lanes = Vec::new();
    for (sending, receiving) in threads {
        receiving.join().expect("no panic");
        lanes.push(sending.join().expect("no panic"));
    }
    speed(share * usize::from(pairs_len(&lanes)), started)
}

fn pairs_len<T>(lanes: &[T]) -> u16 {
    lanes.len() as u16
}

/// Gigabytes per second through a stream of quinn, each end with a runtime of its own, as ours has.
fn bare_stream(frames: usize) -> f64 {
    let (source, destination) = identities();
    let runtime = || {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().expect("threads")
    };
    let (near, far) = (runtime(), runtime());
    let options = QuicOptions::default();
    let local: SocketAddr = "127.0.0.1:0".parse().expect("an address");
    let server = far.block_on(async { bare::server(local, &options, &destination).expect("a port is free") });
    let address = server.local_addr().expect("it is bound");
    let receiving = far.spawn(async move {
        let connection = server.accept().await.expect("a caller").await.expect("a connection");
        let mut receive = connection.accept_uni().await.expect("a stream");
        let mut buffer = vec![0; FRAME];
        receive.read_exact(&mut buffer).await.expect("the first");
        let started = Instant::now();
        for _ in 1..frames {
            receive.read_exact(&mut buffer).await.expect("more");
        }
        let speed = speed(frames - 1, started);
        connection.close(0u32.into(), b"");
        speed
    });
    near.block_on(async move {
        let client = bare::client(local, address, &options, &source).expect("a port is free");
        let connection = client.await.expect("a connection");
        let mut send = connection.open_uni().await.expect("a stream");
        let body = vec![0x5a; FRAME];
        for _ in 0..frames {
            send.write_all(&body).await.expect("it is taken");
        }
        connection.closed().await;
    });
    far.block_on(receiving).expect("no panic")
}

fn main() {
    let number = |at| std::env::args().nth(at).and_then(|text| text.parse::<usize>().ok());
    let frames = number(1).unwrap_or(2) * (1 << 30) / FRAME;
    for _ in 0..number(2).unwrap_or(3) {
        let only = std::env::args().nth(4);
        let (bare, ours) = (only.as_deref() != Some("lanes"), only.as_deref() != Some("bare"));
        let theirs = if bare { bare_stream(frames) } else { 1.0 };
        let ours = if ours { lanes(frames, number(3).unwrap_or(1) as u16) } else { 1.0 };
        println!("bare {theirs:.2} GB/s, lanes {ours:.2} GB/s: {:.2}", ours / theirs);
    }
}
