//! Whatever goes wrong before the hand-over: a clear error, the right exit code, and a guest that
//! runs on at the source with every byte right.

mod common;

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageferry::wire::{Greeting, GreetingRole, Message, Refusal, SessionId};
use socket2::{Domain, Socket, Type};

use common::{Ended, Running, assert_guest_is_well_at_the_source, guest_kinds, run};

/// The peer may be silent for longer than a busy machine stands still; a lane that is cut says so at once.
const SMALL: &str = "--memory 32M --after 100ms --linger 100ms --peer-timeout 10s --settle-window 5s";

fn send(to: &str, kind: &str) -> Ended {
    run(&format!("send --to {to} --guest {kind} {SMALL}"))
}

/// The migration failed, the guest did not suffer, and the error says this.
fn assert_failed(ended: &Ended, told: &str) {
    assert_eq!(ended.code, 1, "{:?} {}", ended.lines.last(), ended.stderr);
    let report = ended.report();
    assert_eq!(report["outcome"], "failed", "{report}");
    assert!(report["error"].as_str().unwrap().contains(told), "no {told:?} in {report}");
    assert_guest_is_well_at_the_source(report);
}

/// A listener that treats every connection like this.
fn listener(treat: impl Fn(TcpStream) + Send + 'static) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || listener.incoming().flatten().for_each(treat));
    address
}

#[test]
fn no_listener() {
    for kind in guest_kinds() {
        // Bound, so that nobody else takes the port, but not listening.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap().to_string();
        assert_failed(&send(&address, kind), &address);
    }
}

#[test]
fn a_destination_without_enough_memory() {
    for kind in guest_kinds() {
        let (receiver, address) = Running::receiver("--max-memory 16M");
        let ended = send(&address, kind);
        assert_failed(&ended, "32 MiB");
        assert!(ended.report()["error"].as_str().unwrap().contains("16 MiB"));
        let receiver = receiver.end();
        assert_eq!((receiver.code, receiver.report()["owner"].as_str()), (1, Some("source")));
    }
}

