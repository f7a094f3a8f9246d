//! The threads that stand for vCPUs, and the check of what they wrote.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ProcessGuestError;
use super::gate::Gate;
use super::heart::{BEAT, Heart, HeartState};
use super::image::{Image, ImageError, Seal};
use super::ram::Ram;
use super::state::State;
use crate::guest::{SelfCheck, Written};
use crate::workload::page::{Mismatch, PAGE_BYTES};
use crate::workload::params::Params;
use crate::workload::sweep::{Pace, Sweep};

/// Steps that no guest reaches: counting on from here cannot overflow.
const MOST_STEPS: u64 = 1 << 62;

const PANICKED: &str = "the check itself has panicked";

/// A guest's threads. Dropping it ends them.
#[derive(Debug)]
pub(super) struct Vcpus {
    work: Arc<Work>,
    threads: Vec<JoinHandle<()>>,
}

/// What all threads share.
#[derive(Debug)]
struct Work {
    ram: Ram,
    params: Params,
    /// What proves memory to be an image; without it, memory is the workload's.
    seal: Option<Seal>,
    /// Why a vCPU could not fill its share of memory.
    failed: Mutex<Option<ImageError>>,
    gate: Gate,
    heart: Heart,
    /// Steps made, one counter for each vCPU.
    steps: Vec<AtomicU64>,
    /// vCPUs that have filled their share of memory.
    filled: AtomicU64,
    started: Instant,
}

impl Vcpus {
    /// A new guest: each vCPU fills its share of memory, then writes. Held until [`release`](Self::release).
    pub(super) fn boot(ram: Ram, params: Params, image: Option<Image>) -> Result<Self, ProcessGuestError> {
        let steps = vec![0; params.vcpus as usize];
        let seal = image.is_some().then(|| Seal::open(params.seed, steps.len()));
        let fill = Filling::Wanted(image);
        Self::start(ram, params, seal, &State { steps, heart: HeartState::default() }, fill)
    }

    /// A guest that arrived: goes on where it was saved. Held until [`release`](Self::release).
    pub(super) fn go_on(
        ram: Ram,
        params: Params,
        seal: Option<Seal>,
        state: &State,
    ) -> Result<Self, ProcessGuestError> {
        if state.steps.len() != params.vcpus as usize {
            let why = format!("{} counters for {} vCPUs", state.steps.len(), params.vcpus);
            return Err(ProcessGuestError::Invalid { what: "machine state", why });
        }
        if state.steps.iter().any(|&steps| steps > MOST_STEPS) {
            let why = "more writes than any guest can have made".to_owned();
            return Err(ProcessGuestError::Invalid { what: "machine state", why });
        }
        Self::start(ram, params, seal, state, Filling::Done)
    }

    fn start(
        ram: Ram,
        params: Params,
        seal: Option<Seal>,
        state: &State,
        filling: Filling,
    ) -> Result<Self, ProcessGuestError> {
        let filled = if matches!(filling, Filling::Done) { params.vcpus.into() } else { 0 };
        let filling = Arc::new(filling);
        let work = Arc::new(Work {
            ram,
            params,
            seal,
            failed: Mutex::new(None),
            gate: Gate::held(params.vcpus as usize),
            heart: Heart::resumed(state.heart),
            steps: state.steps.iter().copied().map(AtomicU64::new).collect(),
            filled: AtomicU64::new(filled),
            started: Instant::now(),
        });
        let mut vcpus = Self { work, threads: Vec::new() };
        for vcpu in 0..params.vcpus {
            let (work, filling) = (Arc::clone(&vcpus.work), Arc::clone(&filling));
            let builder = std::thread::Builder::new().name(format!("vcpu-{vcpu}"));
            let thread = builder.spawn(move || {
                let _leaving = Leaving(&work.gate);
                work.run(vcpu, &filling);
            });
            vcpus.threads.push(thread.map_err(|source| ProcessGuestError::Thread { vcpu, source })?);
        }
        Ok(vcpus)
    }

    /// Stops all threads between two steps.
    pub(super) fn hold(&self) {
        self.work.gate.hold();
    }

    /// Lets them go on.
    pub(super) fn release(&self) {
        self.work.gate.release();
    }

    /// What all threads have written by now.
    pub(super) fn written(&self) -> Written {
        let pages = self.work.steps.iter().map(|steps| steps.load(Ordering::Relaxed)).sum();
        Written { at: Instant::now(), pages }
    }

