//! A file that is read and written in whole blocks, past the page cache where its filesystem allows that.
//!
//! A guest's memory is read and written once: in the cache it would only push out what others use. Where direct I/O is refused
//! (some network and memory filesystems) the cache is used and told to let go.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{Advice, FallocateFlags, OFlags, fadvise, fallocate, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;

/// How much room is asked for at a time. Writing into room that is there needs no lock on the file's length, so that several
/// writes go on at once.
const ROOM_STEP: u64 = 256 << 20;

/// A file, for aligned buffers at aligned places.
#[derive(Debug)]
pub(crate) struct Device {
    file: File,
    direct: AtomicBool,
    /// Up to where the filesystem has promised room; `u64::MAX` when it promises none.
    room: AtomicU64,
}

impl Device {
    /// Takes an open file; with `direct`, tries to go past the cache.
    pub(crate) fn new(file: File, direct: bool) -> Self {
        let direct = direct && fcntl_getfl(&file).and_then(|flags| fcntl_setfl(&file, flags | OFlags::DIRECT)).is_ok();
        Self { file, direct: AtomicBool::new(direct), room: AtomicU64::new(0) }
    }

    /// Whether the cache is gone past, as far as is known.
    pub(crate) fn is_direct(&self) -> bool {
        self.direct.load(Ordering::Relaxed)
    }

    /// Writes whole blocks.
    pub(crate) fn write_at(&self, blocks: &[u8], offset: u64) -> io::Result<()> {
        self.make_room(offset + blocks.len() as u64);
        self.retry_buffered(|| self.file.write_all_at(blocks, offset))?;
        if !self.is_direct() {
            self.let_go(offset, blocks.len() as u64);
        }
        Ok(())
    }

    /// Reads whole blocks, all of them.
    pub(crate) fn read_at(&self, blocks: &mut [u8], offset: u64) -> io::Result<()> {
        self.retry_buffered(|| self.file.read_exact_at(blocks, offset))?;
        if !self.is_direct() {
            self.let_go(offset, blocks.len() as u64);
        }
        Ok(())
    }

    /// Ends the file here, and waits until everything is where it outlives a crash of the host.
    pub(crate) fn end_at(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)?;
        self.sync()
    }

    /// Waits until everything is where it outlives a crash of the host.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Has the cache forget a part of the file, once it is written.
    pub(crate) fn let_go(&self, offset: u64, len: u64) {
        // Only advice.
        let _ = fadvise(&self.file, offset, std::num::NonZeroU64::new(len), Advice::DontNeed);
    }

    fn make_room(&self, end: u64) {
        let room = self.room.load(Ordering::Relaxed);
        if end <= room {
            return;
        }
        let wanted = end.next_multiple_of(ROOM_STEP);
        // Two threads may ask for the same: no harm. Who gets no promise finds out by writing whether there is room.
        let promised = fallocate(&self.file, FallocateFlags::empty(), room, wanted - room).is_ok();
        self.room.fetch_max(if promised { wanted } else { u64::MAX }, Ordering::Relaxed);
    }

    /// Some filesystems take the flag and refuse the first read or write.
    fn retry_buffered(&self, mut attempt: impl FnMut() -> io::Result<()>) -> io::Result<()> {
        match attempt() {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::INVAL) && self.is_direct() => {
                let flags = fcntl_getfl(&self.file)?;
                fcntl_setfl(&self.file, flags - OFlags::DIRECT)?;
                self.direct.store(false, Ordering::Relaxed);
                attempt()
            }
            result => result,
        }
    }
}
