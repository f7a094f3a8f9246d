//! What a user may choose. Every default is meant to be right without thinking.

use std::time::Duration;

use crate::limits::{
    BATCH_MEMORY, BATCHES_PER_ENCODER, BATCHES_PER_LANE, DUPLICATE_SLOTS_PER_PAGE, ENCODER_MEMORY, HASH_CHUNK_PAGES,
    LANE_MEMORY, MAX_BATCHES, MAX_ENCODERS, MAX_PAGES, SESSION_MEMORY,
};
use crate::transport::Capabilities;
use crate::units::PAGE_SIZE;

/// What to do when the total timeout comes before the guest's memory has become small enough.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnTimeout {
    /// Give up; the guest stays at the source.
    #[default]
    Cancel,
    /// Stop the guest for as long as the rest takes.
    SwitchOver,
}

/// How the two memories are compared before the hand-over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Verify {
    /// A digest kept up to date as pages are sent and placed: proves that what was sent has arrived.
    #[default]
    Digest,
    /// Both sides also hash all memory while the guest is stopped: proves that no write was missed.
    Full,
}

/// How hard what is left of a batch is packed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Compress {
    /// As it pays: measured per batch against the link.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always at this zstd level, [`MIN_LEVEL`](crate::encode::MIN_LEVEL) to
    /// [`MAX_LEVEL`](crate::encode::MAX_LEVEL); others are taken for the nearest.
    Level(i32),
}

/// How the source makes pages small.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EncodeConfig {
    /// Threads that encode. Default: half of the host's cores, at least one, at most 8: the guest's
    /// vCPUs need the others.
    pub threads: u16,
    /// How hard to pack. Default: as it pays.
    pub compress: Compress,
    /// Whether a page that another page equals is sent as a reference. Default: yes. Costs 16 bytes of
    /// memory per page with content.
    pub duplicates: bool,
    /// Bytes of pages kept as they were last sent, so that only what changed needs to be sent again;
    /// taken as pages come, and never more than the guest has. Default 256 MiB; 0 for no deltas.
    pub delta_cache: u64,
}

impl Default for EncodeConfig {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let threads = (cores / 2).clamp(1, 8) as u16;
        Self { threads, compress: Compress::default(), duplicates: true, delta_cache: 256 << 20 }
    }
}

/// Choices of the source.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourceConfig {
    /// Data lanes, 1 to 128. Default 1: fills links up to about 10 Gbps. 0 sends pages on the control
    /// lane, for hosts that have one connection only.
    pub lanes: u16,
    /// Longest acceptable predicted downtime. Default 300 ms. One that the machine state alone exceeds, at the best rate that
    /// the link has shown, cannot be met: the guest then switches over when its dirty pages add no more than a quarter to that.
    pub downtime_limit: Duration,
    /// Longest total time before [`on_timeout`](Self::on_timeout) applies. Default one hour.
    pub timeout: Duration,
    /// What happens then. Default: cancel.
    pub on_timeout: OnTimeout,
    /// Bytes per second over all lanes together, at least
    /// [`MIN_BANDWIDTH`](crate::limits::MIN_BANDWIDTH); `None` (default) for no cap.
    pub bandwidth: Option<u64>,
    /// Most vCPU time in per cent that may be taken away from a guest whose rounds stop shrinking.
    /// Default 99; 0 turns throttling off.
    pub max_throttle: u8,
    /// How pages are made small.
    pub encode: EncodeConfig,
    /// Proof asked for before the hand-over. Default: the incremental digest.
    pub verify: Verify,
    /// A peer that says nothing, or takes nothing, for this long is dead. Default 10 s.
    pub peer_timeout: Duration,
    /// How long to go on asking a peer that fell silent after Commit who owns the guest. Default 30 s.
    pub settle_window: Duration,
}

impl Default for SourceConfig {
    fn default() -> Self {
        Self {
            lanes: 1,
            downtime_limit: Duration::from_millis(300),
            timeout: Duration::from_secs(3600),
            on_timeout: OnTimeout::default(),
            bandwidth: None,
            max_throttle: 99,
            encode: EncodeConfig::default(),
            verify: Verify::default(),
            peer_timeout: Duration::from_secs(10),
            settle_window: Duration::from_secs(30),
        }
    }
}

