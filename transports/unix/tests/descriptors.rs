//! Descriptors travel beside the first frame, and only there, and nothing stays open.

use std::fs::File;
use std::io::{IoSlice, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use pageferry::transport::{Acceptor, Dialer, LaneHalves, LaneRole};
use pageferry_conformance::Joined;
use pageferry_conformance::frames::{PATIENCE, body, receive, send};
use pageferry_unix::{DescriptorId, Descriptors, MAX_DESCRIPTORS, UnixAcceptor, UnixDialer};

static NEXT: AtomicU32 = AtomicU32::new(0);

fn path() -> PathBuf {
    let name = format!("descriptors-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    std::env::temp_dir().join(name)
}

/// A file that nobody else has.
fn file() -> OwnedFd {
    let path = path();
    let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
    std::fs::remove_file(path).unwrap();
    file.into()
}

struct Ends {
    near: LaneHalves,
    far: LaneHalves,
    descriptors: Descriptors,
    _acceptor: UnixAcceptor,
}

/// A lane whose first frame was sent with these.
fn lane(role: LaneRole, given: Vec<OwnedFd>) -> Ends {
    let path = path();
    let acceptor = UnixAcceptor::bind(&path).unwrap();
    let dialer = UnixDialer::new(path).with_descriptors(given);
    let near = dialer.dial(role, PATIENCE).unwrap().split().unwrap();
    let far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    Ends { near, far, descriptors: acceptor.descriptors(), _acceptor: acceptor }
}

#[test]
fn the_first_frame_brings_what_the_dialer_gave_and_every_frame_arrives() {
    let (given, other) = (file(), file());
    let (id, other_id) = (DescriptorId::of(&given).unwrap(), DescriptorId::of(&other).unwrap());
    File::from(given.as_fd().try_clone_to_owned().unwrap()).write_all(b"the same file").unwrap();
    let mut ends = lane(LaneRole::Control, vec![other, given]);
    for number in 0..3 {
        send(&mut ends.near.sender, number, &body(number, 3000)).unwrap();
        assert_eq!(receive(&mut ends.far.receiver).unwrap(), (number, body(number, 3000)));
    }
    let mut taken = File::from(ends.descriptors.take(id).expect("it came"));
    assert!(ends.descriptors.take(id).is_none(), "once");
    let mut content = String::new();
    taken.rewind().unwrap();
    taken.read_to_string(&mut content).unwrap();
    assert_eq!(content, "the same file");
    // What nobody takes goes with its lane.
    drop(ends.far);
    assert!(ends.descriptors.take(other_id).is_none());
}

#[test]
fn data_lanes_bring_nothing() {
    let given = file();
    let id = DescriptorId::of(&given).unwrap();
    let mut ends = lane(LaneRole::Data(0), vec![given]);
    send(&mut ends.near.sender, 0, b"hello").unwrap();
    assert_eq!(receive(&mut ends.far.receiver).unwrap().1, b"hello");
    assert!(ends.descriptors.take(id).is_none());
}

#[test]
fn as_many_as_are_allowed_come_and_no_more_are_sent() {
    let given: Vec<_> = (0..MAX_DESCRIPTORS).map(|_| file()).collect();
    let ids: Vec<_> = given.iter().map(|given| DescriptorId::of(given).unwrap()).collect();
    let mut ends = lane(LaneRole::Control, given);
    send(&mut ends.near.sender, 0, b"all").unwrap();
    receive(&mut ends.far.receiver).unwrap();
    assert!(ids.into_iter().all(|id| ends.descriptors.take(id).is_some()));
    let mut ends = lane(LaneRole::Control, (0..=MAX_DESCRIPTORS).map(|_| file()).collect());
    assert!(send(&mut ends.near.sender, 0, b"more").is_err());
}

#[test]
fn a_caller_that_brings_too_many_is_refused() {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let path = path();
    let acceptor = UnixAcceptor::bind(&path).unwrap();
    let caller = std::os::unix::net::UnixStream::connect(&path).unwrap();
    let file = file();
    let many = vec![file.as_fd(); MAX_DESCRIPTORS + 1];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS + 1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
    sendmsg(&caller, &[IoSlice::new(b"hello")], &mut control, SendFlags::empty()).unwrap();
    let mut far = acceptor.accept(PATIENCE).unwrap().unwrap().split().unwrap();
    let error = receive(&mut far.receiver).unwrap_err();
    assert!(error.to_string().contains("at most 32"), "{error}");
    assert!(acceptor.descriptors().take(DescriptorId::of(&file).unwrap()).is_none());
}

/// The suite that every transport passes, with descriptors beside each control lane's first frame.
mod conformance {
    use super::*;

    fn join() -> Joined {
        let path = path();
        let acceptor = UnixAcceptor::bind(&path).unwrap();
        Joined::new(UnixDialer::new(path).with_descriptors(vec![file()]), acceptor)
    }

    pageferry_conformance::suite!(join);
}
