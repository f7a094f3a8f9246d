//! How fast pages come over: lanes with one-sided writes against plain RDMA writes, in turns.
//!
//!     throughput ADDRESS [MIB [TURNS]]
//!
//! The reference writes the same memory in the same sizes over one queue pair, both sides registered whole
//! beforehand, and does nothing else. Ours registers as it goes, sends a frame behind every batch of pages as the engine does, and
//! receives it. Both ends of both are in this process; what arrived is compared each time.

mod reference;

use std::error::Error;
use std::io::{Write, stdout};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::limits::MAX_BATCH_PAGES;
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::transport::{Acceptor, Dialer, DirectRun, LaneRole};
use pageferry_conformance::frames::{receive, send};
use pageferry_rdma::{RdmaAcceptor, RdmaDialer, RdmaOptions};

/// Bytes written at once: a full batch of the engine.
const BATCH: u64 = MAX_BATCH_PAGES as u64 * 4096;

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let address = arguments.next().ok_or("usage: throughput ADDRESS [MIB [TURNS]]")?;
    let len = arguments.next().map_or(Ok(64), |mib| mib.parse::<u64>())? << 20;
    let turns = arguments.next().map_or(Ok(5), |turns| turns.parse::<usize>())?;
    let from = memory(len)?;
    let content: Vec<u8> = (0..len).map(|at| (at ^ at >> 9) as u8).collect();
    from.write(RegionId(0), 0, &content)?;

    let ways: [(&str, Way); 4] = [
        ("plain RDMA writes", reference),
        ("ours, windows", |address, from, to| ours(address, from, to, &RdmaOptions::default())),
        ("ours, windows within 8 MiB", |address, from, to| {
            let mut options = RdmaOptions::default();
            options.locked_memory = Some(8 << 20);
            ours(address, from, to, &options)
        }),
        ("ours, all pinned", |address, from, to| {
            let mut options = RdmaOptions::default();
            options.pin_all = true;
            ours(address, from, to, &options)
        }),
    ];
    let mut seconds = vec![Vec::new(); ways.len()];
    for _ in 0..turns {
        for ((_, way), seconds) in ways.iter().zip(&mut seconds) {
            let to = memory(len)?;
            to.prefault()?;
            seconds.push(way(&address, &from, &to)?.as_secs_f64());
            let mut arrived = vec![0; len as usize];
            to.read(RegionId(0), 0, &mut arrived)?;
            if arrived != content {
                return Err("the memory did not arrive as it was sent".into());
            }
        }
    }
    let mut medians = seconds.iter_mut().map(|seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    });
    let mut out = stdout();
    let mib = (len >> 20) as f64;
    writeln!(out, "{mib} MiB in batches of {} KiB, medians of {turns} turns", BATCH >> 10)?;
    let plain = medians.next().unwrap_or_default();
    writeln!(out, "{:28} {:7.1} MiB/s", ways[0].0, mib / plain)?;
    for ((name, _), median) in ways.iter().skip(1).zip(medians) {
        writeln!(out, "{name:28} {:7.1} MiB/s, {:.3} of plain", mib / median, plain / median)?;
    }
    Ok(())
}

type Way = fn(&str, &Arc<MappedMemory>, &Arc<MappedMemory>) -> Result<Duration, Box<dyn Error>>;

fn memory(len: u64) -> Result<Arc<MappedMemory>, Box<dyn Error>> {
    let layout = Layout::new(vec![Region::ram("ram", 0, len)])?;
    Ok(Arc::new(MappedMemory::new(layout, Backing::Anonymous)?))
}

fn reference(address: &str, from: &Arc<MappedMemory>, to: &Arc<MappedMemory>) -> Result<Duration, Box<dyn Error>> {
    let (from, to) = (window(from)?, window(to)?);
    Ok(reference::write(SocketAddr::new(address.parse()?, 0), from, to, BATCH as usize)?)
}

fn window(memory: &MappedMemory) -> Result<(u64, usize), Box<dyn Error>> {
    let window = memory.window(RegionId(0)).ok_or("the memory is mapped")?;
    Ok((window.start.as_ptr() as u64, window.len))
}

fn ours(
    address: &str,
    from: &Arc<MappedMemory>,
    to: &Arc<MappedMemory>,
    options: &RdmaOptions,
) -> Result<Duration, Box<dyn Error>> {
    let acceptor = RdmaAcceptor::bind(&format!("{address}:0"), options.clone())?;
    let dialer = RdmaDialer::new(acceptor.local_addr().to_string(), options.clone());
    dialer.attach(from.clone())?;
    acceptor.expose(to.clone())?;
    let len = to.layout().regions()[0].len;
    let (started, receiving) = std::sync::mpsc::channel();
    let destination = std::thread::spawn(move || -> std::io::Result<(Instant, RdmaAcceptor)> {
        let lane = acceptor.accept(PATIENCE).map_err(std::io::Error::other)?;
        let mut lane = lane.ok_or(std::io::ErrorKind::TimedOut)?.split()?;
        receive(&mut lane.receiver)?;
        let _ = started.send(());
        for _ in 0..len.div_ceil(BATCH) {
            receive(&mut lane.receiver)?;
        }
        let ended = Instant::now();
        acceptor.conceal();
        Ok((ended, acceptor))
    });
    let mut lane = dialer.dial(LaneRole::Data(0), PATIENCE)?.split()?;
    send(&mut lane.sender, 0, &[0; 64])?;
    receiving.recv()?;
    let began = Instant::now();
    for (number, offset) in (0..len).step_by(BATCH as usize).enumerate() {
        lane.sender.write_pages(&[DirectRun { region: RegionId(0), offset, len: BATCH.min(len - offset) }])?;
        // About what a batch of raw pages has to say of them.
        send(&mut lane.sender, number as u64, &[0; 1200])?;
    }
    let (ended, acceptor) = destination.join().map_err(|_| "the destination panicked")??;
    drop((lane, acceptor));
    Ok(ended - began)
}