#[test]
fn a_destination_that_speaks_another_version() {
    for answer in [Message::Refuse(Refusal::Version { min: 900, max: 901 }), Message::Welcome { version: 901 }] {
        let frame = answer.encode(0);
        let address = listener(move |mut stream| {
            let _ = stream.write_all(&frame);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let ended = send(&address, "process");
        assert_failed(&ended, "901");
        assert!(ended.report()["error"].as_str().unwrap().contains("upgrade"), "{}", ended.report());
    }
}

#[test]
fn strangers_at_a_destination_do_not_keep_the_guest_out() {
    let (mut receiver, address) = Running::receiver("--linger 100ms");
    let greeting =
        Greeting { version_min: 900, version_max: 901, session: SessionId([7; 16]), role: GreetingRole::Control };
    let silent = TcpStream::connect(&address).unwrap();
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &Message::Greeting(greeting).encode(0)] {
        TcpStream::connect(&address).unwrap().write_all(bytes).unwrap();
    }
    assert_eq!(send(&address, "process").code, 0);
    assert_eq!(receiver.wait_for("report")["guest_self_check"], "ok");
    drop(silent);
}

#[test]
fn random_bytes_from_the_port() {
    let address = listener(|mut stream| {
        let noise: Vec<u8> = (0..4096u32).map(|index| (index.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        let _ = stream.write_all(&noise);
        let _ = stream.read(&mut [0; 1]);
    });
    assert_failed(&send(&address, "process"), &address);
}

#[test]
fn a_peer_that_accepts_and_never_answers() {
    let (keep, kept) = channel();
    let address = listener(move |stream| keep.send(stream).unwrap());
    let impatient = SMALL.replace("--peer-timeout 10s", "--peer-timeout 2s");
    assert_failed(&run(&format!("send --to {address} --guest process {impatient}")), &address);
    assert!(kept.try_recv().is_ok(), "nothing connected");
}

#[test]
fn a_peer_that_closes_at_once() {
    let address = listener(drop);
    assert_failed(&send(&address, "process"), "127.0.0.1");
}

#[test]
fn a_link_that_is_cut_at_any_byte_leaves_one_owner_with_a_sound_guest() {
    // About 6 MiB cross; some of the cuts come after the last byte.
    for moment in moments() {
        migrate_over_a_link_cut_after((moment * 6.5 * 1024.0 * 1024.0) as u64, "");
    }
}

#[test]
fn a_link_that_is_cut_in_the_hand_over_leaves_one_owner_with_a_sound_guest() {
    let same = "--idle --seed 1";
    let all = migrate_over_a_link_cut_after(1 << 40, same);
    for moment in moments() {
        // The hand-over's messages are the last hundreds of bytes, in both directions together.
        migrate_over_a_link_cut_after(all - (moment * 1000.0) as u64, same);
    }
}

/// Says how many bytes crossed.
fn migrate_over_a_link_cut_after(bytes: u64, guest: &str) -> u64 {
    let (receiver, address) = Running::receiver("--linger 100ms --peer-timeout 10s --settle-window 5s --wait 20s");
    let link = Link::cut_after(address, bytes);
    let small = "--memory 8M --after 50ms --linger 100ms --peer-timeout 10s --settle-window 5s --guest process";
    let sent = run(&format!("send --to {} {small} {guest}", link.address));
    let received = receiver.end();
    let (source, destination) = (sent.report(), received.report());
    let both = format!("cut after {bytes}\n{source}\n{destination}");
    if source["owner"] == "source" {
        assert_guest_is_well_at_the_source(source);
        // A destination that was ready when the link broke cannot know what became of the source.
        assert!(matches!(received.code, 1 | 4), "{both}");
        assert_eq!((sent.code, destination["guest_heartbeats_after"].as_u64()), (1, None), "{both}");
    } else {
        assert_eq!(destination["owner"], "destination", "{both}");
        assert_eq!(destination["guest_self_check"], "ok", "{both}");
        assert_eq!((sent.code, received.code), (0, 0), "{both}");
    }
    (bytes as i64 - link.state.left.load(Ordering::SeqCst)) as u64
}

#[test]
fn a_destination_that_is_killed_at_any_moment() {
    for (moment, kind) in moments().zip(guest_kinds().into_iter().cycle()) {
        let (receiver, address) = Running::receiver("--linger 100ms");
        let mut source = slow_send(&address, kind);
        source.wait_for("accepted");
        std::thread::sleep(Duration::from_secs_f64(moment));
        receiver.kill();
        let ended = source.end();
        match ended.code {
            1 => assert_failed(&ended, "127.0.0.1"),
            // It was over before, or the commit had left: then nobody can know any more.
            0 | 4 => assert!(ended.report()["digest_match"] == true, "{}", ended.report()),
            _ => panic!("{moment}: {}", ended.report()),
        }
    }
}

#[test]
fn a_migration_that_is_cancelled_at_any_moment() {
    for (moment, kind) in moments().zip(guest_kinds().into_iter().cycle()) {
        let (receiver, address) = Running::receiver("--linger 100ms");
        let mut source = slow_send(&address, kind);
        source.wait_for("accepted");
        std::thread::sleep(Duration::from_secs_f64(moment));
        source.interrupt();
        let (sent, received) = (source.end(), receiver.end());
        assert_eq!(sent.report()["owner"], received.report()["owner"]);
        if sent.report()["owner"] == "source" {
            assert_eq!((sent.code, received.code), (3, 1), "{}", sent.report());
            assert_eq!(sent.report()["outcome"], "cancelled");
            assert_guest_is_well_at_the_source(sent.report());
        } else {
            assert_eq!((sent.code, received.code), (0, 0), "{}", sent.report());
        }
    }
}

#[test]
fn a_guest_that_outruns_the_link_ends_at_the_timeout_as_asked() {
    let hopeless = "--rate max --writes full --bandwidth 4M/s --max-throttle 0 --downtime-limit 1ms --timeout 2s";
    let (_receiver, address) = Running::receiver("--linger 100ms");
    let ended = run(&format!("send --to {address} --guest process {SMALL} {hopeless}"));
    assert_failed(&ended, "not finished after");

    let (receiver, address) = Running::receiver("--linger 100ms");
    let small = "--memory 4M --working-set 1M --after 50ms --guest process";
    let ended = run(&format!("send --to {address} {small} {hopeless} --on-timeout switch"));
    assert_eq!(ended.code, 0, "{}", ended.report());
    assert_eq!(receiver.end().report()["guest_self_check"], "ok");
}

#[test]
fn a_guest_stays_until_it_is_told_to_go() {
    let mut source = Running::start("send --to 127.0.0.1:9 --guest process --memory 4M --after 10ms");
    let report = source.wait_for("report");
    assert_guest_is_well_at_the_source(&report);
    source.wait_for("note");
    source.interrupt();
    assert_eq!(source.end().code, 1);
}

#[test]
fn a_migration_waits_for_its_signal() {
    let (receiver, address) = Running::receiver("--linger 100ms");
    let mut source = Running::start(&format!("send --to {address} --guest process --memory 4M --on-signal"));
    while !source.wait_for("note")["text"].as_str().unwrap().contains("USR1") {}
    source.signal("-USR1");
    assert_eq!(source.end().code, 0);
    assert_eq!(receiver.end().report()["guest_self_check"], "ok");
}

/// A migration that takes about a second.
fn slow_send(to: &str, kind: &str) -> Running {
    Running::start(&format!("send --to {to} --guest {kind} {SMALL} --bandwidth 24M/s"))
}

/// Moments between 0 and 1, spread evenly but never the same in two runs. `PAGEFERRY_MOMENTS` says how many.
fn moments() -> impl Iterator<Item = f64> {
    let count = std::env::var("PAGEFERRY_MOMENTS").ok().and_then(|count| count.parse().ok()).unwrap_or(4u32);
    let start = f64::from(RandomState::new().build_hasher().finish() as u32) / f64::from(u32::MAX);
    println!("moments start at {start}");
    (0..count).map(move |index| (start + f64::from(index) / f64::from(count)) % 1.0)
}

/// A link to a destination that breaks once, for all connections, and then works again.
struct Link {
    address: String,
    state: Arc<LinkState>,
}

impl Link {
    fn cut_after(to: String, bytes: u64) -> Self {
        let state = Arc::new(LinkState { left: AtomicI64::new(bytes as i64), open: Mutex::default() });
        let shared = Arc::clone(&state);
        let address = listener(move |near| {
            let Ok(far) = TcpStream::connect(&to) else { return };
            for (from, into) in [(&near, &far), (&far, &near)] {
                let (from, into) = (from.try_clone().unwrap(), into.try_clone().unwrap());
                let state = Arc::clone(&shared);
                std::thread::spawn(move || state.forward(from, into));
            }
            shared.open.lock().unwrap().extend([near, far]);
        });
        Self { address, state }
    }
}

struct LinkState {
    /// Bytes until the cut; below zero once it has happened.
    left: AtomicI64,
    open: Mutex<Vec<TcpStream>>,
}

impl LinkState {
    fn forward(&self, mut from: TcpStream, mut into: TcpStream) {
        let mut buffer = [0; 16 << 10];
        while let Ok(count @ 1..) = from.read(&mut buffer) {
            let before = self.left.fetch_sub(count as i64, Ordering::SeqCst);
            let cut_here = (0..count as i64).contains(&before);
            let passes = if cut_here { before as usize } else { count };
            if into.write_all(&buffer[..passes]).is_err() {
                break;
            }
            if cut_here {
                self.open.lock().unwrap().drain(..).for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
            }
        }
        let _ = into.shutdown(Shutdown::Write);
    }
}
