//! The other process: the destination of every measurement, so that each side's CPU time is its own.
//!
//! This program starts itself again and gives orders on the child's standard input, one JSON object a
//! line; answers come on its standard output. The child ends when its input does.

use std::io::{self, BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;

use pageferry::memory::MappedMemory;
use pageferry::{Control, Destination, DestinationConfig};
use serde::{Deserialize, Serialize};

use crate::guest::{self, Room};
use crate::over::{Door, Over};
use crate::{BenchError, host, machine, plain, sys};

/// What the other process is to do.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) enum Order {
    /// Keep this much memory present for what is to come.
    Hold { bytes: u64 },
    /// Receive a plain copy into the memory held.
    ReceivePlain { chunk: usize },
    /// Receive a migration into the memory held, or into fresh memory if none is.
    ReceiveGuest { over: Over },
}

/// What the other process says.
#[derive(Serialize, Deserialize, Debug)]
pub(crate) enum Answer {
    Ready,
    Listening(Door),
    Received(Received),
    Failed(String),
}

/// What arrived, and what it cost.
#[derive(Serialize, Deserialize, Clone, Copy, Debug)]
pub(crate) struct Received {
    pub(crate) cpu_seconds: f64,
    pub(crate) fingerprint: Option<u64>,
    pub(crate) present_pages: u64,
    /// Resident memory afterwards, less what was resident before.
    pub(crate) grown_bytes: u64,
}

/// A running other process.
#[derive(Debug)]
pub(crate) struct Peer {
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    pub(crate) fn start() -> Result<Self, BenchError> {
        let program = std::env::current_exe().map_err(host("cannot find this program"))?;
        let mut child = Command::new(program)
            .arg("peer")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(host("cannot start this program again"))?;
        let (Some(orders), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(BenchError::Peer("has no pipes".to_owned()));
        };
        Ok(Self { child, orders: Some(orders), answers: BufReader::new(answers) })
    }

    /// Keeps memory present over there.
    pub(crate) fn hold(&mut self, bytes: u64) -> Result<(), BenchError> {
        self.order(Order::Hold { bytes })?;
        match self.answer()? {
            Answer::Ready => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Makes it listen; the address is where to connect to.
    pub(crate) fn listen(&mut self, order: Order) -> Result<Door, BenchError> {
        self.order(order)?;
        match self.answer()? {
            Answer::Listening(door) => Ok(door),
            other => Err(unexpected(&other)),
        }
    }

    /// What has arrived there.
    pub(crate) fn received(&mut self) -> Result<Received, BenchError> {
        match self.answer()? {
            Answer::Received(received) => Ok(received),
            other => Err(unexpected(&other)),
        }
    }

    fn order(&mut self, order: Order) -> Result<(), BenchError> {
        let Some(orders) = &mut self.orders else {
            return Err(BenchError::Peer("has ended".to_owned()));
        };
        write_line(orders, &order).map_err(host("cannot reach the other process"))
    }

    fn answer(&mut self) -> Result<Answer, BenchError> {
        let mut line = String::new();
        self.answers.read_line(&mut line).map_err(host("cannot hear the other process"))?;
        match serde_json::from_str(&line) {
            Ok(Answer::Failed(reason)) => Err(BenchError::Peer(format!("failed: {reason}"))),
            Ok(answer) => Ok(answer),
            Err(error) => Err(BenchError::Peer(format!("said {line:?}: {error}"))),
        }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // The end of its input ends it, whatever it is waiting for after that; a measurement that
        // was given up half-way leaves it in an accept that never comes.
        self.orders = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn unexpected(answer: &Answer) -> BenchError {
    BenchError::Peer(format!("said {answer:?} out of turn"))
}

fn write_line(out: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    out.write_all(&line)?;
    out.flush()
}

/// The other process's whole life.
pub(crate) fn serve() -> ExitCode {
    let mut held = None;
    for line in io::stdin().lines() {
        let order = line.and_then(|line| serde_json::from_str(&line).map_err(io::Error::from));
        let Ok(order) = order else { return ExitCode::FAILURE };
        let answer = obey(order, &mut held).unwrap_or_else(|error| Answer::Failed(error.to_string()));
        if write_line(&mut io::stdout(), &answer).is_err() {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn obey(order: Order, held: &mut Option<Arc<MappedMemory>>) -> Result<Answer, BenchError> {
    match order {
        Order::Hold { bytes } => {
            *held = Some(guest::prefaulted(bytes)?);
            Ok(Answer::Ready)
        }
        Order::ReceivePlain { chunk } => {
            let Some(memory) = held else {
                return Err(BenchError::Peer("holds no memory".to_owned()));
            };
            receive_plain(memory, chunk).map(Answer::Received)
        }
        Order::ReceiveGuest { over } => receive_guest(over, held.as_ref()).map(Answer::Received),
    }
}

fn listening(door: Door) -> Result<(), BenchError> {
    write_line(&mut io::stdout(), &Answer::Listening(door)).map_err(host("cannot answer"))
}

fn receive_plain(memory: &Arc<MappedMemory>, chunk: usize) -> Result<Received, BenchError> {
    guest::clear(memory)?;
    let listener = TcpListener::bind("127.0.0.1:0").map_err(host("cannot listen"))?;
    listening(Door::Tcp(listener.local_addr().map_err(host("cannot listen"))?.to_string()))?;
    let mut stream = listener.accept().map_err(host("cannot accept"))?.0;
    let (window, cpu) = (guest::window(memory)?, sys::cpu_seconds());
    plain::receive(&mut stream, window, chunk).map_err(host("cannot receive"))?;
    let cpu_seconds = sys::cpu_seconds() - cpu;
    let fingerprint = Some(guest::fingerprint(memory)?);
    Ok(Received { cpu_seconds, fingerprint, present_pages: guest::present_pages(memory), grown_bytes: 0 })
}

fn receive_guest(over: Over, held: Option<&Arc<MappedMemory>>) -> Result<Received, BenchError> {
    if let Some(memory) = held {
        // What is held must read as zeros, like any destination's memory.
        guest::clear(memory)?;
    }
    let (acceptor, door) = over.accept()?;
    let mut room = Room(held.cloned());
    let resident = machine::resident_bytes();
    listening(door)?;
    let cpu = sys::cpu_seconds();
    let destination = Destination::new(DestinationConfig::default());
    destination.run(&mut room, acceptor, &Control::new()).map_err(Box::new)?;
    let cpu_seconds = sys::cpu_seconds() - cpu;
    let grown_bytes = machine::resident_bytes().saturating_sub(resident);
    let Some(memory) = room.0 else {
        return Err(BenchError::Wrong("a migration without memory".to_owned()));
    };
    let present_pages = guest::present_pages(&memory);
    // Reading memory that is not there would make it so.
    let fingerprint = held.map(|memory| guest::fingerprint(memory)).transpose()?;
    Ok(Received { cpu_seconds, fingerprint, present_pages, grown_bytes })
}
