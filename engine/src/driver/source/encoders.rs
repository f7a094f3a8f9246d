//! The encoder threads: a rayon pool between the planner and the lanes.
//!
//! Where the link is as fast as memory there is nothing to do for them but to move every page from one core
//! to another. A lane then encodes what it sends itself, while it is in its core's cache.
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

/// What a lane is given to send.
pub(in crate::driver) enum Parcel {
    Encoded(Box<EncodedBatch>),
    /// To be encoded by the lane. The buffer is only the permission to have a batch at work.
    Plain(Batch, Box<EncodedBatch>, Arc<Work>),
}

/// The channels of batches, and who decides how they are encoded.
pub(super) struct Pipeline {
    pub(super) free: (Sender<Box<EncodedBatch>>, Receiver<Box<EncodedBatch>>),
    pub(super) ready: (Sender<Parcel>, Receiver<Parcel>),
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

/// What those work with who encode.
pub(in crate::driver) struct Work {
    /// One per encoder thread, so that no lock is ever waited for.
    encoders: Vec<Mutex<Encoder>>,
    parts: EncoderParts,
    chooser: Arc<LevelChooser>,
    free: Sender<Box<EncodedBatch>>,
    ready: Sender<Parcel>,
}

/// What an encoder is made from, and where it tells of what it did.
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
        let work = Work {
            encoders: (0..count).map(|_| Mutex::new(parts.encoder())).collect(),
            parts,
            chooser: Arc::clone(&pipeline.chooser),
            free: pipeline.free.0.clone(),
            ready: pipeline.ready.0.clone(),
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

    /// Has a batch encoded into a free buffer, or by a lane; the end comes as an event.
    pub(super) fn encode(&self, batch: Batch, buffer: Box<EncodedBatch>) {
        let work = Arc::clone(&self.work);
        if work.chooser.leaves_it_to_lanes() {
            let ready = work.ready.clone();
            // There is room for all buffers.
            let _ = ready.send(Parcel::Plain(batch, buffer, work));
            return;
        }
        self.pool.spawn_fifo(move || {
            let encoded = catch_unwind(AssertUnwindSafe(|| work.encode_in_pool(&batch, buffer)));
            let event = match encoded {
                Ok(Ok(encoded)) => SourceEvent::Encoded(encoded),
                Ok(Err(error)) => SourceEvent::EncodingFailed(error.into()),
                Err(_) => SourceEvent::Panicked(ThreadRole::Encoder(0)),
            };
            // Nobody hears it when the migration is over.
            let _ = work.parts.events.send(event);
        });
    }
}

impl EncoderParts {
    fn encoder(&self) -> Encoder {
        Encoder::new(Arc::clone(&self.memory), self.hasher.clone(), Arc::clone(&self.shared)).timed()
    }
}

impl Work {
    /// An encoder for a lane.
    pub(in crate::driver) fn encoder(&self) -> Encoder {
        self.parts.encoder()
    }

    /// Encodes a batch, as hard as it pays, and learns from it.
    pub(in crate::driver) fn encode(
        &self,
        encoder: &mut Encoder,
        batch: &Batch,
        buffer: &mut EncodedBatch,
    ) -> Result<Encoded, MemoryError> {
        let choice = self.chooser.choose(batch.urgent);
        encoder.encode(batch, choice, buffer)?;
        let mut tally = *buffer.tally();
        let (raw, packed) = buffer.payload_bytes();
        self.chooser.encoded(choice.level, raw, packed, tally.stages.scan_time, tally.stages.pack_time);
        if let Some(level) = choice.trial {
            let began = Instant::now();
            if let Some(tried) = encoder.try_level(level, buffer) {
                let trial = Trial { level, packed: tried, time: began.elapsed() };
                self.chooser.tried(choice.level, raw, packed, trial);
                tally.stages.pack_time += trial.time;
            }
        }
        if buffer.is_empty() {
            // Nothing of it reaches a lane, where the others are counted.
            Counters::add(&self.parts.counters.pages, tally.pages);
        }
        Ok(Encoded { tally, deferred: buffer.deferred().to_vec() })
    }

    fn encode_in_pool(&self, batch: &Batch, mut buffer: Box<EncodedBatch>) -> Result<Encoded, MemoryError> {
        if self.parts.over.load(Ordering::Relaxed) {
            return Ok(Encoded::default());
        }
        let index = rayon::current_thread_index().unwrap_or_default();
        let Some(encoder) = self.encoders.get(index) else {
            return Err(MemoryError::Unsupported("more encoder threads than were started"));
        };
        let mut encoder = encoder.lock().unwrap_or_else(PoisonError::into_inner);
        let encoded = self.encode(&mut encoder, batch, &mut buffer)?;
        if buffer.is_empty() {
            let _ = self.free.send(buffer);
        } else {
            // Before the event: who hears that all is encoded finds it there.
            let _ = self.ready.send(Parcel::Encoded(buffer));
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
