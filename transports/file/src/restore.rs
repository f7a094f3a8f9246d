//! Restoring: lanes whose other end repeats what a file holds.

use std::fmt;
use std::io::{self, IoSlice};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry::host::{Spawner, StdSpawner};
use pageferry::limits::HEARTBEAT;
use pageferry::memory::Layout;
use pageferry::transport::{
    Acceptor, Capabilities, Lane, LaneCloser, LaneHalves, LaneReceiver, LaneSender, TransportError,
};
use pageferry::wire::{FrameBuffer, GreetingRole, Kind, Message, Offer, SessionId};

use crate::error::FileFailure;
use crate::format::{CONTROL, data_lane};
use crate::player::{Player, Turn, check_offer};
use crate::reading::{LaneReader, Reading, Saved};

/// Numbers that may be missing between frames on the control lane: signs of life, of two a second, that were not written down.
const MAX_GAP: u64 = 1 << 24;

/// How long to wait for a lane when none can come any more.
const OVER: Duration = Duration::from_millis(1);

/// How a guest is restored.
#[derive(Clone)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Whether to go past the page cache where the filesystem allows it. Default: yes.
    pub direct: bool,
    /// Lends the threads that read.
    pub spawner: Arc<dyn Spawner>,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { direct: true, spawner: Arc::new(StdSpawner) }
    }
}

impl fmt::Debug for RestoreOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RestoreOptions").field("direct", &self.direct).finish_non_exhaustive()
    }
}

/// The destination's end of a restore: wait for a source over it, and the guest comes out of the file.
///
/// Serves for one restore. The file stays as it is and can be restored again, by another acceptor; it is held open, so it may be
/// removed meanwhile.
pub struct FileAcceptor {
    playback: Arc<Playback>,
    offer: Box<Offer>,
}

impl fmt::Debug for FileAcceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileAcceptor").field("saved", self.playback.reading.saved()).finish_non_exhaustive()
    }
}

impl FileAcceptor {
    /// Opens a saved guest. What is no such file, is cut short, or is damaged where it says what it holds is an error now;
    /// the pages are checked as they are read.
    pub fn open(path: impl Into<PathBuf>, options: RestoreOptions) -> Result<Self, TransportError> {
        let path = path.into();
        open(&path, &options).map_err(|failure| {
            let local = format!("file:{}", path.display());
            TransportError::Accept { local, source: failure.into() }
        })
    }

    /// The memory of the guest in the file.
    pub fn layout(&self) -> &Layout {
        &self.offer.layout
    }

    /// The VMM's description of the guest in the file.
    pub fn config(&self) -> &[u8] {
        &self.offer.config
    }
}

fn open(path: &std::path::Path, options: &RestoreOptions) -> Result<FileAcceptor, FileFailure> {
    let saved = Arc::new(Saved::open(path, options.direct)?);
    let mut session = SessionId([0; 16]);
    getrandom::fill(&mut session.0)
        .map_err(|error| FileFailure::Read { path: path.to_owned(), source: io::Error::other(error) })?;
    let player = Player::new(session, saved.protocol(), saved.data_lanes());
    let reading = Arc::new(Reading::start(saved, &*options.spawner)?);
    let offer = read_offer(&reading)?;
    let playback = Playback {
        state: Mutex::new(Playing { player, control_given: false, lanes_given: 0, settle_given: false }),
        changed: Condvar::new(),
        reading,
    };
    Ok(FileAcceptor { playback: Arc::new(playback), offer })
}

/// A destination that was offered nothing waits on for somebody else: so this is looked at before anything is said.
fn read_offer(reading: &Arc<Reading>) -> Result<Box<Offer>, FileFailure> {
    let mut frame = FrameBuffer::new();
    let invalid = |what: String| reading.saved().invalid(what);
    if !LaneReader::new(Arc::clone(reading), CONTROL).frame(&mut frame)? {
        return Err(invalid("it holds no guest".to_owned()));
    }
    match Message::decode(&frame).map_err(|error| invalid(error.to_string()))? {
        Message::Offer(offer) => {
            check_offer(&offer, reading.saved().data_lanes()).map_err(invalid)?;
            Ok(offer)
        }
        _ => Err(invalid("it does not begin with an offer".to_owned())),
    }
}