    pub(super) fn throttle(&self, percent: u8) {
        self.work.gate.throttle(percent);
    }

    pub(super) fn heart(&self) -> &Heart {
        &self.work.heart
    }

    /// How the guest ended, if it did.
    pub(super) fn ended(&self) -> Option<String> {
        self.work.gate.lost_a_thread().then(|| ProcessGuestError::Dead.to_string())
    }

    /// Waits until the guest has filled its memory, or `go_on` says no.
    pub(super) fn wait_ready(&self, go_on: &dyn Fn() -> bool) -> Result<(), ProcessGuestError> {
        while !self.is_ready() {
            if self.work.gate.lost_a_thread() {
                return Err(self.work.failed().take().map_or(ProcessGuestError::Dead, ProcessGuestError::Image));
            }
            if !go_on() {
                return Err(ProcessGuestError::NotAwaited);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Whether all memory is filled.
    fn is_ready(&self) -> bool {
        self.work.filled.load(Ordering::Acquire) == u64::from(self.work.params.vcpus)
    }

    /// What the destination needs to go on; the threads must be held.
    pub(super) fn save(&self) -> State {
        let steps = self.work.steps.iter().map(|steps| steps.load(Ordering::Acquire)).collect();
        State { steps, heart: self.work.heart.save() }
    }

    /// The hashes of the image that memory was filled with, if it was.
    pub(super) fn image_hashes(&self) -> Result<Option<Vec<u128>>, ProcessGuestError> {
        let hashes = |seal: &Seal| seal.shares().ok_or(ProcessGuestError::NotFilled);
        self.work.seal.as_ref().map(hashes).transpose()
    }

    /// Compares every byte of memory with what it must hold; the threads must be held.
    pub(super) fn check(&self) -> SelfCheck {
        if let Some(end) = self.ended() {
            return SelfCheck::Wrong(end);
        }
        match &self.work.seal {
            Some(seal) => self.check_image(seal),
            None => self.check_workload(),
        }
    }

    fn check_image(&self, seal: &Seal) -> SelfCheck {
        let (work, shares) = (&self.work, 0..self.work.params.vcpus);
        let wrong: Option<Vec<_>> = std::thread::scope(|scope| {
            let check = |share| {
                let pages = work.share(share);
                scope.spawn(move || (!seal.holds(share as usize, pages.clone(), &work.ram)).then_some(pages))
            };
            let checkers: Vec<_> = shares.map(check).collect();
            checkers.into_iter().map(|checker| checker.join().ok()).collect()
        });
        match wrong.map(|wrong| wrong.into_iter().flatten().next()) {
            Some(None) => SelfCheck::Ok { pages: work.ram.page_count() },
            Some(Some(Range { start, end })) => {
                SelfCheck::Wrong(format!("pages {start:#x} to {end:#x} do not hold what the memory image held"))
            }
            None => SelfCheck::Wrong(PANICKED.to_owned()),
        }
    }

    fn check_workload(&self) -> SelfCheck {
        match self.wrong_pages() {
            Some(wrong) if wrong.is_empty() => SelfCheck::Ok { pages: self.work.ram.page_count() },
            Some(wrong) => describe(&wrong),
            None => SelfCheck::Wrong(PANICKED.to_owned()),
        }
    }

    /// Every wrong page in order; `None` when the check did not come to its end.
    fn wrong_pages(&self) -> Option<Vec<(u64, Mismatch)>> {
        let generations = self.work.generations();
        std::thread::scope(|scope| {
            let checkers = (0..self.work.params.vcpus).map(|share| {
                let range = self.work.share(share);
                let generations = &generations;
                scope.spawn(move || range.filter_map(|page| self.work.check(page, generations)).collect::<Vec<_>>())
            });
            let checkers: Vec<_> = checkers.collect();
            let results: Vec<_> = checkers.into_iter().map(|checker| checker.join().ok()).collect();
            results.into_iter().collect::<Option<Vec<_>>>().map(|wrong| wrong.concat())
        })
    }
}

fn describe(wrong: &[(u64, Mismatch)]) -> SelfCheck {
    let (page, Mismatch { offset, expected, found }) = &wrong[0];
    let count = wrong.len();
    SelfCheck::Wrong(format!(
        "page {page:#x} at offset {offset}: {found:#018x} instead of {expected:#018x}; {count} wrong pages in all"
    ))
}

/// What a new guest's memory is filled with.
#[derive(Debug)]
enum Filling {
    /// An image, or else the workload's own content.
    Wanted(Option<Image>),
    /// Nothing: the guest came from elsewhere.
    Done,
}

/// Tells the gate when a thread ends, however it does.
struct Leaving<'a>(&'a Gate);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.work.gate.end();
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has ended, which is all that is wanted here.
            let _ = thread.join();
        }
    }
}

