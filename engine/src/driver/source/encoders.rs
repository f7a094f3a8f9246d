//! The encoder threads: a rayon pool between the planner and the lanes.
//!
//! Batches travel in buffers of a fixed number. The planner waits for a free one, an encoder fills it, a
//! lane sends it and gives it back: so memory is bounded, and a slow link holds up the planning (R2: a
//! page is armed shortly before it is read) without a further queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use rayon::{ThreadPool, ThreadPoolBuilder};

use super::super::{Counters, Lent};
use super::{Encoded, SourceEvent};
use crate::batch::Batch;
use crate::config::SourceConfig;
use crate::digest::PageHasher;
use crate::encode::{EncodedBatch, Encoder, LevelChooser, Shared, Trial};
use crate::error::Error;
use crate::host::{Joiner, ThreadRole};
use crate::limits::{BATCHES_PER_ENCODER, BATCHES_PER_LANE, MAX_BATCHES, MAX_ENCODERS};
use crate::memory::{GuestMemory, MemoryError};

type Batches = (Sender<Box<EncodedBatch>>, Receiver<Box<EncodedBatch>>);

/// The channels of batches, and who decides how they are encoded.
pub(super) struct Pipeline {
    pub(super) free: Batches,
    pub(super) ready: Batches,
    pub(super) chooser: Arc<LevelChooser>,
}

impl Pipeline {
    pub(super) fn new(config: &SourceConfig) -> Self {
        let (encoders, lanes) = (encoder_threads(config), config.lanes.max(1));
        let count = usize::from(encoders) * BATCHES_PER_ENCODER + usize::from(lanes) * BATCHES_PER_LANE;
        let count = count.min(MAX_BATCHES);
        let free = bounded(count);
        for _ in 0..count {
            // There is room.
            let _ = free.0.send(Box::default());
        }
        let chooser = Arc::new(LevelChooser::new(config.encode.compress, encoders, lanes));
        Self { free, ready: bounded(count), chooser }
    }
}

fn encoder_threads(config: &SourceConfig) -> u16 {
    config.encode.threads.clamp(1, MAX_ENCODERS)
}

/// The encoder threads.
pub(super) struct Encoders {
    pool: ThreadPool,
    work: Arc<Work>,
}

/// What the encoder threads work with.
struct Work {
    /// One per thread, so that no lock is ever waited for.
    encoders: Vec<Mutex<Encoder>>,
    chooser: Arc<LevelChooser>,
    free: Sender<Box<EncodedBatch>>,
    ready: Sender<Box<EncodedBatch>>,
    counters: Arc<Counters>,
    events: Sender<SourceEvent>,
    over: Arc<AtomicBool>,
}

/// What an encoder thread is made from.
pub(super) struct EncoderParts {
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) hasher: PageHasher,
    pub(super) shared: Arc<Shared>,
    pub(super) counters: Arc<Counters>,
    pub(super) events: Sender<SourceEvent>,
    pub(super) over: Arc<AtomicBool>,
}

impl Encoders {
    /// Starts the threads, which the host lends; they end when this is dropped.
    pub(super) fn start(
        config: &SourceConfig,
        lent: &Lent,
        pipeline: &Pipeline,
        parts: EncoderParts,
    ) -> Result<(Self, Vec<Box<dyn Joiner>>), Error> {
        let count = encoder_threads(config);
        let encoder = || {
            let encoder = Encoder::new(Arc::clone(&parts.memory), parts.hasher.clone(), Arc::clone(&parts.shared));
            Mutex::new(encoder.timed())
        };
        let work = Work {
            encoders: (0..count).map(|_| encoder()).collect(),
            chooser: Arc::clone(&pipeline.chooser),
            free: pipeline.free.0.clone(),
            ready: pipeline.ready.0.clone(),
            counters: parts.counters,
            events: parts.events,
            over: parts.over,
        };
        let mut threads: Vec<Box<dyn Joiner>> = Vec::new();
        let pool = ThreadPoolBuilder::new()
            .num_threads(count.into())
            .spawn_handler(|thread| {
                let role = ThreadRole::Encoder(thread.index() as u16);
                threads.push(lent.spawner.spawn(role, Box::new(|| thread.run()))?);
                Ok(())
            })
            .build();
        match pool {
            Ok(pool) => Ok((Self { pool, work: Arc::new(work) }, threads)),
            Err(error) => {
                for thread in threads {
                    thread.join();
                }
                Err(Error::Host { what: "an encoder thread", source: std::io::Error::other(error) })
            }
        }
    }

