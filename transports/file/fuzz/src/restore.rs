//! What the fuzz target does with its bytes. `transports/file/tests/corpus.rs` runs the same over the corpus.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory};
use pageferry::vm::VmResult;
use pageferry::wire::{Header, Kind, PROTOCOL_MAX};
use pageferry::{Control, Destination, DestinationConfig, DestinationVm};
use pageferry_file::{FileAcceptor, RestoreOptions};
use twox_hash::XxHash3_128;

/// In the first byte: the others are the file. Without it the lower bits are the number of data lanes, and pieces of them follow.
pub(crate) const WHOLE_FILE: u8 = 0x80;

/// As a piece's kind: its bytes are put on the lane as they are.
pub(crate) const AS_IT_IS: u8 = 0xFF;

/// What a source says, and what it does not.
const KINDS: [Kind; 8] = [
    Kind::Offer,
    Kind::Pages,
    Kind::StepEnd,
    Kind::State,
    Kind::Finish,
    Kind::Heartbeat,
    Kind::Accept,
    Kind::Transport,
];

const BLOCK: usize = 4096;

/// Pages of the largest guest that is taken in.
const MAX_PAGES: u64 = 4096;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// How long to wait for anything at most, where a fuzzer wants to go on.
pub(crate) const SHORT: Duration = Duration::from_millis(200);

/// Restores what the bytes say, waiting so long for a guest to be offered, and five times as long for more of it; whether a guest
/// came out.
pub(crate) fn saved(bytes: &[u8], patience: Duration) -> bool {
    let Some((&first, rest)) = bytes.split_first() else { return false };
    let file = if first & WHOLE_FILE == 0 { file_of(u16::from(first % 4), rest) } else { rest.to_vec() };
    let name = format!("ferry-fuzz-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    std::fs::write(&path, file).expect("the folder for temporary files can be written");
    let mut options = RestoreOptions::default();
    options.direct = false;
    let opened = FileAcceptor::open(&path, options);
    // Whoever has it open needs no name.
    std::fs::remove_file(&path).expect("it was written");
    let Ok(acceptor) = opened else { return false };
    let (mut room, mut config) = (Room::default(), DestinationConfig::default());
    config.wait_for_source = Some(patience);
    (config.peer_timeout, config.settle_window) = (5 * patience, Duration::from_millis(50));
    let restored = Destination::new(config).run(&mut room, Arc::new(acceptor), &Control::new());
    assert!(restored.is_err() || room.runs, "a guest that was handed over does not run");
    restored.is_ok()
}

/// A file with right checksums. A piece is its lane, kind and step, a byte each, its length, two bytes, and its bytes: the body of a
/// frame, or [`AS_IT_IS`].
fn file_of(data_lanes: u16, mut pieces: &[u8]) -> Vec<u8> {
    let mut lanes = vec![(0, Vec::new()); usize::from(data_lanes) + 1];
    while let Some((&[lane, kind, step, low, high], rest)) = pieces.split_first_chunk() {
        let (bytes, rest) = rest.split_at(usize::from(u16::from_le_bytes([low, high])).min(rest.len()));
        pieces = rest;
        let lane = usize::from(lane) % lanes.len();
        let (sequence, carried) = &mut lanes[lane];
        *sequence += 1;
        if kind != AS_IT_IS {
            let kind = KINDS[usize::from(kind) % KINDS.len()];
            // A lane's first number is the greeting's, which is not in the file.
            let mut header =
                Header { kind, body_len: bytes.len() as u32, step: step.into(), sequence: *sequence, checksum: 0 };
            header.checksum = header.checksum_of(bytes);
            carried.extend(header.encode());
        }
        carried.extend(bytes);
    }
    let (mut extents, mut table) = (Vec::new(), Vec::new());
    for (lane, (_, carried)) in (0u16..).zip(lanes).filter(|(_, (_, carried))| !carried.is_empty()) {
        let mut extent = carried.clone();
        extent.resize(extent.len().next_multiple_of(BLOCK), 0);
        table.extend((carried.len() as u32).to_le_bytes());
        table.extend(lane.to_le_bytes());
        table.extend([0; 2]);
        table.extend(XxHash3_128::oneshot(&extent).to_le_bytes());
        extents.extend(extent);
    }
    let count = (table.len() / 24) as u64;
    table.resize(table.len().next_multiple_of(BLOCK), 0);
    let table_offset = (BLOCK + extents.len()) as u64;
    let mut header = vec![0; BLOCK];
    header[0..8].copy_from_slice(b"PGFYSAVE");
    header[8..12].copy_from_slice(&1u32.to_le_bytes());
    header[12..14].copy_from_slice(&PROTOCOL_MAX.to_le_bytes());
    header[14..16].copy_from_slice(&data_lanes.to_le_bytes());
    header[16..24].copy_from_slice(&(table_offset + table.len() as u64).to_le_bytes());
    header[24..32].copy_from_slice(&table_offset.to_le_bytes());
    header[32..40].copy_from_slice(&count.to_le_bytes());
    header[40..56].copy_from_slice(&XxHash3_128::oneshot(&table).to_le_bytes());
    let check = XxHash3_128::oneshot(&header[..BLOCK - 16]);
    header[BLOCK - 16..].copy_from_slice(&check.to_le_bytes());
    [header, extents, table].concat()
}

/// Takes small guests.
#[derive(Default)]
struct Room {
    runs: bool,
}

impl DestinationVm for Room {
    fn prepare(&mut self, _config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        if layout.page_count() > MAX_PAGES {
            return Err("too much memory".into());
        }
        Ok(Arc::new(MappedMemory::new(layout.clone(), Backing::Anonymous)?))
    }

    fn load(&mut self, state: &mut dyn Read) -> VmResult<()> {
        std::io::copy(state, &mut std::io::sink())?;
        Ok(())
    }

    fn commit(&mut self, _run: bool) -> VmResult<()> {
        self.runs = true;
        Ok(())
    }

    fn abort(&mut self) {
        assert!(!self.runs, "a guest that runs must not be given up");
    }
}