impl SourceConfig {
    /// The most memory, in bytes, that the engine and its lanes take beside the guest's own: for a guest of so many pages, all
    /// with content, over a transport that can do this ([`Dialer::capabilities`](crate::transport::Dialer::capabilities)). Pages that were never touched cost two bytes at most. With the defaults 256 MiB, 8 MiB per GiB of guest, and some
    /// for every core.
    /// No layout has more than [`MAX_PAGES`].
    pub fn memory_bound(&self, pages: u64, transport: &Capabilities) -> u64 {
        let pages = pages.min(MAX_PAGES);
        let index = if self.encode.duplicates { pages * DUPLICATE_SLOTS_PER_PAGE * 8 } else { 0 };
        let cache = self.encode.delta_cache.min(pages * PAGE_SIZE as u64);
        // An entry of the cache names its page, its content and its place.
        let cache = cache + cache / 80;
        let encoders = u64::from(self.encode.threads.clamp(1, MAX_ENCODERS));
        let lanes = u64::from(self.lanes.max(1));
        let batches = encoders * BATCHES_PER_ENCODER as u64 + lanes * BATCHES_PER_LANE as u64;
        let buffers = batches.min(MAX_BATCHES as u64) * BATCH_MEMORY;
        // Lanes encode too while the link looks fast, and may still have batches to pack when it shows that it is not.
        let packing_lanes = if self.encode.compress == Compress::Auto { lanes } else { 0 };
        let encoding = (encoders + packing_lanes) * ENCODER_MEMORY;
        let lanes = lanes * LANE_MEMORY + transport_memory(self.lanes, transport);
        page_memory(pages) + index + cache + buffers + encoding + lanes + SESSION_MEMORY
    }
}

/// What the transport holds for so many data lanes and a control lane.
fn transport_memory(lanes: u16, transport: &Capabilities) -> u64 {
    (u64::from(lanes) + 1).saturating_mul(transport.lane_memory)
}

/// Hashes and bitmaps of so many pages: a byte a page, and a chunk that is not full.
fn page_memory(pages: u64) -> u64 {
    (pages + HASH_CHUNK_PAGES) * 16 + pages
}

/// Choices of the destination.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DestinationConfig {
    /// How long to wait for a source at all; `None` (default) for as long as it takes.
    pub wait_for_source: Option<Duration>,
    /// A source that says nothing for this long is dead. Default 10 s.
    pub peer_timeout: Duration,
    /// How long to stand ready to answer who owns the guest, when the link broke around Commit.
    /// Default 30 s.
    pub settle_window: Duration,
}

impl Default for DestinationConfig {
    fn default() -> Self {
        Self { wait_for_source: None, peer_timeout: Duration::from_secs(10), settle_window: Duration::from_secs(30) }
    }
}

impl DestinationConfig {
    /// The most memory, in bytes, that the engine and its lanes take beside the guest's own, for a guest of so many pages that
    /// comes over so many data lanes of a transport that can do this
    /// ([`Acceptor::capabilities`](crate::transport::Acceptor::capabilities)). The machine state comes on top, until the VMM has loaded it: as many bytes as the source sends, at most
    /// [`MAX_STATE`](crate::limits::MAX_STATE).
    pub fn memory_bound(&self, pages: u64, lanes: u16, transport: &Capabilities) -> u64 {
        transport_memory(lanes, transport)
            + page_memory(pages.min(MAX_PAGES))
            + (u64::from(lanes.max(1)) + 1) * LANE_MEMORY
            + SESSION_MEMORY
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_is_given_for_any_guest_and_any_choice() {
        let mut config = SourceConfig { lanes: u16::MAX, ..SourceConfig::default() };
        config.encode.threads = u16::MAX;
        config.encode.delta_cache = u64::MAX;
        let transport = Capabilities { lane_memory: 1 << 40, ..Capabilities::default() };
        assert!(config.memory_bound(u64::MAX, &transport) > MAX_PAGES * PAGE_SIZE as u64);
        assert!(DestinationConfig::default().memory_bound(u64::MAX, u16::MAX, &transport) > MAX_PAGES * 16);
    }

    #[test]
    fn what_a_transport_holds_counts_for_every_lane() {
        let transport = |lane_memory| Capabilities { lane_memory, ..Capabilities::default() };
        let source = SourceConfig { lanes: 4, ..SourceConfig::default() };
        let of_source = |lane_memory| source.memory_bound(1000, &transport(lane_memory));
        let of_destination = |lane_memory| DestinationConfig::default().memory_bound(1000, 4, &transport(lane_memory));
        assert_eq!((of_source(100) - of_source(0), of_destination(100) - of_destination(0)), (500, 500));
    }

    #[test]
    fn lanes_that_may_have_to_pack_count_as_encoders() {
        let bound = |lanes, compress| {
            let mut config = SourceConfig { lanes, ..SourceConfig::default() };
            (config.encode.compress, config.encode.threads) = (compress, 1);
            config.memory_bound(0, &Capabilities::default())
        };
        assert!(bound(3, Compress::Auto) - bound(2, Compress::Auto) >= ENCODER_MEMORY);
        assert!(bound(3, Compress::Off) - bound(2, Compress::Off) < ENCODER_MEMORY);
    }
}
