//! Saving: lanes whose other end writes down what they carry.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use pageferry::host::{Spawner, StdSpawner};
use pageferry::limits::HEARTBEAT;
use pageferry::transport::{
    Capabilities, Dialer, Lane, LaneCloser, LaneHalves, LaneReceiver, LaneRole, LaneSender, TransportError,
};
use pageferry::wire::{FrameBuffer, Greeting, GreetingRole, HEADER_LEN, Header, Kind, Message, Refusal};

use crate::device::Device;
use crate::error::FileFailure;
use crate::format::{CONTROL, data_lane};
use crate::partial::{Partial, Target};
use crate::recorder::{Action, Recorder};
use crate::writing::Writing;

/// How a guest is saved.
#[derive(Clone)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Whether a file that has the name already may be replaced. Default: no.
    pub overwrite: bool,
    /// Whether to go past the page cache where the filesystem allows it. Default: yes.
    pub direct: bool,
    /// Lends the threads that write.
    pub spawner: Arc<dyn Spawner>,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { overwrite: false, direct: true, spawner: Arc::new(StdSpawner) }
    }
}

impl fmt::Debug for SaveOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { overwrite, direct, .. } = self;
        f.debug_struct("SaveOptions").field("overwrite", overwrite).field("direct", direct).finish_non_exhaustive()
    }
}

/// The source's end of a save: migrate over it, and the guest is in the file.
///
/// Until the file has its final name it has another one in the same folder, which nobody but this user can read. It is removed
/// when the migration fails, when the next save begins, or when this is dropped.
/// [`Verify::Full`](pageferry::Verify::Full) is refused.
#[derive(Debug)]
pub struct FileDialer {
    desk: Arc<Desk>,
}

impl FileDialer {
    /// Saves to this path. What would be in the way is an error now, not when the guest has been running for an hour.
    pub fn new(path: impl Into<PathBuf>, options: SaveOptions) -> Result<Self, TransportError> {
        let path = path.into();
        let refuse = |failure: FileFailure| TransportError::Dial { peer: name(&path), source: failure.into() };
        let target = Target::new(path.clone(), options.overwrite).map_err(refuse)?;
        target.check().map_err(refuse)?;
        Ok(Self { desk: Arc::new(Desk { target, options, current: Mutex::default() }) })
    }
}

impl Dialer for FileDialer {
    fn dial(&self, _role: LaneRole, _timeout: Duration) -> Result<Box<dyn Lane>, TransportError> {
        Ok(Box::new(RecordingLane(Arc::clone(&self.desk))))
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        // Nothing leaves the host, and the file is this user's alone.
        capabilities.encrypted = true;
        capabilities
    }
}

/// How the file is called as a peer.
fn name(path: &Path) -> String {
    format!("file:{}", path.display())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where lanes learn what they belong to.
#[derive(Debug)]
struct Desk {
    target: Target,
    options: SaveOptions,
    /// The save that goes on, or the last: its source may still ask about it.
    current: Mutex<Option<Arc<Save>>>,
}

impl Desk {
    fn begin(&self, greeting: &Greeting, lane: &Arc<LaneState>) -> Result<Arc<Save>, Refusal> {
        let mut current = lock(&self.current);
        if current.as_ref().is_some_and(|save| !lock(&save.recorder).is_over()) {
            return Err(Refusal::Busy);
        }
        let recorder = Recorder::greeted(greeting)?;
        *current = None;
        let (partial, file) = self.target.begin().map_err(|failure| Refusal::Guest(failure.to_string()))?;
        let save = Arc::new(Save {
            recorder: Mutex::new(recorder),
            lane: Arc::clone(lane),
            partial: Mutex::new(partial),
            file: Mutex::new(Some(file)),
            writing: Mutex::new(None),
            options: self.options.clone(),
        });
        Ok(Arc::clone(current.insert(save)))
    }

    fn current(&self) -> Option<Arc<Save>> {
        lock(&self.current).clone()
    }
}

/// One guest that is being saved.
struct Save {
    recorder: Mutex<Recorder>,
    /// The control lane.
    lane: Arc<LaneState>,
    partial: Mutex<Partial>,
    /// Until writing begins.
    file: Mutex<Option<File>>,
    /// Kept until the file has its name: it holds the lock that says that somebody is at work.
    writing: Mutex<Option<Arc<Writing>>>,
    options: SaveOptions,
}

impl fmt::Debug for Save {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Save").field("recorder", &self.recorder).finish_non_exhaustive()
    }
}

impl Save {
    /// Tells the recorder something, and does what it wants done.
    fn tell<R>(&self, what: impl FnOnce(&mut Recorder) -> R) -> R {
        let mut recorder = lock(&self.recorder);
        let told = what(&mut recorder);
        while let Some(action) = recorder.poll_action() {
            match action {
                Action::Answer(message) => self.lane.answer(message),
                Action::Seal => {
                    let protocol = recorder.version();
                    // It takes a while, and must not keep anybody from ending it.
                    drop(recorder);
                    let sealed = self.seal(protocol);
                    recorder = lock(&self.recorder);
                    recorder.sealed(sealed);
                }
                // Under the lock: who asks meanwhile whose the guest is hears the answer afterwards.
                Action::Publish => {
                    let published = lock(&self.partial).publish().map_err(|failure| failure.to_string());
                    if published.is_ok() {
                        self.release();
                    }
                    recorder.published(published);
                }
                Action::Discard => {
                    lock(&self.partial).discard();
                    self.release();
                }
            }
        }
        told
    }

