//! Writing into the destination's memory: which parts of it are open on a lane, and which of the source's the device has.
//!
//! The source asks for the window around a place, the destination checks the place against its own layout,
//! registers the window for this lane alone and answers with address and key. A lane has few windows: with the next
//! question the source gives back the one it needs least, to which no write is under way then, because a
//! queue pair keeps order.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::{fmt, io};

use pageferry::memory::{GuestMemory, RegionId};
use pageferry::transport::DirectRun;

use crate::failure::{ConnectFailure, LaneFailure, WriteFailure};
use crate::lane::Core;
use crate::message::{Answer, Ask, Grant, Refusal};
use crate::plan::locked_memory_limit;
use crate::registered::{Access, Window, WindowFailure};
use crate::verbs::{Queue, Remote};

/// Bytes of one write: long enough to cost nothing beside its bytes, short enough that what is under way is little.
const LONGEST_WRITE: u64 = 1 << 20;

/// Memory that lanes may use, once it is known. Shared by all lanes of a dialer or acceptor.
#[derive(Default)]
pub(crate) struct Shared(Mutex<Option<Arc<dyn GuestMemory>>>);

impl Shared {
    pub(crate) fn set(&self, memory: Option<Arc<dyn GuestMemory>>) {
        *lock(&self.0) = memory;
    }

    fn get(&self) -> Option<Arc<dyn GuestMemory>> {
        lock(&self.0).clone()
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if lock(&self.0).is_some() { "Shared(memory)" } else { "Shared(none)" })
    }
}

/// How long windows are, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    pub(crate) windows: u16,
    pub(crate) window: u64,
    /// Whole regions in place of windows.
    pub(crate) whole: bool,
}

impl Extent {
    /// The run of a region that is opened for a byte of it.
    fn around(self, memory: &dyn GuestMemory, region: RegionId, offset: u64) -> Option<(u64, u64)> {
        let len = memory.layout().region(region).filter(|described| offset < described.len)?.len;
        if self.whole {
            return Some((0, len));
        }
        let start = offset / self.window * self.window;
        Some((start, self.window.min(len - start)))
    }
}

// The destination.

/// The windows of one lane that the peer may write to.
pub(crate) struct Granted {
    windows: Vec<(u32, Window)>,
    last: u32,
    queue: Weak<Queue>,
}

impl fmt::Debug for Granted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Granted({} windows)", self.windows.len())
    }
}

/// What an acceptor lets its lanes' peers write to.
#[derive(Default, Debug)]
pub(crate) struct Exposure {
    memory: Shared,
    lanes: Mutex<Vec<Arc<Mutex<Granted>>>>,
}

impl Exposure {
    /// Counts a lane in, whose windows are closed by [`conceal`](Self::conceal) too.
    pub(crate) fn admit(&self, queue: &Arc<Queue>) -> Arc<Mutex<Granted>> {
        let granted = Granted { windows: Vec::new(), last: 0, queue: Arc::downgrade(queue) };
        let granted = Arc::new(Mutex::new(granted));
        let mut lanes = lock(&self.lanes);
        // Those of lanes that are gone are closed here, if not before.
        lanes.retain(|lane| Arc::strong_count(lane) > 1);
        lanes.push(Arc::clone(&granted));
        granted
    }

    pub(crate) fn expose(&self, memory: Arc<dyn GuestMemory>) {
        self.memory.set(Some(memory));
    }

    /// Closes all windows; none can be opened afterwards, because that is decided under the lock of the lane's windows.
    pub(crate) fn conceal(&self) {
        self.memory.set(None);
        let lanes: Vec<_> = lock(&self.lanes).clone();
        for lane in lanes {
            lock(&lane).close_all();
        }
    }

    /// Answers a peer's question.
    pub(crate) fn answer(&self, granted: &Mutex<Granted>, queue: &Queue, ask: Ask, extent: Extent) -> Answer {
        let mut granted = lock(granted);
        if ask.release != 0 {
            granted.close(ask.release);
        }
        match self.open(&mut granted, queue, ask, extent) {
            Ok(grant) => Answer::Granted(grant),
            Err(refusal) => Answer::Refused(refusal),
        }
    }

    fn open(&self, granted: &mut Granted, queue: &Queue, ask: Ask, extent: Extent) -> Result<Grant, Refusal> {
        let memory = self.memory.get().ok_or(Refusal::Concealed)?;
        let (start, len) = extent.around(&*memory, ask.region, ask.offset).ok_or(Refusal::OutOfBounds)?;
        if granted.windows.len() >= usize::from(extent.windows) {
            return Err(Refusal::TooMany);
        }
        let window = queue
            .domain()
            .open_window(&memory, ask.region, start, len, Access::PeerWrites)
            .map_err(|failure| failure.refusal())?;
        let (address, key) = window.address_and_key();
        let id = granted.last.wrapping_add(1).max(1);
        granted.last = id;
        granted.windows.push((id, window));
        Ok(Grant { id, key, region: ask.region, start, len, address })
    }
}

