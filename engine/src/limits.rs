//! Every bound of the engine, with its reason. Nothing that a peer sends and nothing that a guest
//! does may make the engine hold more than these allow.

use std::time::Duration;

/// Regions in a layout. The busiest VMM in use describes a few hundred (one per hot-plugged DIMM).
pub const MAX_REGIONS: usize = 4096;

/// Pages in a layout: 256 TiB, past what x86-64 hosts address with 48 bits.
pub const MAX_PAGES: u64 = 1 << 36;

/// Bytes of a region's name: a full layout and a full configuration together fit one frame.
pub const MAX_REGION_NAME: usize = 64;

/// Pages in one batch, and so in one frame of literal pages: 512 KiB stays in a core's L2 cache
/// between copy, hash and send, and is long enough to hide the cost of a frame.
pub const MAX_BATCH_PAGES: usize = 128;

/// Bytes of a page's delta. Half a page: what is longer saves too little to be worth keeping the base.
pub const MAX_DELTA: usize = 2048;

/// Bytes of a batch's payload before packing: all of its pages literal. Deltas are smaller than pages.
pub const MAX_PAYLOAD: usize = MAX_BATCH_PAGES * crate::units::PAGE_SIZE;

/// Bytes of a frame's body: one batch of literal pages and its records, rounded up generously.
pub const MAX_FRAME_BODY: usize = 1 << 20;

/// Bytes of the VM's description sent before any page (`SourceVm::describe`).
pub const MAX_CONFIG: usize = 512 << 10;

/// Bytes of machine state sent while the guest is stopped. Virtual GPUs carry gigabytes; the
/// destination grows its buffer only as the bytes arrive, never by the announced length.
pub const MAX_STATE: u64 = 4 << 30;

/// Bytes of machine state per frame.
pub const STATE_CHUNK: usize = 256 << 10;

/// Pieces of machine state that wait for the control lane: 4 MiB.
pub const MAX_STATE_PIECES: usize = 16;

/// Bytes of a reason or an error text from the peer; longer ones are cut by the sender.
pub const MAX_TEXT: usize = 1024;

/// Lanes of a migration. Published measurements stop gaining at 8 to 16; vMotion uses one per 15 Gbps.
pub const MAX_LANES: u16 = 128;

/// Bytes of a greeting's frame, with room for a longer one of a later version.
pub const MAX_GREETING: usize = 256;

/// Lanes that may stand in the door at once, connected and not yet introduced. One more pushes out another, of the host with
/// the most.
pub const MAX_PENDING_LANES: usize = 256;

/// Time a new lane has to introduce itself before it is dropped as a stranger.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(5);

/// Time that a lane which has introduced itself waits for a destination that is busy with its VMM. By then a source has given
/// up by its default peer timeout, and asks again by another lane.
pub const GREETED_TIMEOUT: Duration = Duration::from_secs(10);

/// Batches at work or waiting for a lane, per encoder: one in its hands, and some that it can go on with while a lane
/// sends a batch that was left raw. With two the encoder waited for a tenth of the time (`benches/NOTES.md`).
pub const BATCHES_PER_ENCODER: usize = 6;

/// Batches at work or waiting, per lane: one that it sends and one to go on with. Few, so that a page is
/// re-armed shortly before it is read (R2 costs a resend for every write in between), and so that little is
/// under way when the guest stops.
pub const BATCHES_PER_LANE: usize = 2;

/// Batches at work or waiting in all, whatever the numbers of encoders and lanes: each holds up to
/// 1 MiB of buffers.
pub const MAX_BATCHES: usize = 288;

/// Encoder threads. More than this feed a link of 400 Gbps.
pub const MAX_ENCODERS: u16 = 128;

/// Slots of the index of duplicates per page with content, 8 bytes each: half of them empty, so that
/// hardly a bucket runs over.
pub const DUPLICATE_SLOTS_PER_PAGE: u64 = 2;

/// Slots of the smallest index of duplicates: 256 KiB.
pub const MIN_DUPLICATE_SLOTS: u64 = 1 << 15;

/// Pages per lazily made chunk of the page-hash table (16 bytes a page: 512 KiB).
pub const HASH_CHUNK_PAGES: u64 = 1 << 15;

/// Bytes per second that a bandwidth cap must leave: a full frame may not take longer than a peer
/// waits for a sign of life.
pub const MIN_BANDWIDTH: u64 = 256 << 10;

/// Rounds of pre-copy. The total timeout ends a migration long before this; it only keeps the
/// report of a guest that never converges bounded.
pub const MAX_ROUNDS: u32 = 10_000;

/// How often the dirty bits are looked at while a round is under way: it shows which pages are hot, and
/// which of those last sent are worth keeping as bases. A clean harvest costs microseconds per GiB.
pub const HARVEST_EVERY: Duration = Duration::from_millis(500);

/// After such a look so many times as long as it took must pass before the next: on a host where it takes
/// seconds the rest of the driver's work must not starve.
pub const HARVEST_REST: u32 = 9;

/// Pages that are armed ahead of their turn at each such look: 256 MiB, a millisecond for KVM.
pub const WATCH_AHEAD_PAGES: u64 = 1 << 16;

/// Hot pages may be left for the last round as far as they take one part in so many of the downtime
/// limit: they would be dirty then anyway, and if they cool down instead, little was lost.
pub const HOLD_SHARE: u32 = 4;

/// Events that may wait for the driver before a receiving lane waits too, and so the peer.
pub const EVENT_QUEUE: usize = 256;

/// How often an idle side says that it is alive.
pub const HEARTBEAT: Duration = Duration::from_millis(500);

/// Time between two attempts to ask who owns the guest.
pub const SETTLE_RETRY: Duration = Duration::from_millis(500);

/// Memory of a batch's buffers, in bytes: its payload, packed and not, each with room to spare, and its records.
pub const BATCH_MEMORY: u64 = (1 << 20) + (64 << 10);

/// Memory of an encoder, in bytes: zstd's tables at the highest level, a payload, deltas.
pub const ENCODER_MEMORY: u64 = 22 << 20;

/// Memory of a lane, in bytes: a frame and a payload; at the source a batch of its own.
pub const LANE_MEMORY: u64 = 4 << 20;

/// Memory of a session, in bytes: machine state that waits for the control lane, the VM's description, the report of
/// [`MAX_ROUNDS`] rounds, the first chunks of tables.
pub const SESSION_MEMORY: u64 = 16 << 20;

/// A peer that is alive may go this many times its silence limit without visible progress: the VMM
/// makes room, loads state, or a very slow link is busy with one frame.
pub const WORK_FACTOR: u32 = 6;

/// A guest that stands still waits so many times as long as was predicted, and the time of [`WORK_FACTOR`] besides, for a
/// destination that says it makes progress.
pub const STANDSTILL_FACTOR: u32 = 10;

/// Pages that a full verification is expected to hash in a second at least: 256 MiB.
pub const SLOWEST_VERIFY_PAGES: u64 = 65_536;

/// How long after a lane's end, or that of the control lane's sending half, the control lane may still
/// tell the reason. A destination that sees a data lane end waits twice as long, so that the source,
/// which may wait too, speaks first.
pub const REASON_GRACE: Duration = Duration::from_millis(250);

/// How long the last message of a migration may take to leave before the lanes are closed.
pub const FAREWELL: Duration = Duration::from_millis(500);
