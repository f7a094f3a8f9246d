//! What lanes carried, read back: each extent ahead of its turn, checked before any of it is believed.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use pageferry::host::Spawner;
use pageferry::wire::{FrameBuffer, HEADER_LEN};

use crate::device::Device;
use crate::error::{FileFailure, Part};
use crate::format::{BLOCK, Extent, Header, checksum, decode_table, extent_len};
use crate::pool::{Buffer, Workers};

/// How often a lane that waits for the disk looks whether it is all over.
const LOOK: Duration = Duration::from_millis(20);

/// A saved guest's file, its header and table checked.
#[derive(Debug)]
pub(crate) struct Saved {
    path: PathBuf,
    device: Device,
    header: Header,
    extents: Vec<Extent>,
    /// Where each extent starts.
    offsets: Vec<u64>,
}

impl Saved {
    /// Opens a file and checks what says where everything is.
    pub(crate) fn open(path: &Path, direct: bool) -> Result<Self, FileFailure> {
        let failed = |source| FileFailure::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        let found = file.metadata().map_err(failed)?;
        if !found.is_file() {
            return Err(FileFailure::NotASave { path: path.to_owned() });
        }
        let mut start = [0; BLOCK];
        let start = &mut start[..found.len().min(BLOCK as u64) as usize];
        file.read_exact_at(start, 0).map_err(failed)?;
        let header = Header::decode(start, found.len(), path)?;
        // No longer than the file, and than a full table.
        let mut table = vec![0; header.table_len()];
        file.read_exact_at(&mut table, header.table_offset).map_err(failed)?;
        let extents = decode_table(&header, &table, path)?;
        let offsets = extents
            .iter()
            .scan(BLOCK as u64, |end, extent| {
                let offset = *end;
                *end += extent.padded_len() as u64;
                Some(offset)
            })
            .collect();
        Ok(Self { path: path.to_owned(), device: Device::new(file, direct), header, extents, offsets })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Data lanes that the guest was saved over.
    pub(crate) fn data_lanes(&self) -> u16 {
        self.header.data_lanes
    }

    /// The protocol of its frames.
    pub(crate) fn protocol(&self) -> u16 {
        self.header.protocol
    }

    /// Something that cannot be in a file that was saved.
    pub(crate) fn invalid(&self, what: impl ToString) -> FileFailure {
        FileFailure::Invalid { path: self.path.clone(), what: what.to_string() }
    }

    /// Reads an extent and checks it.
    fn read(&self, index: usize, buffer: &mut Buffer) -> Result<(), FileFailure> {
        let (Some(extent), Some(&offset)) = (self.extents.get(index), self.offsets.get(index)) else {
            return Err(self.invalid(format!("there is no extent {index}")));
        };
        let room = buffer.room(extent.len as usize);
        let len = room.len() as u64;
        // It may have been cut since it was opened.
        self.device.read_at(room, offset).map_err(|source| FileFailure::Read { path: self.path.clone(), source })?;
        if checksum(room) == extent.check {
            return Ok(());
        }
        Err(FileFailure::Damaged { path: self.path.clone(), part: Part::Extent(index), offset, len })
    }
}

/// Threads that read a file for its lanes.
pub(crate) struct Reading {
    saved: Arc<Saved>,
    workers: Workers<Job>,
    progress: Arc<AtomicU64>,
    stopped: AtomicBool,
}

type Answer = Result<Buffer, FileFailure>;

struct Job {
    index: usize,
    buffer: Buffer,
    answer: Sender<Answer>,
}

impl Reading {
    /// Starts the threads.
    pub(crate) fn start(saved: Arc<Saved>, spawner: &dyn Spawner) -> Result<Self, FileFailure> {
        let progress = Arc::new(AtomicU64::new(0));
        let (file, counter) = (Arc::clone(&saved), Arc::clone(&progress));
        let work = move |mut job: Job| {
            let read = file.read(job.index, &mut job.buffer);
            counter.fetch_add(job.buffer.len() as u64, Ordering::Relaxed);
            // Nobody waits for it when the lane is gone.
            let _ = job.answer.send(read.map(|()| job.buffer));
        };
        let workers =
            Workers::start(spawner, work).map_err(|source| FileFailure::Read { path: saved.path.clone(), source })?;
        Ok(Self { saved, workers, progress, stopped: AtomicBool::new(false) })
    }