    /// Has a batch encoded into a free buffer; the end comes as an event.
    pub(super) fn encode(&self, batch: Batch, buffer: Box<EncodedBatch>) {
        let work = Arc::clone(&self.work);
        self.pool.spawn_fifo(move || {
            let encoded = catch_unwind(AssertUnwindSafe(|| work.encode(&batch, buffer)));
            let event = match encoded {
                Ok(Ok(encoded)) => SourceEvent::Encoded(encoded),
                Ok(Err(error)) => SourceEvent::EncodingFailed(error.into()),
                Err(_) => SourceEvent::Panicked(ThreadRole::Encoder(0)),
            };
            // Nobody hears it when the migration is over.
            let _ = work.events.send(event);
        });
    }
}

impl Work {
    fn encode(&self, batch: &Batch, mut buffer: Box<EncodedBatch>) -> Result<Encoded, MemoryError> {
        if self.over.load(Ordering::Relaxed) {
            return Ok(Encoded::default());
        }
        let index = rayon::current_thread_index().unwrap_or_default();
        let Some(encoder) = self.encoders.get(index) else {
            return Err(MemoryError::Unsupported("more encoder threads than were started"));
        };
        let mut encoder = encoder.lock().unwrap_or_else(PoisonError::into_inner);
        let choice = self.chooser.choose();
        encoder.encode(batch, choice, &mut buffer)?;
        let mut tally = *buffer.tally();
        let (raw, packed) = buffer.payload_bytes();
        self.chooser.encoded(choice.level, raw, packed, tally.stages.scan_time, tally.stages.pack_time);
        if let Some(level) = choice.trial.filter(|_| !batch.urgent) {
            let began = Instant::now();
            if let Some(tried) = encoder.try_level(level, &buffer) {
                let trial = Trial { level, packed: tried, time: began.elapsed() };
                self.chooser.tried(choice.level, raw, packed, trial);
                tally.stages.pack_time += trial.time;
            }
        }
        let encoded = Encoded { tally, deferred: buffer.deferred().to_vec() };
        if buffer.is_empty() {
            Counters::add(&self.counters.pages, tally.pages);
            let _ = self.free.send(buffer);
        } else {
            // Before the event: who hears that all is encoded finds it there.
            let _ = self.ready.send(buffer);
        }
        Ok(encoded)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;
    use crate::digest::{DigestKey, HashTable};
    use crate::host::{Spawner, StdSpawner};
    use crate::memory::{Backing, Layout, MappedMemory, Region};

    /// Has no more than two threads to lend.
    #[derive(Default)]
    struct Miser {
        lent: AtomicUsize,
        ended: Arc<AtomicUsize>,
    }

    impl Spawner for Miser {
        fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> std::io::Result<Box<dyn Joiner>> {
            if self.lent.fetch_add(1, Ordering::SeqCst) == 2 {
                return Err(std::io::ErrorKind::WouldBlock.into());
            }
            let ended = Arc::clone(&self.ended);
            let work = move || {
                work();
                std::thread::sleep(Duration::from_millis(20));
                ended.fetch_add(1, Ordering::SeqCst);
            };
            StdSpawner.spawn(role, Box::new(work))
        }
    }

    #[test]
    fn no_thread_is_left_behind_when_there_are_too_few() {
        let layout = Layout::new(vec![Region::ram("a", 0, 4096)]).unwrap();
        let mut config = SourceConfig::default();
        config.encode.threads = 4;
        let miser = Arc::new(Miser::default());
        let lent = Lent { observer: None, spawner: Arc::clone(&miser) as Arc<dyn Spawner> };
        let parts = EncoderParts {
            memory: Arc::new(MappedMemory::new(layout, Backing::Anonymous).unwrap()),
            hasher: PageHasher::new(&DigestKey([1; 32])),
            shared: Arc::new(Shared::plain(Arc::new(HashTable::new(64)))),
            counters: Arc::default(),
            events: bounded(1).0,
            over: Arc::default(),
        };
        assert!(Encoders::start(&config, &lent, &Pipeline::new(&config), parts).is_err());
        assert_eq!(miser.ended.load(Ordering::SeqCst), 2);
    }
}
