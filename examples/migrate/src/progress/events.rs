//! What happens on the way, as JSON lines. Each has an `event`; the last line of a run is the
//! [final report](crate::report::FinalReport) with `"event": "report"`.

use pageferry::stats::{Event, Progress};
use serde::{Deserialize, Serialize};

use crate::report::{RoundLine, ms};

/// One line.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(crate) enum JsonEvent {
    /// The destination can be reached now, by a sender that is told what to `connect` to: it may hold a secret.
    Listening { address: String, connect: String },
    /// Something the operator should know.
    Note { text: String },
    /// A line that the guest printed on its console.
    Console { text: String },
    /// The destination accepted the guest.
    Accepted { peer: String, pages_total: u64 },
    /// How things stand, a few times a second.
    Progress(ProgressLine),
    /// A round has ended.
    Round(Box<RoundLine>),
    /// The vCPUs are slowed down by this much from now on.
    Throttled { percent: u8 },
    /// The guest was stopped for the switch-over.
    Paused,
    /// The guest runs at the destination.
    HandedOver,
    /// The migration failed; the guest stays at the source.
    Aborted,
}

/// A moment of a running migration.
#[derive(Serialize, Deserialize, Clone, PartialEq, Debug)]
pub(crate) struct ProgressLine {
    pub(crate) elapsed_ms: f64,
    pub(crate) round: u32,
    pub(crate) round_pages: u64,
    pub(crate) remaining_pages: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) guest_bytes: u64,
    pub(crate) wire_bytes_per_second: f64,
    pub(crate) dirty_bytes_per_second: Option<f64>,
    /// Time left, smoothed; `null` while nobody can tell.
    pub(crate) remaining_ms: Option<f64>,
}

impl ProgressLine {
    pub(crate) fn new(progress: &Progress, remaining: Option<std::time::Duration>) -> Self {
        Self {
            elapsed_ms: ms(progress.elapsed),
            round: progress.round,
            round_pages: progress.round_pages,
            remaining_pages: progress.remaining_pages,
            wire_bytes: progress.wire_bytes,
            guest_bytes: progress.guest_bytes,
            wire_bytes_per_second: progress.wire_rate,
            dirty_bytes_per_second: progress.dirty_rate,
            remaining_ms: remaining.map(ms),
        }
    }
}

impl JsonEvent {
    /// The engine's event as a line; `None` for events that this program does not know.
    pub(crate) fn of(event: &Event, remaining: Option<std::time::Duration>) -> Option<Self> {
        Some(match event {
            Event::Accepted { peer, pages_total } => Self::Accepted { peer: peer.clone(), pages_total: *pages_total },
            Event::Progress(progress) => Self::Progress(ProgressLine::new(progress, remaining)),
            Event::RoundFinished(round) => Self::Round(Box::new(RoundLine::from(round))),
            Event::Throttled(percent) => Self::Throttled { percent: *percent },
            Event::Paused => Self::Paused,
            Event::HandedOver => Self::HandedOver,
            Event::Aborted => Self::Aborted,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_an_object_with_its_event_and_comes_back() {
        let progress = ProgressLine::new(&Progress::default(), None);
        for event in [
            JsonEvent::Listening { address: "127.0.0.1:1".to_owned(), connect: "127.0.0.1:1".to_owned() },
            JsonEvent::Paused,
            JsonEvent::Throttled { percent: 20 },
            JsonEvent::Progress(progress),
            JsonEvent::Round(Box::new(RoundLine::from(&pageferry::stats::RoundReport::default()))),
        ] {
            let text = serde_json::to_string(&event).unwrap();
            assert!(text.starts_with("{\"event\":\""), "{text}");
            assert_eq!(serde_json::from_str::<JsonEvent>(&text).unwrap(), event);
        }
    }
}