impl Acceptor for FileAcceptor {
    fn accept(&self, timeout: Duration) -> Result<Option<Box<dyn Lane>>, TransportError> {
        let until = Instant::now() + timeout;
        let mut state = self.playback.lock();
        loop {
            if let Some(kind) = state.next_lane() {
                return Ok(Some(Box::new(PlayingLane { playback: Arc::clone(&self.playback), kind })));
            }
            let over = state.player.is_over();
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            // When none can come any more the destination is about to end, and must not wait for this.
            let wait = if over { left.min(OVER) } else { left };
            state = self.playback.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
            if over {
                return Ok(None);
            }
        }
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        capabilities.encrypted = true;
        capabilities
    }
}

/// One guest that is being restored.
struct Playback {
    state: Mutex<Playing>,
    changed: Condvar,
    reading: Arc<Reading>,
}

struct Playing {
    player: Player,
    control_given: bool,
    lanes_given: u16,
    settle_given: bool,
}

/// What a lane is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum LaneKind {
    Control,
    Data(u16),
    Settle,
}

impl Playing {
    fn next_lane(&mut self) -> Option<LaneKind> {
        if !std::mem::replace(&mut self.control_given, true) {
            return Some(LaneKind::Control);
        }
        if self.player.lanes_open() && self.lanes_given < self.player.lanes() {
            self.lanes_given += 1;
            return Some(LaneKind::Data(self.lanes_given - 1));
        }
        let asks = self.player.asks() && !std::mem::replace(&mut self.settle_given, true);
        asks.then_some(LaneKind::Settle)
    }
}

impl Playback {
    fn lock(&self) -> MutexGuard<'_, Playing> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, what: impl FnOnce(&mut Player)) {
        what(&mut self.lock().player);
        self.changed.notify_all();
    }
}

/// A lane that is to be split.
struct PlayingLane {
    playback: Arc<Playback>,
    kind: LaneKind,
}

impl Lane for PlayingLane {
    fn peer(&self) -> String {
        format!("file:{}", self.playback.reading.saved().path().display())
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let Self { playback, kind } = *self;
        let state = Arc::new(LaneState { playback, kind, closed: AtomicBool::new(false) });
        let receiver: Box<dyn LaneReceiver> = match kind {
            LaneKind::Data(index) => Box::new(PagesReceiver::new(Arc::clone(&state), index)),
            LaneKind::Control | LaneKind::Settle => Box::new(MessageReceiver::new(Arc::clone(&state))),
        };
        let sender = Box::new(AnswerSender { state: Arc::clone(&state), frame: FrameBuffer::new() });
        Ok(LaneHalves { sender, receiver, closer: Arc::new(PlayingCloser(state)) })
    }
}

/// What the halves of a lane share.
struct LaneState {
    playback: Arc<Playback>,
    kind: LaneKind,
    closed: AtomicBool,
}

impl LaneState {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn close(&self) {
        if self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        match self.kind {
            LaneKind::Data(_) => self.playback.changed.notify_all(),
            LaneKind::Control | LaneKind::Settle => {
                self.playback.reading.stop();
                self.playback.tell(Player::lost);
            }
        }
    }

    /// Waits for a change, or a time; an error once the lane is closed.
    fn wait<'a>(&'a self, state: MutexGuard<'a, Playing>, time: Duration) -> io::Result<MutexGuard<'a, Playing>> {
        if self.is_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(self.playback.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0)
    }
}

struct PlayingCloser(Arc<LaneState>);

impl LaneCloser for PlayingCloser {
    fn close(&self) {
        self.0.close();
    }
}

/// Hears the destination.
struct AnswerSender {
    state: Arc<LaneState>,
    frame: FrameBuffer,
}

impl LaneSender for AnswerSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        if self.state.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        if matches!(self.state.kind, LaneKind::Data(_)) {
            return Ok(());
        }
        self.frame.prepare(0)?;
        for part in frame.iter() {
            self.frame.extend(part.len())?.copy_from_slice(part);
        }
        let message = Message::decode(&self.frame)?;
        self.state.playback.tell(|player| player.answered(&message));
        Ok(())
    }
}

impl Drop for AnswerSender {
    fn drop(&mut self) {
        // The destination has no use for this half of a data lane.
        if !matches!(self.state.kind, LaneKind::Data(_)) {
            self.state.close();
        }
    }
}

/// Repeats the control lane, and says what the file does not hold.
struct MessageReceiver {
    state: Arc<LaneState>,
    record: LaneReader,
    sequence: u64,
    /// The recorded frame that comes when the numbers before it are used up.
    held: Option<FrameBuffer>,
}

