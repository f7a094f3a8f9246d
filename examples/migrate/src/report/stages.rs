//! What each stage of the encoder saved, and what finding that out took.

use pageferry::stats::Stages;
use pageferry::units::PAGE_SIZE;
use serde::{Deserialize, Serialize};

use super::ms;
use super::tables::{align, show_ms, show_ratio};
use crate::cli::units::show_bytes;

/// Pages by what became of them. `saved_bytes` of all stages and `packed_bytes` add up to `guest_bytes`.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
pub(crate) struct StagesLine {
    /// Guest memory covered; a page counts every time it was looked at.
    pub(crate) guest_bytes: u64,
    /// Pages of zeros.
    pub(crate) zero: StageLine,
    /// Dirty pages whose content was the same as last sent.
    pub(crate) unchanged: StageLine,
    /// Pages of one repeated 8-byte value.
    pub(crate) pattern: StageLine,
    /// Pages sent as what changed in them since they were last sent.
    pub(crate) delta: StageLine,
    /// Pages sent as a reference to an equal page.
    pub(crate) duplicate: StageLine,
    /// Whatever the stages before had left, packed by zstd.
    pub(crate) packing: StageLine,
    /// Pages sent whole.
    pub(crate) literal_pages: u64,
    /// Times that a dirty page was left for later, since the guest would have written it again; not in
    /// `guest_bytes`.
    pub(crate) spared_pages: u64,
    /// Page content left for packing.
    pub(crate) payload_bytes: u64,
    /// Page content on the wire.
    pub(crate) packed_bytes: u64,
    /// Frame headers and the records that say which pages follow.
    pub(crate) head_bytes: u64,
    /// Time of the encoder threads, all together.
    pub(crate) encoder_ms: EncoderTime,
}

/// One stage.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct StageLine {
    /// Pages that ended here; for the packing, pages with something left to pack.
    pub(crate) pages: u64,
    /// Page content that the stage kept off the wire.
    pub(crate) saved_bytes: u64,
}

/// Where the encoders' time went.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Debug)]
pub(crate) struct EncoderTime {
    /// Reading, comparing and hashing.
    pub(crate) scan: f64,
    /// Making deltas.
    pub(crate) delta: f64,
    /// Packing, trials of other levels included.
    pub(crate) pack: f64,
}

impl From<&Stages> for StagesLine {
    fn from(stages: &Stages) -> Self {
        let saved = stages.saved();
        let line = |pages, saved_bytes| StageLine { pages, saved_bytes };
        let with_payload = stages.pattern_pages + stages.delta_pages + stages.literal_pages;
        Self {
            guest_bytes: stages.covered_bytes(),
            zero: line(stages.zero_pages, saved.zero),
            unchanged: line(stages.unchanged_pages, saved.unchanged),
            pattern: line(stages.pattern_pages, saved.pattern),
            delta: line(stages.delta_pages, saved.delta),
            duplicate: line(stages.copied_pages, saved.copied),
            packing: line(with_payload, saved.packing),
            literal_pages: stages.literal_pages,
            spared_pages: stages.spared_pages,
            payload_bytes: stages.payload_bytes,
            packed_bytes: stages.packed_bytes,
            head_bytes: stages.head_bytes,
            encoder_ms: EncoderTime {
                scan: ms(stages.scan_time),
                delta: ms(stages.delta_time),
                pack: ms(stages.pack_time),
            },
        }
    }
}

impl StagesLine {
    /// Each stage with its name, in the order in which a page meets them.
    fn named(&self) -> [(&'static str, StageLine); 6] {
        [
            ("zero", self.zero),
            ("unchanged", self.unchanged),
            ("pattern", self.pattern),
            ("delta", self.delta),
            ("duplicate", self.duplicate),
            ("zstd", self.packing),
        ]
    }
}

impl EncoderTime {
    /// The parts with their sum.
    pub(super) fn show(&self) -> String {
        let Self { scan, delta, pack } = *self;
        let parts =
            [("scan", scan), ("deltas", delta), ("zstd", pack)].map(|(name, ms)| format!("{name} {}", show_ms(ms)));
        format!("{} of encoder threads = {}", show_ms(scan + delta + pack), parts.join(" + "))
    }
}

/// The stages as a table: what each kept off the wire, and what was left.
pub(super) fn table(stages: &StagesLine) -> String {
    let share = |bytes| show_ratio(bytes, stages.guest_bytes);
    let row =
        |name: &str, pages: u64, bytes: u64| vec![name.to_owned(), pages.to_string(), show_bytes(bytes), share(bytes)];
    let mut rows: Vec<_> =
        stages.named().iter().map(|(name, stage)| row(name, stage.pages, stage.saved_bytes)).collect();
    rows.push(row("= sent", stages.guest_bytes / PAGE_SIZE as u64, stages.packed_bytes + stages.head_bytes));
    align(&["stage", "pages", "saved", "share"], &rows)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn stages() -> Stages {
        let mut stages = Stages::default();
        (stages.zero_pages, stages.unchanged_pages, stages.pattern_pages) = (30, 2, 3);
        (stages.delta_pages, stages.copied_pages, stages.literal_pages) = (5, 10, 50);
        stages.delta_bytes = 5 * 96;
        stages.payload_bytes = 50 * 4096 + 5 * 96 + 3 * 8;
        (stages.packed_bytes, stages.head_bytes) = (25 * 4096, 4096);
        stages.scan_time = Duration::from_millis(1);
        stages.pack_time = Duration::from_millis(4);
        stages
    }

    #[test]
    fn the_savings_and_what_is_left_add_up_to_the_guests_memory() {
        let line = StagesLine::from(&stages());
        let saved: u64 = line.named().iter().map(|(_, stage)| stage.saved_bytes).sum();
        assert_eq!(saved + line.packed_bytes, line.guest_bytes);
        assert_eq!((line.guest_bytes, line.packing.pages), (100 * 4096, 58));
    }

    #[test]
    fn people_see_what_each_stage_saved_and_what_is_left() {
        let line = StagesLine::from(&stages());
        let text = table(&line);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[1], ["zero", "30", "120", "KiB", "30", "%"]);
        assert_eq!(rows[6], ["zstd", "58", "100", "KiB", "25", "%"]);
        assert_eq!(rows[7], ["=", "sent", "100", "104", "KiB", "26", "%"]);
        assert_eq!(line.encoder_ms.show(), "5.0 ms of encoder threads = scan 1.0 ms + deltas 0 us + zstd 4.0 ms");
    }
}
