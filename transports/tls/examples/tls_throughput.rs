//! One lane over TLS and one over plain TCP, in turns, on loopback: `cargo run --release -p pageferry-tls --example
//! tls_throughput [GiB] [turns]`. Both ends are in this process; frames are of 512 KiB, which nothing could compress.
#![allow(missing_docs, clippy::print_stdout)]

use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::transport::{Acceptor, Dialer, LaneRole};
use pageferry::wire::{FrameBuffer, HEADER_LEN, Header, Kind};
use pageferry_tcp::{TcpAcceptor, TcpDialer, TcpOptions};
use pageferry_tls::{DestinationIdentity, SourceIdentity, TlsAcceptor, TlsDialer};

const FRAME: usize = 512 << 10;

fn header(body_len: usize) -> [u8; HEADER_LEN] {
    Header { kind: Kind::State, body_len: body_len as u32, step: 0, sequence: 0, checksum: 0 }.encode()
}

/// Bytes per second of one lane.
fn measure(dialer: &dyn Dialer, acceptor: Box<dyn Acceptor>, frames: usize) -> f64 {
    let patience = Duration::from_secs(10);
    let receiving = std::thread::spawn(move || {
        let mut lane =
            acceptor.accept(patience).expect("accepting works").expect("in time").split().expect("it splits");
        let mut frame = FrameBuffer::new();
        lane.receiver.receive(&mut frame).expect("a frame");
        let started = Instant::now();
        for _ in 0..frames {
            lane.receiver.receive(&mut frame).expect("a frame");
        }
        (frames * FRAME) as f64 / started.elapsed().as_secs_f64()
    });
    let mut lane = dialer.dial(LaneRole::Data(0), patience).expect("it is there").split().expect("it splits");
    let mut state = 88_172_645_463_325_252_u64;
    let body: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take(FRAME / 8)
    .flatten()
    .collect();
    lane.sender.send(&mut [IoSlice::new(&header(0))]).expect("it is taken");
    for _ in 0..frames {
        lane.sender.send(&mut [IoSlice::new(&header(FRAME)), IoSlice::new(&body)]).expect("it is taken");
    }
    receiving.join().expect("no panic")
}

fn main() {
    let number = |at| std::env::args().nth(at).and_then(|text| text.parse::<usize>().ok());
    let (frames, turns) = (number(1).unwrap_or(4) * (1 << 30) / FRAME, number(2).unwrap_or(3));
    let only_tls = std::env::args().nth(3).is_some();
    for _ in 0..turns {
        let acceptor = TcpAcceptor::bind("127.0.0.1:0", TcpOptions::default()).expect("a port is free");
        let dialer = TcpDialer::new(acceptor.local_addr().to_string(), TcpOptions::default());
        let plain = if only_tls { 1e9 } else { measure(&dialer, Box::new(acceptor), frames) };
        let receiver = DestinationIdentity::for_pairing().expect("a key");
        let sender = Arc::new(SourceIdentity::from_pairing(receiver.pairing().expect("it pairs")).expect("a key"));
        let acceptor = TlsAcceptor::bind("127.0.0.1:0", TcpOptions::default(), receiver).expect("a port is free");
        let dialer =
            TlsDialer::new(acceptor.local_addr().to_string(), TcpOptions::default(), SourceIdentity::clone(&sender));
        let tls = measure(&dialer, Box::new(acceptor), frames);
        println!("plain {:.2} GB/s, TLS {:.2} GB/s: {:.2}", plain / 1e9, tls / 1e9, tls / plain);
    }
}
