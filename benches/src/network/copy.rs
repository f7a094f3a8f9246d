//! A plain copy of as much memory over one TCP connection: what no engine can beat without packing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use clap::Subcommand;
use serde::{Deserialize, Serialize};

use super::goodput::{TRIES, is_plausible};
use super::{Network, Rate, Side};
use crate::guest::Random;
use crate::process::Program;
use crate::{BenchError, host};

/// Filling memory, listening, ending: each is a matter of seconds.
const PATIENCE: Duration = Duration::from_secs(120);

/// Bytes that are written at once.
const CHUNK: usize = 1 << 20;

/// How long a copy lasts that only tries out a link, and the most that it copies.
const TRIAL: Duration = Duration::from_secs(4);
const MOST_TRIAL: u64 = 1 << 30;

/// One side of a copy: what this program is started with at each host.
#[derive(Subcommand, Debug)]
pub(crate) enum CopySide {
    /// Receive so many bytes
    Receive {
        #[arg(value_name = "ADDRESS")]
        at: SocketAddr,
        bytes: u64,
    },
    /// Send so many bytes
    Send {
        #[arg(value_name = "ADDRESS")]
        to: SocketAddr,
        bytes: u64,
    },
}

/// What a side says at the end.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
struct Told {
    seconds: f64,
    /// Of all bytes.
    fingerprint: u64,
}

impl CopySide {
    /// Copies, and prints what there is to tell.
    pub(crate) fn run(&self) -> Result<(), BenchError> {
        let told = match *self {
            Self::Receive { at, bytes } => receive(at, bytes),
            Self::Send { to, bytes } => send(to, bytes),
        };
        println!("{}", serde_json::to_string(&told?).unwrap_or_default());
        Ok(())
    }
}

fn receive(at: SocketAddr, bytes: u64) -> Result<Told, BenchError> {
    let refused = host("a plain copy was not received");
    // Touched, so that the copy does not wait for the host.
    let mut memory = vec![1_u8; bytes as usize];
    let mut received = || {
        let listener = TcpListener::bind(at)?;
        println!("listening");
        let (mut stream, _) = listener.accept()?;
        let started = Instant::now();
        stream.read_exact(&mut memory)?;
        stream.write_all(&[1])?;
        Ok(started.elapsed().as_secs_f64())
    };
    let seconds = received().map_err(refused)?;
    Ok(Told { seconds, fingerprint: fingerprint(&memory) })
}

fn send(to: SocketAddr, bytes: u64) -> Result<Told, BenchError> {
    let mut memory = vec![0_u8; bytes as usize];
    Random::new(bytes).fill(&mut memory);
    let sent = || {
        let mut stream = TcpStream::connect(to)?;
        let started = Instant::now();
        memory.chunks(CHUNK).try_for_each(|chunk| stream.write_all(chunk))?;
        stream.read_exact(&mut [0])?;
        Ok(started.elapsed().as_secs_f64())
    };
    let seconds = sent().map_err(host("a plain copy was not sent"))?;
    Ok(Told { seconds, fingerprint: fingerprint(&memory) })
}

fn fingerprint(memory: &[u8]) -> u64 {
    twox_hash::XxHash3_64::oneshot(memory)
}

/// Bytes of payload per second that a plain copy gets through a network: the best of a few, if the first is slower than the
/// link can be.
pub(super) fn try_out(network: &Network) -> Result<f64, BenchError> {
    let bytes = match network.rate() {
        Rate::Unshaped => MOST_TRIAL,
        Rate::BitsPerSecond(bits) => (bits / 8 * TRIAL.as_secs()).min(MOST_TRIAL),
    };
    let mut best: f64 = 0.0;
    for _ in 0..TRIES {
        best = best.max(bytes as f64 / copy(network, bytes, PATIENCE)?);
        if is_plausible(network.rate(), best) {
            break;
        }
    }
    Ok(best)
}

/// Copies so many bytes from memory to memory, and returns how many seconds that took, the destination's word that it has
/// them all included.
pub(super) fn copy(network: &Network, bytes: u64, limit: Duration) -> Result<f64, BenchError> {
    let program = std::env::current_exe().map_err(host("cannot find this program"))?;
    let start = |side, word: &str, address: SocketAddr| {
        let mut command = network.command(side, &program);
        command.args(["copy", word, &address.to_string(), &bytes.to_string()]);
        Program::start("plain copy", command)
    };
    let mut receiver = start(Side::Destination, "receive", network.destination())?;
    receiver.wait_for_line(PATIENCE, |line| line == "listening")?;
    let mut sender = start(Side::Source, "send", network.route())?;
    let source = told(&mut sender, PATIENCE + limit)?;
    let destination = told(&mut receiver, PATIENCE)?;
    if source.fingerprint != destination.fingerprint {
        return Err(BenchError::Wrong("a plain copy arrived with other bytes".to_owned()));
    }
    Ok(source.seconds)
}

fn told(program: &mut Program, patience: Duration) -> Result<Told, BenchError> {
    let parse = |line: &str| serde_json::from_str::<Told>(line).ok();
    let line = program.wait_for_line(patience, |line| parse(line).is_some())?;
    parse(&line).ok_or_else(|| BenchError::Tool(format!("a plain copy says {line:?}")))
}
