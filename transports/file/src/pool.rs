//! Buffers for direct I/O, and the threads that read and write them.

use std::io;
use std::sync::{Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use memmap2::MmapMut;
use pageferry::host::{Joiner, Spawner, ThreadRole};

use crate::format::{BLOCK, padded};

/// Threads that wait for the disk: as many requests are under way at once.
pub(crate) const WORKERS: u16 = 4;

/// Bytes at an address that direct I/O takes, of a fixed capacity. Huge pages where the host gives them: the kernel looks at
/// every page of a request.
#[derive(Debug)]
pub(crate) struct Buffer {
    bytes: MmapMut,
    len: usize,
}

impl Buffer {
    /// An empty buffer of so many bytes, rounded up to whole blocks.
    pub(crate) fn new(capacity: usize) -> io::Result<Self> {
        let bytes = MmapMut::map_anon(padded(capacity).max(BLOCK))?;
        // Refused where transparent huge pages are compiled out; small pages work as well.
        let _ = bytes.advise(memmap2::Advice::HugePage);
        Ok(Self { bytes, len: 0 })
    }

    /// What has been put in.
    pub(crate) fn filled(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Bytes put in.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Puts in as much as fits; returns the rest.
    pub(crate) fn take<'a>(&mut self, bytes: &'a [u8]) -> &'a [u8] {
        let (fits, rest) = bytes.split_at(bytes.len().min(self.bytes.len() - self.len));
        self.bytes[self.len..][..fits.len()].copy_from_slice(fits);
        self.len += fits.len();
        rest
    }

    /// Whether nothing more fits.
    pub(crate) fn is_full(&self) -> bool {
        self.len == self.bytes.len()
    }

    /// The content in whole blocks, the last filled up with zeros.
    pub(crate) fn blocks(&mut self) -> &[u8] {
        let end = padded(self.len);
        self.bytes[self.len..end].fill(0);
        &self.bytes[..end]
    }

    /// Room for `len` bytes in whole blocks, to be read into; they are the content afterwards.
    pub(crate) fn room(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(self.bytes.len());
        &mut self.bytes[..padded(self.len)]
    }

    /// Empties it.
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }
}

/// Threads that do one thing with each job they get, until the pool is dropped.
pub(crate) struct Workers<J> {
    jobs: Option<Sender<J>>,
    threads: Mutex<Vec<Box<dyn Joiner>>>,
}

impl<J: Send + 'static> Workers<J> {
    /// Starts the threads, which the host lends.
    pub(crate) fn start(spawner: &dyn Spawner, work: impl Fn(J) + Clone + Send + 'static) -> io::Result<Self> {
        let (jobs, inbox): (Sender<J>, Receiver<J>) = unbounded();
        let pool = Self { jobs: Some(jobs), threads: Mutex::default() };
        for index in 0..WORKERS {
            let (inbox, work) = (inbox.clone(), work.clone());
            let run = move || inbox.iter().for_each(work);
            let thread = spawner.spawn(ThreadRole::File(index), Box::new(run))?;
            pool.threads.lock().unwrap_or_else(PoisonError::into_inner).push(thread);
        }
        Ok(pool)
    }

    /// Hands over a job. There are never more than there are buffers.
    pub(crate) fn give(&self, job: J) {
        if let Some(jobs) = &self.jobs {
            // The threads end when this is dropped, and not before.
            let _ = jobs.send(job);
        }
    }
}

impl<J> Drop for Workers<J> {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            thread.join();
        }
    }
}

/// A fixed number of buffers, made when they are first wanted.
pub(crate) struct Pool {
    free: (Sender<Option<Buffer>>, Receiver<Option<Buffer>>),
    capacity: usize,
}

impl Pool {
    /// So many buffers of so many bytes.
    pub(crate) fn new(count: usize, capacity: usize) -> Self {
        let free = bounded(count);
        for _ in 0..count {
            // There is room for all.
            let _ = free.0.send(None);
        }
        Self { free, capacity }
    }

    /// An empty buffer, if one becomes free within the time.
    pub(crate) fn take(&self, timeout: std::time::Duration) -> io::Result<Option<Buffer>> {
        match self.free.1.recv_timeout(timeout) {
            Ok(Some(mut buffer)) => {
                buffer.clear();
                Ok(Some(buffer))
            }
            Ok(None) => Buffer::new(self.capacity).map(Some),
            Err(_) => Ok(None),
        }
    }

    /// Gives a buffer back.
    pub(crate) fn give_back(&self, buffer: Buffer) {
        let _ = self.free.0.send(Some(buffer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_aligned_and_filled_up_with_zeros() {
        let mut buffer = Buffer::new(10_000).unwrap();
        assert!(buffer.take(&[7; 5000]).is_empty());
        let blocks = buffer.blocks();
        assert_eq!((blocks.as_ptr().align_offset(BLOCK), blocks.len()), (0, 8192));
        assert!(blocks[..5000].iter().all(|&byte| byte == 7) && blocks[5000..].iter().all(|&byte| byte == 0));
        assert_eq!(buffer.take(&[8; 10_000]).len(), 10_000 - (12_288 - 5000));
        assert!(buffer.is_full());
        buffer.clear();
        assert!(buffer.filled().is_empty() && buffer.blocks().is_empty());
        // What an earlier use left behind is not written.
        buffer.take(&[1]);
        assert!(buffer.blocks()[1..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn there_are_no_more_buffers_than_were_promised() {
        let pool = Pool::new(2, BLOCK);
        let take = || pool.take(std::time::Duration::ZERO).unwrap();
        let (first, second) = (take(), take());
        assert!(first.is_some() && second.is_some() && take().is_none());
        pool.give_back(first.unwrap());
        assert!(take().is_some());
    }
}