impl MessageReceiver {
    fn new(state: Arc<LaneState>) -> Self {
        let record = LaneReader::new(Arc::clone(&state.playback.reading), CONTROL);
        Self { state, record, sequence: 0, held: None }
    }

    fn say(&mut self, message: &Message, frame: &mut FrameBuffer) -> io::Result<()> {
        frame.fill(&message.encode(self.sequence))?;
        self.sequence += 1;
        Ok(())
    }

    fn heartbeat(&self) -> Message {
        Message::Heartbeat { received: self.state.playback.reading.progress() }
    }

    /// What the player wants, once it wants something.
    fn turn(&self) -> io::Result<Turn> {
        let since = Instant::now();
        let mut state = self.state.playback.lock();
        loop {
            if self.state.is_closed() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            match state.player.turn() {
                Turn::WaitAlive if since.elapsed() >= HEARTBEAT => return Ok(Turn::Say(self.heartbeat())),
                Turn::Wait | Turn::WaitAlive | Turn::End => state = self.state.wait(state, HEARTBEAT)?,
                turn => return Ok(turn),
            }
        }
    }

    /// The next frame of the record; an error says why there is none.
    fn repeat(&mut self, frame: &mut FrameBuffer) -> Result<(), String> {
        let saved = Arc::clone(&self.state.playback.reading);
        let invalid = |what: String| saved.saved().invalid(what).to_string();
        if let Some(held) = self.held.take() {
            *frame = held;
        } else if !self.record.frame(frame).map_err(|failure| failure.to_string())? {
            return Err(invalid("it ends before the guest does".to_owned()));
        }
        let header = frame.header().map_err(|error| invalid(error.to_string()))?;
        let message = match header.kind {
            Kind::Pages => None,
            _ => Some(Message::decode(frame).map_err(|error| invalid(error.to_string()))?),
        };
        // Between frames of pages the numbers have no gap: their checksums contain them.
        if saved.saved().data_lanes() == 0 && header.sequence != self.sequence {
            match header.sequence.checked_sub(self.sequence) {
                Some(..=MAX_GAP) => self.held = Some(std::mem::take(frame)),
                _ => return Err(invalid(format!("frame {} follows frame {}", header.sequence, self.sequence))),
            }
            let heartbeat = self.heartbeat();
            return self.say(&heartbeat, frame).map_err(|error| invalid(error.to_string()));
        }
        self.state.playback.lock().player.repeat(header.kind, message.as_ref()).map_err(invalid)?;
        match message {
            Some(message) => self.say(&message, frame).map_err(|error| invalid(error.to_string())),
            None => {
                self.sequence += 1;
                Ok(())
            }
        }
    }
}

impl LaneReceiver for MessageReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        loop {
            match self.turn()? {
                Turn::Say(message) => return self.say(&message, frame),
                _ => match self.repeat(frame) {
                    Ok(()) => return Ok(()),
                    // The next turn says it.
                    Err(reason) => self.state.playback.tell(|player| player.fail(reason)),
                },
            }
        }
    }
}

/// Repeats a data lane.
struct PagesReceiver {
    state: Arc<LaneState>,
    record: LaneReader,
    index: u16,
    greeted: bool,
}

impl PagesReceiver {
    fn new(state: Arc<LaneState>, index: u16) -> Self {
        let record = LaneReader::new(Arc::clone(&state.playback.reading), data_lane(index));
        Self { state, record, index, greeted: false }
    }

    /// Has nothing to say any more: the end of a lane would be taken for a broken one.
    fn wait_for_the_end(&self) -> io::Error {
        let mut state = self.state.playback.lock();
        loop {
            match self.state.wait(state, HEARTBEAT) {
                Ok(woken) => state = woken,
                Err(error) => return error,
            }
        }
    }
}

impl LaneReceiver for PagesReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        if self.state.is_closed() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if !std::mem::replace(&mut self.greeted, true) {
            let greeting = self.state.playback.lock().player.greeting(GreetingRole::Data(self.index));
            return frame.fill(&greeting.encode(0));
        }
        match self.record.frame(frame) {
            Ok(true) => Ok(()),
            Ok(false) => Err(self.wait_for_the_end()),
            Err(failure) => {
                self.state.playback.tell(|player| player.fail(failure.to_string()));
                Err(self.wait_for_the_end())
            }
        }
    }
}
