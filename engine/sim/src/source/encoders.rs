//! The encoder threads: each takes a batch, reads memory a while later, and hands it on another while
//! later, so that batches reach the lanes in an order that the seed decides. Where the memory can be
//! interrupted, one thread encodes its batch in the middle of another's.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageferry::batch::{Batch, Phase};
use pageferry::config::{Compress, EncodeConfig};
use pageferry::digest::{HashTable, PageHasher};
use pageferry::encode::{Choice, EncodedBatch, Encoder, Level, Shared};
use pageferry::memory::{GuestMemory, MemoryError};
use pageferry::units::PAGE_SIZE;

use super::{Heard, SourceHost};
use crate::clock::{Event, HostId};
use crate::random::Random;
use crate::scenario::{Canary, EncoderPlan};
use crate::vm::Interruption;
use crate::world::Context;

/// Time to encode one page, at least.
const PAGE_TIME: Duration = Duration::from_micros(1);

/// A batch on its way through an encoder.
struct Job {
    batch: Batch,
    choice: Choice,
    buffer: EncodedBatch,
    result: Result<(), MemoryError>,
}

/// Where a thread is with its batch.
#[derive(Default)]
enum Work {
    #[default]
    None,
    /// Taken, and not read yet.
    Taken(Box<Job>),
    Encoded(Box<Job>),
}

/// An encoder thread. What it works with is shared with whoever interrupts another for it.
struct Thread {
    encoder: Arc<Mutex<Encoder>>,
    work: Arc<Mutex<Work>>,
}

/// What the threads are made of.
pub(super) struct EncoderParts {
    pub(super) host: HostId,
    pub(super) memory: Arc<dyn GuestMemory>,
    pub(super) interruption: Option<Interruption>,
    pub(super) hasher: PageHasher,
    pub(super) table: Arc<HashTable>,
    pub(super) pages: u64,
    pub(super) config: EncodeConfig,
    pub(super) plan: EncoderPlan,
    pub(super) random: Random,
    pub(super) copies_unchecked: bool,
    /// Pages can be written straight into the destination's memory.
    pub(super) direct: bool,
}

/// The encoder threads of a source.
pub(crate) struct Encoders {
    pub(super) shared: Arc<Shared>,
    host: HostId,
    threads: Vec<Thread>,
    queue: VecDeque<(Batch, EncodedBatch)>,
    interruption: Option<Interruption>,
    compress: Compress,
    plan: EncoderPlan,
    random: Random,
    /// The canary.
    copies_unchecked: bool,
    direct: bool,
}

impl Encoders {
    pub(super) fn new(parts: EncoderParts) -> Self {
        let shared = Arc::new(Shared::new(parts.table, parts.pages, &parts.config));
        let thread = |_| {
            let encoder = Encoder::new(Arc::clone(&parts.memory), parts.hasher.clone(), Arc::clone(&shared));
            Thread { encoder: Arc::new(Mutex::new(encoder)), work: Arc::default() }
        };
        // A batch holds locks of the cache while it is read: an interruption would wait for ever.
        let interruption = parts.interruption.filter(|_| parts.config.delta_cache == 0);
        Self {
            host: parts.host,
            threads: (0..parts.config.threads.max(1)).map(thread).collect(),
            queue: VecDeque::new(),
            interruption,
            compress: parts.config.compress,
            plan: parts.plan,
            random: parts.random,
            copies_unchecked: parts.copies_unchecked,
            direct: parts.direct,
            shared,
        }
    }

    fn add(&mut self, ctx: &mut Context, batch: Batch, buffer: EncodedBatch) {
        self.queue.push_back((batch, buffer));
        if let Some(index) = self.threads.iter().position(Thread::is_idle) {
            self.begin_next(ctx, index);
        }
    }

    fn begin_next(&mut self, ctx: &mut Context, index: usize) {
        let Some((mut batch, buffer)) = self.queue.pop_front() else { return };
        if let (true, Phase::Copies(deferred)) = (self.copies_unchecked, &mut batch.phase) {
            *deferred = Arc::default();
        }
        let choice = self.choose(batch.urgent);
        let job = Job { batch, choice, buffer, result: Ok(()) };
        *lock(&self.threads[index].work) = Work::Taken(Box::new(job));
        self.go_on_later(ctx, index, Duration::ZERO);
    }

    fn go_on_later(&mut self, ctx: &mut Context, index: usize, least: Duration) {
        let more = Duration::from_nanos(self.random.below(self.plan.longest.as_nanos() as u64 + 1));
        ctx.clock.after(least + more, Event::Encoder(self.host, index));
    }

