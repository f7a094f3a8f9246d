//! The full verification: all memory hashed once more, on all cores, while the guest stands still.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, bounded};

use super::{Counters, Lent};
use crate::digest::{Digest, PageHasher};
use crate::encode::{digest_runs, populated_runs};
use crate::error::Error;
use crate::host::{Joiner, ThreadRole};
use crate::memory::{GuestMemory, MemoryError, PageReader};
use crate::units::PAGE_SIZE;

/// Pages that a thread takes at a time.
const STRIDE: u64 = 4096;

/// Hashes all memory on threads of its own, and hands the digest to `done` on one of them, unless
/// `stop` is set meanwhile. Returns the threads.
pub(super) fn start(
    lent: &Lent,
    memory: &Arc<dyn GuestMemory>,
    hasher: &PageHasher,
    counters: &Arc<Counters>,
    stop: &Arc<AtomicBool>,
    done: impl FnOnce(Result<Digest, MemoryError>) + Send + 'static,
) -> Result<Vec<Box<dyn Joiner>>, Error> {
    let mut threads = Vec::new();
    let parts = start_parts(lent, memory, hasher, counters, stop, &mut threads)?;
    threads.push(lent.spawn(ThreadRole::Verifier(u16::MAX), move || done(collect(&parts)))?);
    Ok(threads)
}

/// Each thread sends its part of the digest. The receiver closes when all are done.
fn start_parts(
    lent: &Lent,
    memory: &Arc<dyn GuestMemory>,
    hasher: &PageHasher,
    counters: &Arc<Counters>,
    stop: &Arc<AtomicBool>,
    started: &mut Vec<Box<dyn Joiner>>,
) -> Result<Receiver<Result<Digest, MemoryError>>, Error> {
    let runs = Arc::new(populated_runs(&**memory, STRIDE));
    let next = Arc::new(AtomicUsize::new(0));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(runs.len().max(1));
    let (sender, receiver) = bounded(threads);
    for index in 0..threads {
        let (runs, next, sender) = (Arc::clone(&runs), Arc::clone(&next), sender.clone());
        let (memory, hasher, counters) = (Arc::clone(memory), hasher.clone(), Arc::clone(counters));
        let stop = Arc::clone(stop);
        let work = move || {
            let reader = PageReader::new(memory);
            let mut digest = Digest::default();
            while let Some(run) = runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    // The migration is over; nobody hears the result.
                    return;
                }
                match digest_runs(&reader, &hasher, &[*run]) {
                    Ok(part) => digest = digest.plus(part),
                    Err(error) => {
                        let _ = sender.send(Err(error));
                        return;
                    }
                }
                Counters::add(&counters.progress, run.count * PAGE_SIZE as u64);
            }
            let _ = sender.send(Ok(digest));
        };
        started.push(lent.spawn(ThreadRole::Verifier(index as u16), work)?);
    }
    Ok(receiver)
}

/// Waits for all parts.
fn collect(parts: &Receiver<Result<Digest, MemoryError>>) -> Result<Digest, MemoryError> {
    parts.iter().try_fold(Digest::default(), |sum, part| Ok(sum.plus(part?)))
}