impl Work {
    fn run(&self, vcpu: u32, filling: &Filling) {
        if let Filling::Wanted(image) = filling
            && !self.fill(vcpu, image.as_ref())
        {
            return;
        }
        let sweep = self.sweep(vcpu);
        let mut pace = Pace::new(self.params.rate, self.params.vcpus.into(), 1_000_000, self.now());
        while self.gate.pass() {
            if vcpu == 0 {
                self.heart.look();
            }
            if pace.take(self.now()) {
                self.step(vcpu, sweep);
            } else {
                self.gate.rest(BEAT);
            }
        }
    }

    /// The pages that a vCPU fills and checks.
    fn share(&self, vcpu: u32) -> Range<u64> {
        let (pages, vcpu, vcpus) = (self.ram.page_count(), u64::from(vcpu), u64::from(self.params.vcpus));
        pages * vcpu / vcpus..pages * (vcpu + 1) / vcpus
    }

    /// Brings this vCPU's share of memory to generation 0. `false` if the end came first, or the image failed.
    fn fill(&self, vcpu: u32, image: Option<&Image>) -> bool {
        let filled = match (&self.seal, image) {
            (Some(seal), Some(image)) => self.fill_from(image, seal, vcpu),
            _ => self.fill_with_workload(vcpu),
        };
        if !filled {
            return false;
        }
        self.filled.fetch_add(1, Ordering::AcqRel);
        // A page must be filled before it is written, whoever fills it.
        while self.filled.load(Ordering::Acquire) < self.params.vcpus.into() {
            if !self.gate.pass() {
                return false;
            }
            self.gate.rest(BEAT);
        }
        true
    }

    fn fill_with_workload(&self, vcpu: u32) -> bool {
        let content = self.params.content();
        for page in self.share(vcpu) {
            if !self.gate.pass() {
                return false;
            }
            content.fill(page, self.ram.page(page));
        }
        true
    }

    fn fill_from(&self, image: &Image, seal: &Seal, vcpu: u32) -> bool {
        let from = (image, self.params.touch_zero);
        let filled = seal.fill(vcpu as usize, self.share(vcpu), from, &self.ram, || self.gate.pass());
        filled.unwrap_or_else(|error| {
            *self.failed() = Some(error);
            false
        })
    }

    fn failed(&self) -> MutexGuard<'_, Option<ImageError>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn step(&self, vcpu: u32, sweep: Sweep) {
        let steps = &self.steps[vcpu as usize];
        let done = steps.load(Ordering::Relaxed);
        if let Some((page, generation)) = sweep.step(done) {
            self.params.content().write(page, generation, self.ram.page(page));
            steps.store(done + 1, Ordering::Release);
        }
    }

    fn sweep(&self, vcpu: u32) -> Sweep {
        Sweep::share(self.working_pages(), vcpu.into(), self.params.vcpus.into())
    }

    /// The working set is the first pages of memory.
    fn working_pages(&self) -> u64 {
        (self.params.working_set / PAGE_BYTES as u64).min(self.ram.page_count())
    }

    /// The generation of every page of the working set.
    fn generations(&self) -> Vec<u64> {
        let mut generations = vec![0; self.working_pages() as usize];
        for (vcpu, steps) in self.steps.iter().enumerate() {
            for (page, generation) in self.sweep(vcpu as u32).generations(steps.load(Ordering::Acquire)) {
                generations[page as usize] = generation;
            }
        }
        generations
    }

    fn check(&self, page: u64, generations: &[u64]) -> Option<(u64, Mismatch)> {
        let generation = generations.get(page as usize).copied().unwrap_or(0);
        let checked = self.params.content().check(page, generation, self.ram.page(page));
        checked.err().map(|mismatch| (page, mismatch))
    }

    /// Microseconds since the start.
    fn now(&self) -> u64 {
        self.started.elapsed().as_micros() as u64
    }
}