    /// A thread goes on: reads its batch and encodes it, or has done so and hands it over.
    fn go_on(&mut self, ctx: &mut Context, index: usize) -> Option<Box<Job>> {
        let work = std::mem::take(&mut *lock(&self.threads[index].work));
        match work {
            Work::None => None,
            Work::Encoded(job) => Some(job),
            Work::Taken(mut job) => {
                self.interrupt(index, &job.batch);
                lock(&self.threads[index].encoder).encode_job(&mut job);
                if let Some(interruption) = &self.interruption {
                    interruption.end();
                }
                let least = PAGE_TIME * job.batch.pages as u32;
                *lock(&self.threads[index].work) = Work::Encoded(job);
                self.go_on_later(ctx, index, least);
                None
            }
        }
    }

    /// Lets another thread's batch be encoded in the middle of this one.
    fn interrupt(&mut self, index: usize, batch: &Batch) {
        let Some(interruption) = &self.interruption else { return };
        let waits = |other: &usize| *other != index && matches!(*lock(&self.threads[*other].work), Work::Taken(_));
        let Some(other) = (0..self.threads.len()).find(waits) else { return };
        if batch.pages == 0 || !self.random.chance(70) {
            return;
        }
        let thread = &self.threads[other];
        let (encoder, work) = (Arc::clone(&thread.encoder), Arc::clone(&thread.work));
        interruption.begin(self.random.below(batch.pages), move || {
            let taken = std::mem::take(&mut *lock(&work));
            *lock(&work) = match taken {
                Work::Taken(mut job) => {
                    lock(&encoder).encode_job(&mut job);
                    Work::Encoded(job)
                }
                other => other,
            };
        });
    }

    /// No clock here: the level is a matter of chance, as are trials of another.
    fn choose(&mut self, urgent: bool) -> Choice {
        let any = |random: &mut Random| match random.below(20) {
            0..=7 => Level::Raw,
            8..=13 => Level::Zstd(-5),
            14..=17 => Level::Zstd(1),
            18 => Level::Zstd(3),
            _ => Level::Zstd(7),
        };
        let level = match self.compress {
            Compress::Off => Level::Raw,
            Compress::Level(level) => Level::Zstd(level),
            Compress::Auto => any(&mut self.random),
        };
        let trial = self.random.chance(5).then(|| any(&mut self.random));
        let direct = self.direct && level == Level::Raw && !urgent && trial.is_none();
        Choice { level, admits: self.random.chance(70), seeks: self.random.chance(90), direct, trial }
    }
}

trait EncodeJob {
    fn encode_job(&mut self, job: &mut Job);
}

impl EncodeJob for Encoder {
    fn encode_job(&mut self, job: &mut Job) {
        job.result = self.encode(&job.batch, job.choice, &mut job.buffer);
        if let Some(level) = job.choice.trial {
            // What it brings does not matter; that it leaves the batch alone does.
            let _ = self.try_level(level, &job.buffer);
        }
    }
}

impl Thread {
    fn is_idle(&self) -> bool {
        matches!(*lock(&self.work), Work::None)
    }
}

impl SourceHost {
    pub(super) fn start_encoders(&mut self, pages: u64) {
        self.encoders = Some(Encoders::new(EncoderParts {
            host: self.id,
            memory: Arc::clone(&self.memory),
            interruption: self.interruption.clone(),
            hasher: self.hasher.clone(),
            table: Arc::clone(&self.table),
            pages,
            config: self.encode.clone(),
            plan: self.encoder_plan,
            random: self.random.fork(50),
            copies_unchecked: self.canary == Some(Canary::CopiesUnchecked),
            direct: self.shared.direct.is_some(),
        }));
    }

    /// There is a buffer for the planned batch.
    pub(super) fn encode_planned(&mut self, ctx: &mut Context) {
        let Some(encoders) = &mut self.encoders else { return };
        let Some(batch) = self.planned.take() else { return };
        let Some(buffer) = self.shared.free.pop() else { return };
        self.encoding += 1;
        encoders.add(ctx, batch, buffer);
    }

    pub(crate) fn on_encoder(&mut self, ctx: &mut Context, index: usize) {
        let Some(encoders) = &mut self.encoders else { return };
        let Some(job) = encoders.go_on(ctx, index) else { return };
        encoders.begin_next(ctx, index);
        let Job { batch, buffer, result, .. } = *job;
        if let Err(error) = result {
            return self.hear(ctx, Heard::EncodingFailed(error.into()));
        }
        let tally = *buffer.tally();
        self.codings.add(&tally.stages, matches!(batch.phase, Phase::Copies(_)));
        self.codings.written += buffer.written_bytes() / PAGE_SIZE as u64;
        let deferred = buffer.deferred().to_vec();
        if buffer.is_empty() {
            self.shared.free.push(buffer);
        } else {
            self.shared.ready.push_back(buffer);
            self.wake_senders(ctx);
        }
        self.hear(ctx, Heard::Encoded(tally, deferred));
    }

    /// Whoever waits for a buffer learns that there is one.
    pub(super) fn see_free_buffer(&mut self, ctx: &mut Context) {
        if self.planned.is_some() && !self.shared.free.is_empty() {
            self.turn_soon(ctx);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