    /// Bytes read so far.
    pub(crate) fn progress(&self) -> u64 {
        self.progress.load(Ordering::Relaxed)
    }

    /// Lanes wait for nothing any more.
    pub(crate) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// The file.
    pub(crate) fn saved(&self) -> &Saved {
        &self.saved
    }
}

/// What one lane carried, from the beginning.
pub(crate) struct LaneReader {
    reading: Arc<Reading>,
    lane: u16,
    /// Where in the table to look for the lane's next extent.
    next: usize,
    ahead: VecDeque<Receiver<Answer>>,
    /// The extent whose turn it is, and how much of it has been given out.
    current: Option<(Buffer, usize)>,
    spare: Vec<Buffer>,
}

impl LaneReader {
    /// Reads a lane by its number in the file.
    pub(crate) fn new(reading: Arc<Reading>, lane: u16) -> Self {
        Self { reading, lane, next: 0, ahead: VecDeque::new(), current: None, spare: Vec::new() }
    }

    /// The next frame as it was sent; `false` when there is none.
    pub(crate) fn frame(&mut self, frame: &mut FrameBuffer) -> Result<bool, FileFailure> {
        let invalid = |reader: &Self, error: std::io::Error| reader.reading.saved.invalid(error);
        let header = frame.prepare(HEADER_LEN).map_err(|error| invalid(self, error))?;
        match self.fill(header)? {
            0 => return Ok(false),
            HEADER_LEN => {}
            _ => return Err(self.ends_within_a_frame()),
        }
        let len = frame.announced_body().map_err(|error| invalid(self, error))?;
        let body = frame.extend(len).map_err(|error| invalid(self, error))?;
        if self.fill(body)? < len { Err(self.ends_within_a_frame()) } else { Ok(true) }
    }

    fn ends_within_a_frame(&self) -> FileFailure {
        self.reading.saved.invalid(format!("lane {} ends within a frame", self.lane))
    }

    /// Fills as much as there is.
    fn fill(&mut self, into: &mut [u8]) -> Result<usize, FileFailure> {
        let mut filled = 0;
        while filled < into.len() {
            let (buffer, at) = match self.current.take() {
                Some(current) => current,
                None => match self.next_extent()? {
                    Some(buffer) => (buffer, 0),
                    None => break,
                },
            };
            let rest = buffer.filled().get(at..).unwrap_or_default();
            let len = rest.len().min(into.len() - filled);
            into[filled..filled + len].copy_from_slice(&rest[..len]);
            filled += len;
            if len < rest.len() {
                self.current = Some((buffer, at + len));
            } else {
                self.spare.push(buffer);
            }
        }
        Ok(filled)
    }

    fn next_extent(&mut self) -> Result<Option<Buffer>, FileFailure> {
        self.read_ahead()?;
        let Some(answer) = self.ahead.pop_front() else { return Ok(None) };
        let saved = &self.reading.saved;
        loop {
            match answer.recv_timeout(LOOK) {
                Ok(answer) => return answer.map(Some),
                Err(RecvTimeoutError::Timeout) if !self.reading.stopped.load(Ordering::Acquire) => {}
                Err(_) => return Err(FileFailure::Cancelled { path: saved.path.clone() }),
            }
        }
    }

    fn read_ahead(&mut self) -> Result<(), FileFailure> {
        let saved = &self.reading.saved;
        // The disk is kept busy by one lane alone, or by many together.
        let depth = if saved.header.data_lanes < 2 { 4 } else { 2 };
        while self.ahead.len() < depth {
            let rest = saved.extents.get(self.next..).unwrap_or_default();
            let Some(skipped) = rest.iter().position(|extent| extent.lane == self.lane) else {
                self.next = saved.extents.len();
                break;
            };
            let index = self.next + skipped;
            self.next = index + 1;
            let buffer = match self.spare.pop() {
                Some(buffer) => buffer,
                None => Buffer::new(extent_len(saved.header.data_lanes))
                    .map_err(|source| FileFailure::Read { path: saved.path.clone(), source })?,
            };
            let (answer, inbox) = bounded(1);
            self.reading.workers.give(Job { index, buffer, answer });
            self.ahead.push_back(inbox);
        }
        Ok(())
    }
}