impl Granted {
    fn close(&mut self, id: u32) {
        if let Some(at) = self.windows.iter().position(|(known, _)| *known == id) {
            let (_, window) = self.windows.swap_remove(at);
            self.end(window);
        }
    }

    fn close_all(&mut self) {
        for (_, window) in std::mem::take(&mut self.windows) {
            self.end(window);
        }
    }

    fn end(&self, window: Window) {
        // A device that does not let go of a window loses its connection: then nothing can be written either.
        if window.close().is_err()
            && let Some(queue) = self.queue.upgrade()
        {
            let _ = queue.stop();
        }
    }
}

// The source.

/// A window of the destination's memory.
#[derive(Clone, Copy, Debug)]
struct Opened {
    grant: Grant,
    used: u64,
}

/// A window of our own memory, and the last write from it.
struct Lent {
    window: Window,
    last: u64,
    used: u64,
}

/// What a source's lane knows.
pub(crate) struct Writer {
    memory: Arc<Shared>,
    extent: Extent,
    /// Windows that the peer lets us have.
    most: u16,
    opened: Vec<Opened>,
    lent: Vec<Lent>,
    /// The place that was asked for, and the answer not yet heard.
    asked: Option<(RegionId, u64)>,
    /// The window that was written to last, and whether it came right behind the one before.
    current: Option<Grant>,
    in_order: bool,
    clock: u64,
}

impl Writer {
    pub(crate) fn new(memory: Arc<Shared>, extent: Extent, most: u16) -> Self {
        Self {
            memory,
            extent,
            most,
            opened: Vec::new(),
            lent: Vec::new(),
            asked: None,
            current: None,
            in_order: true,
            clock: 0,
        }
    }

    /// Writes all runs; the windows for what comes next are asked for while the one before is written to.
    pub(crate) fn write(&mut self, core: &Core, runs: &[DirectRun]) -> io::Result<()> {
        let memory = self.memory.get().ok_or(WriteFailure::NotAttached)?;
        for run in runs {
            check(&*memory, run)?;
        }
        let mut pieces = pieces(runs, self.extent.window).peekable();
        while let Some(piece) = pieces.next() {
            let grant = self.opened_at(core, piece.region, piece.offset)?;
            self.enter(grant);
            let named = pieces.peek().map(|next| (next.region, next.offset));
            let next = named.filter(|&(region, offset)| !holds(&grant, region, offset));
            if let Some((region, offset)) = next.or_else(|| self.ahead(&*memory, &grant))
                && self.most > 1
                && !self.knows(region, offset)
            {
                self.ask(core, region, offset, Some(grant.id))?;
            }
            self.write_piece(core, &memory, piece, grant)?;
        }
        Ok(())
    }

    fn write_piece(
        &mut self,
        core: &Core,
        memory: &Arc<dyn GuestMemory>,
        piece: DirectRun,
        grant: Grant,
    ) -> io::Result<()> {
        let DirectRun { region, mut offset, len } = piece;
        let (end, mut grant) = (offset + len, grant);
        while offset < end {
            if !holds(&grant, region, offset) {
                grant = self.opened_at(core, region, offset)?;
            }
            let lent = self.lent_at(core, memory, region, offset)?;
            let most = (grant.start + grant.len).min(lent.window.start + lent.window.len).min(end);
            let len = (most - offset).min(LONGEST_WRITE);
            let remote = Remote { address: grant.address.wrapping_add(offset - grant.start), key: grant.key };
            lent.last = core.write(&lent.window, offset, len as u32, remote, offset + len == end)?;
            offset += len;
        }
        Ok(())
    }

    /// Notes which windows follow each other.
    fn enter(&mut self, grant: Grant) {
        let before = self.current.replace(grant);
        if let Some(before) = before.filter(|before| before.id != grant.id) {
            self.in_order = before.region == grant.region && before.start + before.len == grant.start;
        }
    }

    /// What is written next if memory is written in order, as in a first round.
    fn ahead(&self, memory: &dyn GuestMemory, grant: &Grant) -> Option<(RegionId, u64)> {
        let end = grant.start + grant.len;
        let exists = memory.layout().region(grant.region).is_some_and(|region| end < region.len);
        (self.in_order && exists).then_some((grant.region, end))
    }

    fn knows(&self, region: RegionId, offset: u64) -> bool {
        self.asked.is_some() || self.opened.iter().any(|opened| holds(&opened.grant, region, offset))
    }