    fn seal(&self, protocol: u16) -> Result<(), String> {
        self.writing().ok_or("there was no offer")?.seal(protocol)?;
        lock(&self.partial).check().map_err(|failure| failure.to_string())
    }

    /// Nothing is written any more.
    fn release(&self) {
        let writing = lock(&self.writing).take();
        if let Some(writing) = writing {
            writing.stop();
        }
        *lock(&self.file) = None;
    }

    fn writing(&self) -> Option<Arc<Writing>> {
        lock(&self.writing).clone()
    }

    fn begin_writing(&self, data_lanes: u16) -> Result<Arc<Writing>, String> {
        let path = lock(&self.partial).path().to_owned();
        let file = lock(&self.file).take().ok_or("there was an offer before")?;
        let device = Device::new(file, self.options.direct);
        let writing = Writing::begin(device, path, data_lanes, &*self.options.spawner);
        let writing = Arc::new(writing.map_err(|failure| failure.to_string())?);
        Ok(Arc::clone(lock(&self.writing).insert(writing)))
    }

    /// Appends to a lane's part of the file.
    fn append(&self, writing: &Writing, lane: u16, frame: &[IoSlice<'_>]) -> io::Result<()> {
        writing.append(lane, frame).map_err(|reason| {
            self.tell(|recorder| recorder.fail(reason.clone()));
            io::Error::other(reason)
        })
    }
}

/// A lane that nobody has said anything on yet.
#[derive(Debug)]
struct RecordingLane(Arc<Desk>);

impl Lane for RecordingLane {
    fn peer(&self) -> String {
        name(&self.0.target.path)
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let state = Arc::new(LaneState::default());
        let sender = RecordingSender {
            desk: self.0,
            state: Arc::clone(&state),
            belongs: Belongs::Nowhere,
            frame: FrameBuffer::new(),
        };
        Ok(LaneHalves {
            sender: Box::new(sender),
            receiver: Box::new(AnswerReceiver { state: Arc::clone(&state), sequence: 0 }),
            closer: Arc::new(RecordingCloser(state)),
        })
    }
}

/// What the halves of a lane share.
#[derive(Default)]
struct LaneState {
    answers: Mutex<Answers>,
    changed: Condvar,
    /// The save whose control lane this is.
    controls: OnceLock<std::sync::Weak<Save>>,
}

#[derive(Default)]
struct Answers {
    waiting: VecDeque<Message>,
    closed: bool,
}

impl fmt::Debug for LaneState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LaneState").finish_non_exhaustive()
    }
}

impl LaneState {
    fn answer(&self, message: Message) {
        lock(&self.answers).waiting.push_back(message);
        self.changed.notify_all();
    }

    fn save(&self) -> Option<Arc<Save>> {
        self.controls.get()?.upgrade()
    }

    fn is_closed(&self) -> bool {
        lock(&self.answers).closed
    }

    fn close(&self) {
        lock(&self.answers).closed = true;
        self.changed.notify_all();
        if let Some(save) = self.save() {
            save.tell(Recorder::lost);
        }
    }
}

/// What a lane carries.
enum Belongs {
    Nowhere,
    Control(Arc<Save>),
    Data(Arc<Save>, Arc<Writing>, u16),
    /// A question that was answered.
    Settled,
}

struct RecordingSender {
    desk: Arc<Desk>,
    state: Arc<LaneState>,
    belongs: Belongs,
    frame: FrameBuffer,
}

impl LaneSender for RecordingSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        if self.state.is_closed() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let header = header_of(frame)?;
        match &self.belongs {
            Belongs::Nowhere => self.introduce(frame),
            Belongs::Control(save) => {
                let save = Arc::clone(save);
                self.control(&save, frame, &header)
            }
            Belongs::Data(save, writing, index) => data(save, writing, *index, frame, &header),
            // The source says Done.
            Belongs::Settled => Ok(()),
        }
    }
}

impl Drop for RecordingSender {
    fn drop(&mut self) {
        if let Belongs::Control(save) = &self.belongs {
            save.tell(Recorder::lost);
        }
    }
}

