//! A guest without a hypervisor, for the engine's own tests: a mapping that a thread writes.
#![allow(dead_code, missing_docs, unreachable_pub, missing_debug_implementations)]

pub mod direct;
pub mod source;

use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageferry::dirty::{DirtySource, WriteLog};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region, RegionId};
use pageferry::vm::{Step, VmResult};
use pageferry::{DestinationVm, SourceVm};

pub fn layout(pages: u64) -> Layout {
    let half = pages / 2;
    let regions = vec![Region::ram("low", 0, half * 4096), Region::ram("high", 1 << 32, (pages - half) * 4096)];
    Layout::new(regions).unwrap()
}

/// Everything the writer thread shares with the guest.
pub struct Shared {
    pub memory: Arc<MappedMemory>,
    pub log: WriteLog,
    running: Mutex<bool>,
    ended: AtomicBool,
    pub writes: AtomicU64,
    pub throttle: AtomicU64,
}

impl Shared {
    pub fn running(&self) -> std::sync::MutexGuard<'_, bool> {
        self.running.lock().unwrap()
    }
}

pub struct Guest {
    pub shared: Arc<Shared>,
    log: WriteLog,
    pub steps: Vec<Step>,
    writer: Option<std::thread::JoinHandle<()>>,
    pub was_running: bool,
    pub config: Vec<u8>,
}

impl Guest {
    /// A guest of `pages` pages whose thread writes a page every `interval`; `None` for an idle one.
    pub fn new(pages: u64, interval: Option<Duration>) -> Self {
        Self::writing(pages, interval, 1)
    }

    /// A guest whose thread makes up for what it did not write while it waited for a core: it writes as fast on a
    /// loaded machine.
    pub fn steady(pages: u64, interval: Duration) -> Self {
        Self::writing(pages, Some(interval), 1000)
    }

    fn writing(pages: u64, interval: Option<Duration>, most_at_once: u32) -> Self {
        let layout = layout(pages);
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous).unwrap());
        for (id, region) in layout.iter() {
            for page in (0..region.page_count()).filter(|page| page % 3 != 0) {
                memory.write(id, page * 4096 + page % 4000, &(page | 1).to_le_bytes()).unwrap();
            }
        }
        let log = WriteLog::new(layout);
        let shared = Arc::new(Shared {
            memory,
            log: log.clone(),
            running: Mutex::new(true),
            ended: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            throttle: AtomicU64::new(0),
        });
        let writer = interval.map(|interval| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || write_on(&shared, interval, most_at_once))
        });
        Self { shared, log, steps: Vec::new(), writer, was_running: true, config: b"test guest".to_vec() }
    }

    pub fn is_running_now(&self) -> bool {
        *self.shared.running.lock().unwrap()
    }

    pub fn content(&self) -> Vec<u8> {
        content(&self.shared.memory)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        if let Some(writer) = self.writer.take() {
            writer.join().unwrap();
        }
    }
}

/// Writes what is due every `interval`, but no more than `most_at_once`.
fn write_on(shared: &Shared, interval: Duration, most_at_once: u32) {
    let layout = shared.memory.layout().clone();
    let pages: Vec<u64> = layout.regions().iter().map(Region::page_count).collect();
    let (mut last, mut due) = (Instant::now(), 1);
    while !shared.ended.load(Ordering::SeqCst) {
        let running = shared.running.lock().unwrap();
        for _ in 0..if *running { due } else { 0 } {
            let n = shared.writes.fetch_add(1, Ordering::SeqCst);
            let region = (n % 2) as usize;
            let page = n.wrapping_mul(7919) % pages[region].max(1);
            if pages[region] > 0 {
                shared.memory.write(RegionId(region as u32), page * 4096 + n % 4000, &n.to_le_bytes()).unwrap();
                shared.log.mark(RegionId(region as u32), page..page + 1);
            }
        }
        drop(running);
        let slower = 100 / (100 - shared.throttle.load(Ordering::SeqCst)).max(1) as u32;
        std::thread::sleep(interval * slower);
        let passed = last.elapsed();
        last += passed;
        let passed_by = passed.as_nanos() / (interval * slower).as_nanos().max(1);
        due = u32::try_from(passed_by).unwrap_or(u32::MAX).clamp(1, most_at_once);
    }
}

pub fn content(memory: &MappedMemory) -> Vec<u8> {
    let mut all = Vec::new();
    for (id, region) in memory.layout().iter() {
        let mut bytes = vec![0; region.len as usize];
        memory.read(id, 0, &mut bytes).unwrap();
        all.extend(bytes);
    }
    all
}

impl SourceVm for Guest {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.shared.memory.clone()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        &mut self.log
    }

    fn describe(&mut self, out: &mut dyn Write) -> VmResult<()> {
        Ok(out.write_all(&self.config)?)
    }

    fn is_running(&self) -> bool {
        self.was_running
    }

    fn pause(&mut self) -> VmResult<()> {
        *self.shared.running.lock().unwrap() = false;
        Ok(())
    }

    fn resume(&mut self) -> VmResult<()> {
        *self.shared.running.lock().unwrap() = true;
        Ok(())
    }

    fn throttle(&mut self, percent: u8) -> VmResult<()> {
        self.shared.throttle.store(percent.into(), Ordering::SeqCst);
        Ok(())
    }

    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        // Saving writes guest memory, as kvmclock does.
        if self.shared.memory.layout().regions()[1].len > 0 {
            self.shared.memory.write(RegionId(1), 8, b"saved").unwrap();
            self.log.mark(RegionId(1), 0..1);
        }
        Ok(out.write_all(&self.shared.writes.load(Ordering::SeqCst).to_le_bytes())?)
    }

    fn step(&mut self, step: Step) -> VmResult<()> {
        self.steps.push(step);
        Ok(())
    }
}

#[derive(Default)]
pub struct Room {
    pub memory: Option<Arc<MappedMemory>>,
    pub writes: Option<u64>,
    pub committed: Option<bool>,
    pub aborted: bool,
    pub refuse: Option<&'static str>,
    pub commit_fails: bool,
}

impl DestinationVm for Room {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        assert_eq!(config, b"test guest");
        if let Some(reason) = self.refuse {
            return Err(reason.into());
        }
        let memory = Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous)?);
        Ok(self.memory.insert(memory).clone())
    }

    fn load(&mut self, state: &mut dyn Read) -> VmResult<()> {
        let mut bytes = [0; 8];
        state.read_exact(&mut bytes)?;
        self.writes = Some(u64::from_le_bytes(bytes));
        Ok(())
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        assert!(!self.aborted, "a guest that was given up must not be run");
        if self.commit_fails {
            return Err("no vCPU thread could be started".into());
        }
        self.committed = Some(run);
        Ok(())
    }

    fn abort(&mut self) {
        assert!(self.committed.is_none(), "a guest that runs must not be given up");
        self.aborted = true;
    }
}
