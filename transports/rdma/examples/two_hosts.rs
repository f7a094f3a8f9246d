//! Two hosts: pages go from one to the other, and then the receiver's host vanishes without a word. See `vm/two.sh`.
//!
//!     two_hosts receive ADDRESS      resets its machine at the end
//!     two_hosts send ADDRESS

use std::error::Error;
use std::io::{Write, stdout};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::transport::{Acceptor, Dialer, DirectRun, LaneHalves, LaneRole};
use pageferry_conformance::frames::{receive, send};
use pageferry_rdma::{LaneFailure, RdmaAcceptor, RdmaDialer, RdmaOptions};

const LEN: u64 = 16 << 20;
const PORT: u16 = 7700;
const PATIENCE: Duration = Duration::from_secs(60);

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["receive", address] => receive_all(&format!("{address}:{PORT}")),
        ["send", address] => send_all(&format!("{address}:{PORT}")),
        _ => Err("usage: two_hosts receive|send ADDRESS".into()),
    }
}

fn content() -> Vec<u8> {
    (0..LEN).map(|at| (at ^ at >> 11) as u8).collect()
}

fn memory() -> Result<Arc<MappedMemory>> {
    let layout = Layout::new(vec![Region::ram("ram", 0, LEN)])?;
    Ok(Arc::new(MappedMemory::new(layout, Backing::Anonymous)?))
}

fn receive_all(address: &str) -> Result<()> {
    let acceptor = RdmaAcceptor::bind(address, RdmaOptions::default())?;
    let memory = memory()?;
    acceptor.expose(memory.clone())?;
    let mut lane = acceptor.accept(PATIENCE)?.ok_or("nobody came")?.split()?;
    while receive(&mut lane.receiver)?.0 != 1 {}
    acceptor.conceal();
    let mut arrived = vec![0; LEN as usize];
    memory.read(RegionId(0), 0, &mut arrived)?;
    if arrived != content() {
        return Err("the memory did not arrive as it was sent".into());
    }
    writeln!(stdout(), "{} MiB arrived; this machine is reset now", LEN >> 20)?;
    send(&mut lane.sender, 2, b"it is all there")?;
    receive(&mut lane.receiver)?;
    Ok(std::fs::write("/proc/sysrq-trigger", "b")?)
}

/// The other machine may take a while to come up.
fn dial(dialer: &RdmaDialer) -> Result<LaneHalves> {
    let started = Instant::now();
    loop {
        match dialer.dial(LaneRole::Data(0), Duration::from_secs(2)) {
            Ok(lane) => return Ok(lane.split()?),
            Err(error) if started.elapsed() > PATIENCE => return Err(error.into()),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn send_all(address: &str) -> Result<()> {
    let dialer = RdmaDialer::new(address, RdmaOptions::default());
    let memory = memory()?;
    memory.write(RegionId(0), 0, &content())?;
    dialer.attach(memory)?;
    let mut lane = dial(&dialer)?;
    send(&mut lane.sender, 0, b"hello")?;
    let began = Instant::now();
    for offset in (0..LEN).step_by(512 << 10) {
        lane.sender.write_pages(&[DirectRun { region: RegionId(0), offset, len: 512 << 10 }])?;
        send(&mut lane.sender, 0, b"more")?;
    }
    send(&mut lane.sender, 1, b"that was all")?;
    receive(&mut lane.receiver)?;
    writeln!(stdout(), "{} MiB written to {address} in {:.1?}", LEN >> 20, began.elapsed())?;
    send(&mut lane.sender, 3, b"go")?;
    let began = Instant::now();
    let error = receive(&mut lane.receiver).err().ok_or("a machine that was reset still sends")?;
    writeln!(stdout(), "noticed after {:.1?}: {error}", began.elapsed())?;
    match error.get_ref().and_then(|cause| cause.downcast_ref()) {
        Some(LaneFailure::Dead) => Ok(()),
        _ => Err("that is not what happened to it".into()),
    }
}
