//! The shortest migration: a memory mapping that a thread keeps writing moves to another mapping of
//! this process. `cargo run --release -p pageferry-examples --example loopback`

use std::io::{Read, Write};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU64, Ordering},
};

use pageferry::dirty::{DirtySource, WriteLog};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::{
    Control, Destination, DestinationConfig, DestinationVm, Source, SourceConfig, SourceVm, transport, vm::VmResult,
};

/// A guest is memory, a log of what was written to it, and something that can be stopped: here a
/// writer that holds `running` whenever it writes.
struct Guest {
    memory: Arc<MappedMemory>,
    log: WriteLog,
    running: Arc<Mutex<bool>>,
    writes: Arc<AtomicU64>,
}

impl SourceVm for Guest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.memory.clone()
    }
    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.log
    }
    fn describe(&mut self, _out: &mut dyn Write) -> VmResult<()> {
        Ok(())
    }
    fn pause(&mut self) -> VmResult<()> {
        *self.running.lock().unwrap() = false;
        Ok(())
    }
    fn resume(&mut self) -> VmResult<()> {
        *self.running.lock().unwrap() = true;
        Ok(())
    }
    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        Ok(out.write_all(&self.writes.load(Ordering::SeqCst).to_le_bytes())?)
    }
}

/// Room for a guest that is to arrive: its memory, and its machine state (one counter).
#[derive(Default)]
struct Room {
    memory: Option<Arc<MappedMemory>>,
    writes: u64,
    runs: bool,
}

impl DestinationVm for Room {
    fn prepare(&mut self, _config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous)?);
        Ok(self.memory.insert(memory).clone())
    }
    fn load(&mut self, state: &mut dyn Read) -> VmResult<()> {
        let mut bytes = [0; 8];
        state.read_exact(&mut bytes)?;
        self.writes = u64::from_le_bytes(bytes);
        Ok(())
    }
    fn commit(&mut self, run: bool) -> VmResult<()> {
        self.runs = run;
        Ok(())
    }
    fn abort(&mut self) {
        *self = Self::default();
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layout = Layout::new(vec![Region::ram("ram", 0, 64 << 20)])?;
    let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous)?);
    let (log, running) = (WriteLog::new(layout), Arc::new(Mutex::new(true)));
    let mut guest = Guest { memory, log, running, writes: Arc::default() };
    let (memory, log, running) = (guest.memory.clone(), guest.log.clone(), guest.running.clone());
    let writes = guest.writes.clone();
    std::thread::spawn(move || {
        loop {
            let running = running.lock().unwrap();
            if *running {
                let n = writes.fetch_add(1, Ordering::SeqCst);
                let page = n * 7919 % (16 << 10);
                memory.write(RegionId(0), page * 4096, &n.to_le_bytes()).expect("inside the region");
                log.mark(RegionId(0), page..page + 1);
            }
            drop(running);
            std::thread::sleep(std::time::Duration::from_micros(20));
        }
    });

    let (dialer, acceptor) = transport::in_memory();
    let destination = std::thread::spawn(move || {
        let mut room = Room::default();
        Destination::new(DestinationConfig::default()).run(&mut room, Arc::new(acceptor), &Control::new()).map(|_| room)
    });
    let report = Source::new(SourceConfig::default()).run(&mut guest, Arc::new(dialer), &Control::new())?;
    let room = destination.join().expect("no panic")?;

    let (mut here, mut there) = (vec![0; 64 << 20], vec![0; 64 << 20]);
    guest.memory.read(RegionId(0), 0, &mut here)?;
    room.memory.expect("the guest arrived").read(RegionId(0), 0, &mut there)?;
    assert!(room.runs && here == there && room.writes == guest.writes.load(Ordering::SeqCst));
    println!(
        "{} pages identical after {} writes in {} rounds, downtime {:?}",
        report.pages_total,
        room.writes,
        report.rounds.len(),
        report.downtime.total()
    );
    Ok(())
}
