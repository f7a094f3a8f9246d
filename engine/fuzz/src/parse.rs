//! What the fuzz targets do with their bytes. `engine/tests/corpus.rs` runs the same over the corpus.
#![allow(dead_code)] // each target uses one

use std::sync::{Arc, OnceLock};

use pageferry::digest::{DigestKey, HashTable, PageHasher};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region};
use pageferry::place::Placer;
use pageferry::wire::{FrameBuffer, HEADER_LEN, Header, Kind, Message};

/// Takes frame after frame off the bytes, as a lane does. The first frame's header is made from the first
/// bytes, with a header check that is right: no fuzzer guesses that.
pub(crate) fn frame(bytes: &[u8]) {
    lane(bytes);
    let Some((fields, rest)) = bytes.split_first_chunk::<16>() else { return };
    let number = |at: usize| u32::from_le_bytes([fields[at], fields[at + 1], fields[at + 2], fields[at + 3]]);
    let kind = KINDS[usize::from(fields[0]) % KINDS.len()];
    // Mostly the right length; sometimes any.
    let body_len = if fields[1] < 200 { rest.len() as u32 } else { number(4) };
    let mut header = Header { kind, body_len, step: number(8), sequence: number(12).into(), checksum: 0 };
    header.checksum = header.checksum_of(rest);
    let mut frames = header.encode().to_vec();
    frames.extend_from_slice(rest);
    lane(&frames);
}

fn lane(mut left: &[u8]) {
    while let Some(header) = left.get(..HEADER_LEN) {
        let Ok(header) = Header::decode(header) else { return };
        let Some(frame) = left.get(..HEADER_LEN + header.body_len as usize) else { return };
        let mut buffer = FrameBuffer::new();
        if buffer.fill(frame).is_ok() {
            let _ = Message::decode(&buffer);
        }
        left = &left[frame.len()..];
    }
}

const KINDS: [Kind; 12] = [
    Kind::Greeting,
    Kind::Welcome,
    Kind::Refuse,
    Kind::Offer,
    Kind::Prepared,
    Kind::Settled,
    Kind::Finish,
    Kind::Running,
    Kind::State,
    Kind::Abort,
    Kind::Heartbeat,
    Kind::RoundAck,
];

/// The first byte says which message, the others are its body.
pub(crate) fn hello(bytes: &[u8]) {
    let Some((kind, body)) = bytes.split_first() else { return };
    let kind = KINDS[usize::from(*kind) % KINDS.len()];
    if let Some(frame) = sealed(kind, body)
        && let Ok(message) = Message::decode(&frame)
    {
        // What is understood can be said again, and is the same then.
        let again = message.encode(0);
        let mut buffer = FrameBuffer::new();
        buffer.fill(&again).expect("what this side encodes has a sound header");
        assert_eq!(Message::decode(&buffer).as_ref(), Ok(&message));
    }
}

/// Places the bytes as the body of a batch.
pub(crate) fn batch(bytes: &[u8]) {
    static MEMORY: OnceLock<Arc<MappedMemory>> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| {
        let regions = vec![Region::ram("low", 0, 70 * 4096), Region::ram("high", 1 << 32, 200 * 4096)];
        let layout = Layout::new(regions).expect("a sound layout");
        Arc::new(MappedMemory::new(layout, Backing::Anonymous).expect("a megabyte of memory"))
    });
    let table = Arc::new(HashTable::new(memory.layout().page_space()));
    let mut placer = Placer::new(memory.clone(), PageHasher::new(&DigestKey([5; 32])), table);
    if let Some(frame) = sealed(Kind::Pages, bytes) {
        let _ = placer.place(&frame);
    }
}

/// A frame whose header and checksum are right, as far as a checksum can be: that of a batch covers the
/// hashes of what its pages become.
fn sealed(kind: Kind, body: &[u8]) -> Option<FrameBuffer> {
    let mut header = Header { kind, body_len: u32::try_from(body.len()).ok()?, step: 0, sequence: 0, checksum: 0 };
    header.checksum = header.checksum_of(body);
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(body);
    let mut frame = FrameBuffer::new();
    frame.fill(&bytes).ok()?;
    Some(frame)
}
