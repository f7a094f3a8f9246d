//! Descriptors that travel beside the first frame of a lane: memory that is handed over instead of being copied.
//!
//! A memfd is known by its device and inode numbers, which are the same to both processes and to nobody else on the host. So the
//! VMM's own description of the guest can name what it needs, and whatever else came is closed with its lane.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use pageferry::transport::{Lane, LaneHalves, LaneReceiver, LaneSender};
use pageferry::wire::FrameBuffer;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

/// Descriptors that one lane may bring: a guest has a region or two, and few have more than a dozen. A lane that brings more is
/// refused.
pub const MAX_DESCRIPTORS: usize = 32;

/// What names a memfd on this host.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct DescriptorId {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

impl DescriptorId {
    /// The name of what is behind a descriptor.
    pub fn of(descriptor: impl AsFd) -> io::Result<Self> {
        let found = rustix::fs::fstat(descriptor)?;
        Ok(Self { device: found.st_dev, inode: found.st_ino })
    }
}

/// The descriptors of one lane, which live no longer than it.
type Brought = Mutex<Vec<OwnedFd>>;

/// Descriptors that callers of a [`UnixAcceptor`](crate::UnixAcceptor) have brought. Clones show the same ones.
#[derive(Clone, Debug, Default)]
pub struct Descriptors(Arc<Mutex<Vec<Weak<Brought>>>>);

impl Descriptors {
    /// Takes a descriptor by its name, while the lane that brought it is open.
    pub fn take(&self, id: DescriptorId) -> Option<OwnedFd> {
        let lanes: Vec<_> = lock(&self.0).iter().filter_map(Weak::upgrade).collect();
        lanes.into_iter().find_map(|lane| {
            let mut brought = lock(&lane);
            let at = brought.iter().position(|fd| DescriptorId::of(fd).is_ok_and(|found| found == id))?;
            Some(brought.remove(at))
        })
    }

    fn keep(&self, brought: &Arc<Brought>) {
        let mut lanes = lock(&self.0);
        lanes.retain(|lane| lane.strong_count() > 0);
        lanes.push(Arc::downgrade(brought));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What went wrong with descriptors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorFailure {
    /// More than are taken.
    #[error("a lane carries at most {MAX_DESCRIPTORS} descriptors")]
    TooMany,
}

impl From<DescriptorFailure> for io::Error {
    fn from(failure: DescriptorFailure) -> Self {
        Self::new(io::ErrorKind::InvalidData, failure)
    }
}

/// A lane whose first frame takes descriptors along.
pub(crate) struct GivingLane {
    pub(crate) lane: Box<dyn Lane>,
    pub(crate) socket: OwnedFd,
    pub(crate) descriptors: Arc<Vec<OwnedFd>>,
}

impl Lane for GivingLane {
    fn peer(&self) -> String {
        self.lane.peer()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let halves = self.lane.split()?;
        let first = Some((self.socket, self.descriptors));
        Ok(LaneHalves { sender: Box::new(GivingSender { sender: halves.sender, first }), ..halves })
    }
}

struct GivingSender {
    sender: Box<dyn LaneSender>,
    first: Option<(OwnedFd, Arc<Vec<OwnedFd>>)>,
}

impl LaneSender for GivingSender {
    fn send(&mut self, frame: &mut [IoSlice<'_>]) -> io::Result<()> {
        let Some((socket, descriptors)) = self.first.take() else { return self.sender.send(frame) };
        let sent = send_with(socket.as_fd(), frame, &descriptors)?;
        let mut left = frame;
        IoSlice::advance_slices(&mut left, sent);
        if left.is_empty() { Ok(()) } else { self.sender.send(left) }
    }
}

fn send_with(socket: BorrowedFd<'_>, frame: &[IoSlice<'_>], descriptors: &[OwnedFd]) -> io::Result<usize> {
    let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if borrowed.len() > MAX_DESCRIPTORS || !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(DescriptorFailure::TooMany.into());
    }
    loop {
        match sendmsg(socket, frame, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// A lane whose first frame may bring descriptors.
pub(crate) struct TakingLane {
    pub(crate) lane: Box<dyn Lane>,
    pub(crate) socket: OwnedFd,
    pub(crate) descriptors: Descriptors,
}

impl Lane for TakingLane {
    fn peer(&self) -> String {
        self.lane.peer()
    }

    fn split(self: Box<Self>) -> io::Result<LaneHalves> {
        let halves = self.lane.split()?;
        let receiver = TakingReceiver {
            receiver: halves.receiver,
            first: Some((self.socket, self.descriptors)),
            brought: Arc::default(),
        };
        Ok(LaneHalves { receiver: Box::new(receiver), ..halves })
    }
}

struct TakingReceiver {
    receiver: Box<dyn LaneReceiver>,
    first: Option<(OwnedFd, Descriptors)>,
    brought: Arc<Brought>,
}

impl LaneReceiver for TakingReceiver {
    fn receive(&mut self, frame: &mut FrameBuffer) -> io::Result<()> {
        if let Some((socket, descriptors)) = self.first.take() {
            let brought = take_first(socket.as_fd())?;
            if !brought.is_empty() {
                *lock(&self.brought) = brought;
                descriptors.keep(&self.brought);
            }
        }
        self.receiver.receive(frame)
    }
}

/// Waits for the first byte and takes what comes with it. The byte stays where it is: whoever reads it has no use for the
/// descriptors, and the kernel drops that reader's.
fn take_first(socket: BorrowedFd<'_>) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result?,
        }
    };
    let brought = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    let brought: Vec<OwnedFd> = brought.flatten().collect();
    // The kernel has closed those that found no room.
    if received.flags.contains(ReturnFlags::CTRUNC) { Err(DescriptorFailure::TooMany.into()) } else { Ok(brought) }
}