    /// The peer's window around a place, which is asked for if there is none yet.
    fn opened_at(&mut self, core: &Core, region: RegionId, offset: u64) -> io::Result<Grant> {
        self.clock += 1;
        for _ in 0..2 {
            if let Some(opened) = self.opened.iter_mut().find(|opened| holds(&opened.grant, region, offset)) {
                opened.used = self.clock;
                return Ok(opened.grant);
            }
            if self.asked.is_none() {
                self.ask(core, region, offset, None)?;
            }
            self.hear(core, (region, offset))?;
        }
        // The answer to a question that was asked ahead was for another place.
        self.opened
            .iter()
            .find(|opened| holds(&opened.grant, region, offset))
            .map(|opened| opened.grant)
            .ok_or_else(|| LaneFailure::Protocol("a window that was not asked for").into())
    }

    /// Asks for a window, in place of the one that was not used for longest if there may be no more; not of `keep`.
    fn ask(&mut self, core: &Core, region: RegionId, offset: u64, keep: Option<u32>) -> io::Result<()> {
        let mut release = 0;
        if self.opened.len() >= usize::from(self.most) {
            let oldest = self.opened.iter().enumerate().filter(|(_, opened)| Some(opened.grant.id) != keep);
            if let Some((at, _)) = oldest.min_by_key(|(_, opened)| opened.used) {
                release = self.opened.swap_remove(at).grant.id;
            }
        }
        core.ask(Ask { release, region, offset })?;
        self.asked = Some((region, offset));
        Ok(())
    }

    /// Waits for the answer to what was asked, and checks it. A refusal counts if it is for the place that is wanted now.
    fn hear(&mut self, core: &Core, wanted: (RegionId, u64)) -> io::Result<()> {
        let Some((region, offset)) = self.asked.take() else { return Ok(()) };
        match core.answer()? {
            Answer::Granted(grant) if holds(&grant, region, offset) && grant.start.checked_add(grant.len).is_some() => {
                self.opened.push(Opened { grant, used: self.clock });
                Ok(())
            }
            Answer::Granted(_) => Err(LaneFailure::Protocol("a window that was not asked for").into()),
            Answer::Refused(_) if (region, offset) != wanted => Ok(()),
            Answer::Refused(refusal) => Err(WriteFailure::Refused { region: region.0, offset, refusal }.into()),
        }
    }

    /// Our own window around a place, which is registered if there is none yet.
    fn lent_at(
        &mut self,
        core: &Core,
        memory: &Arc<dyn GuestMemory>,
        region: RegionId,
        offset: u64,
    ) -> io::Result<&mut Lent> {
        let clock = self.clock;
        if let Some(at) = self.lent.iter().position(|lent| lent.window.contains(region, offset)) {
            let lent = &mut self.lent[at];
            lent.used = clock;
            return Ok(lent);
        }
        if !self.extent.whole && self.lent.len() >= usize::from(self.extent.windows.max(1)) {
            let oldest = self.lent.iter().enumerate().min_by_key(|(_, lent)| lent.used).map_or(0, |(at, _)| at);
            let lent = self.lent.swap_remove(oldest);
            core.finish(lent.last)?;
        }
        let out_of_bounds = || WriteFailure::OutOfBounds { region: region.0, offset, len: 1 };
        let (start, len) = self.extent.around(&**memory, region, offset).ok_or_else(out_of_bounds)?;
        let window = core.queue().domain().open_window(memory, region, start, len, Access::Read);
        let window = window.map_err(|failure| match failure {
            WindowFailure::OutOfBounds => out_of_bounds(),
            WindowFailure::Host { wanted, error } => {
                WriteFailure::Register(ConnectFailure::LockedMemory { wanted, limit: locked_memory_limit(), error })
            }
        })?;
        self.lent.push(Lent { window, last: 0, used: clock });
        Ok(self.lent.last_mut().ok_or_else(out_of_bounds)?)
    }
}

fn holds(grant: &Grant, region: RegionId, offset: u64) -> bool {
    grant.region == region && offset.checked_sub(grant.start).is_some_and(|within| within < grant.len)
}

/// Runs are our own side's, but what is outside must not come to the device.
fn check(memory: &dyn GuestMemory, run: &DirectRun) -> Result<(), WriteFailure> {
    let &DirectRun { region, offset, len } = run;
    let end = memory.layout().region(region).map_or(0, |described| described.len);
    match offset.checked_add(len) {
        Some(last) if last <= end => Ok(()),
        _ => Err(WriteFailure::OutOfBounds { region: region.0, offset, len }),
    }
}

/// Runs cut where windows begin.
fn pieces(runs: &[DirectRun], window: u64) -> impl Iterator<Item = DirectRun> + '_ {
    runs.iter().flat_map(move |&DirectRun { region, offset, len }| {
        let (mut from, end) = (offset, offset + len);
        std::iter::from_fn(move || {
            let to = end.min((from / window + 1) * window);
            let piece = DirectRun { region, offset: from, len: to - from };
            from = to;
            (piece.len > 0).then_some(piece)
        })
    })
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
