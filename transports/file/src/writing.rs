//! What lanes carry, gathered into extents and written by threads of its own, so that a lane goes on while the disk works.

use std::io::IoSlice;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use pageferry::host::Spawner;

use crate::device::Device;
use crate::error::FileFailure;
use crate::format::{BLOCK, Extent, Header, MAX_EXTENTS, checksum, encode_table, extent_len};
use crate::pool::{Buffer, Pool, WORKERS, Workers};

/// How often a thread that waits looks whether it is all over.
const LOOK: Duration = Duration::from_millis(20);

/// Buffers beyond the one that every lane fills: one in each thread's hands and some that wait for it.
const AHEAD: usize = WORKERS as usize + 2;

/// A file that is being written.
pub(crate) struct Writing {
    shared: Arc<Shared>,
    /// What each lane has not filled an extent with; the control lane's first.
    lanes: Vec<Mutex<Option<Buffer>>>,
    workers: Workers<Job>,
}

struct Shared {
    device: Device,
    path: PathBuf,
    pool: Pool,
    table: Mutex<Table>,
    idle: Condvar,
    stopped: AtomicBool,
    failed: OnceLock<String>,
    written: AtomicU64,
}

/// The extents so far.
struct Table {
    extents: Vec<Extent>,
    end: u64,
    /// Extents that are not written yet.
    pending: usize,
}

struct Job {
    buffer: Buffer,
    index: usize,
    offset: u64,
}

impl Writing {
    /// Begins to write a file for a guest that comes over so many data lanes.
    pub(crate) fn begin(
        device: Device,
        path: PathBuf,
        data_lanes: u16,
        spawner: &dyn Spawner,
    ) -> Result<Self, FileFailure> {
        let count = usize::from(data_lanes) + 1;
        let shared = Arc::new(Shared {
            device,
            path: path.clone(),
            pool: Pool::new(count + AHEAD, extent_len(data_lanes)),
            table: Mutex::new(Table { extents: Vec::new(), end: BLOCK as u64, pending: 0 }),
            idle: Condvar::new(),
            stopped: AtomicBool::new(false),
            failed: OnceLock::new(),
            written: AtomicU64::new(0),
        });
        let workers_share = Arc::clone(&shared);
        let workers = Workers::start(spawner, move |job| workers_share.write(job))
            .map_err(|source| FileFailure::Write { path, source })?;
        Ok(Self { shared, lanes: (0..count).map(|_| Mutex::default()).collect(), workers })
    }

    /// Bytes that the disk has taken so far.
    pub(crate) fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Nothing more is written; who waits for a buffer gets an error.
    pub(crate) fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.idle.notify_all();
    }

    /// Appends a frame to what a lane has carried. Waits while the disk is behind.
    pub(crate) fn append(&self, lane: u16, frame: &[IoSlice<'_>]) -> Result<(), String> {
        self.shared.check()?;
        let Some(slot) = self.lanes.get(usize::from(lane)) else { return Err(format!("there is no lane {lane}")) };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        for part in frame {
            let mut rest = &part[..];
            while !rest.is_empty() {
                let mut buffer = match slot.take() {
                    Some(buffer) => buffer,
                    None => self.shared.take_buffer()?,
                };
                rest = buffer.take(rest);
                if buffer.is_full() {
                    self.submit(lane, buffer)?;
                } else {
                    *slot = Some(buffer);
                }
            }
        }
        Ok(())
    }

    fn submit(&self, lane: u16, buffer: Buffer) -> Result<(), String> {
        let mut table = self.shared.table();
        if table.extents.len() as u64 == MAX_EXTENTS {
            return Err(format!("the guest is too large for one file: {MAX_EXTENTS} extents are full"));
        }
        let (index, offset) = (table.extents.len(), table.end);
        let extent = Extent { lane, len: buffer.len() as u32, check: 0 };
        table.end += extent.padded_len() as u64;
        table.extents.push(extent);
        table.pending += 1;
        self.workers.give(Job { buffer, index, offset });
        Ok(())
    }

    /// Writes what is left and the table, and at last the header, each on the disk before the next.
    pub(crate) fn seal(&self, protocol: u16) -> Result<(), String> {
        for (lane, slot) in (0..).zip(&self.lanes) {
            if let Some(buffer) = slot.lock().unwrap_or_else(PoisonError::into_inner).take() {
                self.submit(lane, buffer)?;
            }
        }
        let (extents, table_offset) = self.shared.wait_until_written()?;
        let table = encode_table(&extents);
        let header = Header {
            protocol,
            data_lanes: self.lanes.len() as u16 - 1,
            file_len: table_offset + table.len() as u64,
            table_offset,
            extents: extents.len() as u64,
            table_check: checksum(&table),
        };
        let shared = &self.shared;
        shared.write_blocks(&table, table_offset)?;
        shared.device.end_at(header.file_len).map_err(|source| shared.failure(source))?;
        shared.check()?;
        shared.write_blocks(&header.encode(), 0)?;
        shared.device.sync().map_err(|source| shared.failure(source))?;
        if !shared.device.is_direct() {
            shared.device.let_go(0, header.file_len);
        }
        shared.check()
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<(), String> {
        match self.failed.get() {
            Some(reason) => Err(reason.clone()),
            None if self.stopped.load(Ordering::Acquire) => Err("it was given up".to_owned()),
            None => Ok(()),
        }
    }

    fn take_buffer(&self) -> Result<Buffer, String> {
        loop {
            self.check()?;
            if let Some(buffer) = self.pool.take(LOOK).map_err(|source| self.failure(source))? {
                return Ok(buffer);
            }
        }
    }

    /// What one of the threads does.
    fn write(&self, mut job: Job) {
        if self.check().is_ok() {
            let blocks = job.buffer.blocks();
            let check = checksum(blocks);
            match self.device.write_at(blocks, job.offset) {
                Ok(()) => {
                    self.written.fetch_add(blocks.len() as u64, Ordering::Relaxed);
                    self.table().extents[job.index].check = check;
                }
                Err(source) => {
                    let _ = self.failed.set(self.failure(source));
                }
            }
        }
        self.pool.give_back(job.buffer);
        self.table().pending -= 1;
        self.idle.notify_all();
    }

    fn wait_until_written(&self) -> Result<(Vec<Extent>, u64), String> {
        let mut table = self.table();
        while table.pending > 0 {
            table = self.idle.wait_timeout(table, LOOK).unwrap_or_else(PoisonError::into_inner).0;
            self.check()?;
        }
        self.check()?;
        Ok((table.extents.clone(), table.end))
    }

    fn write_blocks(&self, bytes: &[u8], offset: u64) -> Result<(), String> {
        let mut buffer = Buffer::new(bytes.len()).map_err(|source| self.failure(source))?;
        buffer.take(bytes);
        self.device.write_at(buffer.blocks(), offset).map_err(|source| self.failure(source))
    }

    fn failure(&self, source: std::io::Error) -> String {
        FileFailure::Write { path: self.path.clone(), source }.to_string()
    }
}