impl RecordingSender {
    fn introduce(&mut self, frame: &[IoSlice<'_>]) -> io::Result<()> {
        let Message::Greeting(greeting) = decode(&mut self.frame, frame)? else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a lane begins with a greeting"));
        };
        match greeting.role {
            GreetingRole::Control => match self.desk.begin(&greeting, &self.state) {
                Ok(save) => {
                    // The first word on this lane.
                    let _ = self.state.controls.set(Arc::downgrade(&save));
                    save.tell(|_| ());
                    self.belongs = Belongs::Control(save);
                    Ok(())
                }
                Err(refusal) => {
                    self.state.answer(Message::Refuse(refusal));
                    self.belongs = Belongs::Settled;
                    Ok(())
                }
            },
            GreetingRole::Data(index) => {
                let save = self.desk.current().filter(|save| {
                    let recorder = lock(&save.recorder);
                    recorder.session() == greeting.session && recorder.records() && index < recorder.lanes()
                });
                let (save, writing) =
                    save.and_then(|save| save.writing().map(|writing| (save, writing))).ok_or_else(|| {
                        io::Error::new(io::ErrorKind::BrokenPipe, "no guest is being saved over such a lane")
                    })?;
                self.belongs = Belongs::Data(save, writing, index);
                Ok(())
            }
            GreetingRole::Settle => {
                let answer =
                    self.desk.current().and_then(|save| save.tell(|recorder| recorder.settle(greeting.session)));
                match answer {
                    Some(answer) => self.state.answer(answer),
                    None => self.state.close(),
                }
                self.belongs = Belongs::Settled;
                Ok(())
            }
        }
    }

    fn control(&mut self, save: &Save, frame: &[IoSlice<'_>], header: &Header) -> io::Result<()> {
        if header.kind == Kind::Pages {
            let writing = save.writing().ok_or(io::ErrorKind::BrokenPipe)?;
            save.append(&writing, CONTROL, frame)?;
            return carry_on(save.tell(|recorder| recorder.lanes() == 0 && recorder.pages(0, header.step)));
        }
        let message = decode(&mut self.frame, frame)?;
        match message {
            Message::Offer(_) => {
                // Pages and lanes come after the answer, so nobody misses the file before it is there.
                let mut recorder = lock(&save.recorder);
                if recorder.message(&message) {
                    let lanes = recorder.lanes();
                    drop(recorder);
                    let begun = save.begin_writing(lanes).and_then(|writing| writing.append(CONTROL, frame));
                    if let Err(reason) = begun {
                        save.tell(|recorder| recorder.fail(reason));
                    }
                } else {
                    drop(recorder);
                }
                save.tell(|_| ());
            }
            Message::State(_) | Message::StepEnd { .. } | Message::Finish(_) => {
                // First: what it completes may be what has the file sealed.
                let writing = save.writing().ok_or(io::ErrorKind::BrokenPipe)?;
                save.append(&writing, CONTROL, frame)?;
                save.tell(|recorder| recorder.message(&message));
            }
            _ => {
                save.tell(|recorder| recorder.message(&message));
            }
        }
        Ok(())
    }
}

fn data(save: &Save, writing: &Writing, index: u16, frame: &[IoSlice<'_>], header: &Header) -> io::Result<()> {
    save.append(writing, data_lane(index), frame)?;
    carry_on(save.tell(|recorder| match header.kind {
        Kind::Pages => recorder.pages(index, header.step),
        Kind::StepEnd => recorder.step_end(index, header.step),
        kind => recorder.fail(format!("the source sent {kind:?} on a data lane")),
    }))
}

/// What was refused is told on the control lane.
fn carry_on(accepted: bool) -> io::Result<()> {
    if accepted { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
}

fn header_of(frame: &[IoSlice<'_>]) -> io::Result<Header> {
    let mut bytes = [0; HEADER_LEN];
    let start = frame.iter().flat_map(|part| part.iter());
    for (to, from) in bytes.iter_mut().zip(start) {
        *to = *from;
    }
    Ok(Header::decode(&bytes)?)
}

fn decode(buffer: &mut FrameBuffer, frame: &[IoSlice<'_>]) -> io::Result<Message> {
    buffer.prepare(0)?;
    for part in frame {
        buffer.extend(part.len())?.copy_from_slice(part);
    }
    Ok(Message::decode(buffer)?)
}

/// What the recorder says, and now and then that it is alive.
struct AnswerReceiver {
    state: Arc<LaneState>,
    sequence: u64,
}

impl LaneReceiver for AnswerReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        let message = self.next()?;
        frame.fill(&message.encode(self.sequence))?;
        self.sequence += 1;
        Ok(())
    }
}

impl AnswerReceiver {
    fn next(&self) -> io::Result<Message> {
        let since = Instant::now();
        let mut answers = lock(&self.state.answers);
        loop {
            if let Some(message) = answers.waiting.pop_front() {
                return Ok(message);
            }
            if answers.closed {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let left = HEARTBEAT.saturating_sub(since.elapsed());
            if left.is_zero()
                && let Some(save) = self.state.save()
            {
                let received = save.writing().map_or(0, |writing| writing.written());
                return Ok(Message::Heartbeat { received });
            }
            let wait = if left.is_zero() { HEARTBEAT } else { left };
            answers = self.state.changed.wait_timeout(answers, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

struct RecordingCloser(Arc<LaneState>);

impl LaneCloser for RecordingCloser {
    fn close(&self) {
        self.0.close();
    }
}
