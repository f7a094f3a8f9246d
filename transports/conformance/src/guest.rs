//! A guest without a hypervisor: memory that a thread writes, and room for it elsewhere.

use std::fmt;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use pageferry::dirty::{DirtySource, WriteLog};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::vm::VmResult;
use pageferry::{DestinationVm, SourceVm};

const PAGE: u64 = 4096;

/// What guest and writer share.
struct Shared {
    memory: Arc<MappedMemory>,
    log: WriteLog,
    running: Mutex<bool>,
    ended: AtomicBool,
    writes: AtomicU64,
}

/// A guest of one region: a third of its pages are zero, a third alike, a third each of its own kind.
pub struct Guest {
    shared: Arc<Shared>,
    log: WriteLog,
    writer: Option<JoinHandle<()>>,
}

impl Guest {
    /// A guest of so many pages; its thread writes one every `interval`, if there is any.
    pub fn new(pages: u64, interval: Option<Duration>) -> Self {
        Self::with_writer(pages, interval, false)
    }

    /// The same guest; its thread keeps to the first quarter of memory, gives every other page back to the host in place of writing it,
    /// which it does the next time, and comes to rest after sixteen times each.
    pub fn giving_back(pages: u64, interval: Duration) -> Self {
        Self::with_writer(pages, Some(interval), true)
    }

    fn with_writer(pages: u64, interval: Option<Duration>, gives_back: bool) -> Self {
        let writable = if gives_back { pages / 4 } else { pages };
        let layout = Layout::new(vec![Region::ram("ram", 0, pages * PAGE)]).expect("one region is a layout");
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous).expect("there is memory"));
        for page in 0..pages {
            let content: Vec<u8> = match page % 3 {
                0 => continue,
                1 => (0..PAGE).map(|at| (at / 7) as u8).collect(),
                _ => (0..PAGE).map(|at| (at.wrapping_mul(page * 2 + 1) >> 3) as u8).collect(),
            };
            memory.write(RegionId(0), page * PAGE, &content).expect("inside the region");
        }
        let log = WriteLog::new(layout);
        let shared = Shared {
            memory,
            log: log.clone(),
            running: Mutex::new(true),
            ended: AtomicBool::new(false),
            writes: AtomicU64::new(0),
        };
        let shared = Arc::new(shared);
        let writer = interval.map(|interval| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.write_on(writable, interval, gives_back))
        });
        Self { shared, log, writer }
    }

    /// Whether it runs.
    pub fn runs(&self) -> bool {
        *self.shared.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of its memory.
    pub fn content(&self) -> Vec<u8> {
        content(&self.shared.memory)
    }

    /// Pages written so far: its machine state.
    pub fn writes(&self) -> u64 {
        self.shared.writes.load(Ordering::SeqCst)
    }

    fn set_running(&self, running: bool) {
        *self.shared.running.lock().unwrap_or_else(PoisonError::into_inner) = running;
    }
}

impl Shared {
    fn write_on(&self, pages: u64, interval: Duration, gives_back: bool) {
        while !self.ended.load(Ordering::SeqCst) {
            let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            let rests = gives_back && self.writes.load(Ordering::SeqCst) >= 16 * pages;
            if *running && !rests {
                let number = self.writes.fetch_add(1, Ordering::SeqCst);
                let page = number.wrapping_mul(7919) % pages;
                if gives_back && (number + number / pages).is_multiple_of(2) {
                    self.memory.discard(RegionId(0), page..page + 1).expect("inside the region");
                    self.log.mark_zeroed(RegionId(0), page..page + 1);
                } else {
                    self.memory.write(RegionId(0), page * PAGE, &number.to_le_bytes()).expect("inside the region");
                    self.log.mark(RegionId(0), page..page + 1);
                }
            }
            drop(running);
            std::thread::sleep(interval);
        }
    }
}

impl fmt::Debug for Guest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guest").field("runs", &self.runs()).finish_non_exhaustive()
    }
}

impl fmt::Debug for Room {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Room").field("runs", &self.runs).finish_non_exhaustive()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        if let Some(writer) = self.writer.take() {
            // If it has panicked, the test that finds a difference says more.
            let _ = writer.join();
        }
    }
}

fn content(memory: &MappedMemory) -> Vec<u8> {
    let len = memory.layout().regions().iter().map(|region| region.len).sum::<u64>();
    let mut bytes = vec![0; len as usize];
    memory.read(RegionId(0), 0, &mut bytes).expect("inside the region");
    bytes
}

impl SourceVm for Guest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.shared.memory.clone()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.log
    }

    fn describe(&mut self, _out: &mut dyn Write) -> VmResult<()> {
        Ok(())
    }

    fn pause(&mut self) -> VmResult<()> {
        self.set_running(false);
        Ok(())
    }

    fn resume(&mut self) -> VmResult<()> {
        self.set_running(true);
        Ok(())
    }

    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        Ok(out.write_all(&self.writes().to_le_bytes())?)
    }
}

/// Room for a guest that is to arrive.
#[derive(Default)]
pub struct Room {
    memory: Option<Arc<MappedMemory>>,
    /// The guest's count of pages written.
    pub writes: u64,
    /// Whether it runs here.
    pub runs: bool,
}

impl Room {
    /// What has arrived; nothing without memory.
    pub fn content(&self) -> Vec<u8> {
        self.memory.as_deref().map(content).unwrap_or_default()
    }
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
