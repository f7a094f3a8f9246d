//! What the host sees of a guest: its lines, its heartbeats and its end.

use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::devices::lock;
use crate::guest::Written;
use crate::workload::line::Line;

/// Collects what the guest does; shared by the devices and everyone who listens.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    listeners: Vec<Sender<String>>,
    beats: u64,
    /// When the heart last beat, in nanoseconds of the host's wall clock: the one clock that two hosts share.
    last_beat_ns: Option<u64>,
    /// The last beat at the source, until the first one here.
    left_ns: Option<u64>,
    gap_across: Duration,
    ready: bool,
    written: Option<Written>,
    end: Option<String>,
}

impl Seen {
    fn beat_at(&mut self, now_ns: u64) {
        self.beats += 1;
        self.last_beat_ns = Some(now_ns);
        if let Some(left) = self.left_ns.take() {
            self.gap_across = Duration::from_nanos(now_ns.saturating_sub(left));
        }
    }
}

impl Watch {
    /// Every line from now on, until the guest ends. Drop the receiver to stop listening.
    pub(super) fn listen(&self) -> Receiver<String> {
        let (sender, receiver) = unbounded();
        let mut seen = lock(&self.0);
        if seen.end.is_none() {
            seen.listeners.push(sender);
        }
        receiver
    }

    pub(super) fn line(&self, text: &str) {
        let mut seen = lock(&self.0);
        match Line::parse(text) {
            Some(Line::Ready { .. }) => seen.ready = true,
            Some(Line::Heartbeat { writes, .. }) => seen.written = Some(Written { at: Instant::now(), pages: writes }),
            _ => {}
        }
        seen.listeners.retain(|listener| listener.send(text.to_owned()).is_ok());
    }

    pub(super) fn beat(&self) {
        lock(&self.0).beat_at(now_ns());
    }

    /// When the heart last beat; part of the machine state.
    pub(super) fn last_beat_ns(&self) -> Option<u64> {
        lock(&self.0).last_beat_ns
    }

    /// The guest comes from another machine, where its heart beat last at this time.
    pub(super) fn set_left(&self, last_beat_ns: Option<u64>) {
        lock(&self.0).left_ns = last_beat_ns;
    }

    /// The time between the last heartbeat at the source and the first one here, by the hosts' clocks. The
    /// guest's own clock may not show it: its TSC is saved and goes on from there.
    pub(super) fn gap_across(&self) -> Duration {
        lock(&self.0).gap_across
    }

    pub(super) fn forget_gap(&self) {
        lock(&self.0).gap_across = Duration::ZERO;
    }

    /// The payload's heartbeats on this side.
    pub(super) fn beats(&self) -> u64 {
        lock(&self.0).beats
    }

    /// What the payload's last line of a heartbeat on this side says.
    pub(super) fn written(&self) -> Option<Written> {
        lock(&self.0).written
    }

    /// The payload has filled its memory.
    pub(super) fn is_ready(&self) -> bool {
        lock(&self.0).ready
    }

    pub(super) fn set_ready(&self, ready: bool) {
        lock(&self.0).ready = ready;
    }

    /// The guest has ended; nobody will hear another line.
    pub(super) fn ended(&self, why: String) {
        let mut seen = lock(&self.0);
        seen.end = Some(why);
        seen.listeners.clear();
    }

    pub(super) fn end(&self) -> Option<String> {
        lock(&self.0).end.clone()
    }
}

fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_between_two_machines_is_a_gap_whatever_the_guests_clock_says() {
        let (mut source, destination) = (Seen::default(), Watch::default());
        source.beat_at(5_000_000);
        destination.set_left(source.last_beat_ns);
        assert_eq!(destination.gap_across(), Duration::ZERO);
        for now in [42_000_000, 99_000_000] {
            lock(&destination.0).beat_at(now);
        }
        assert_eq!(destination.gap_across(), Duration::from_millis(37));
        destination.forget_gap();
        assert_eq!(destination.gap_across(), Duration::ZERO);
    }

    #[test]
    fn listeners_hear_lines_until_the_guest_ends() {
        let watch = Watch::default();
        let (early, dropped) = (watch.listen(), watch.listen());
        watch.line("one");
        drop(dropped);
        watch.line("two");
        watch.ended("it was reset".to_owned());
        let heard: Vec<String> = early.iter().collect();
        assert_eq!(heard, ["one", "two"]);
        assert_eq!(watch.end().as_deref(), Some("it was reset"));
        assert!(watch.listen().recv().is_err(), "nobody waits for a guest that has ended");
    }

    #[test]
    fn the_payload_says_how_much_it_has_written() {
        let watch = Watch::default();
        assert_eq!(watch.written(), None);
        watch.line("hb n=1 tsc=ff stall_us=3 writes=7");
        let first = watch.written().unwrap();
        watch.line("hb n=2 tsc=fff stall_us=3 writes=19");
        let second = watch.written().unwrap();
        assert_eq!((first.pages, second.pages), (7, 19));
        assert!(second.at >= first.at);
    }

    #[test]
    fn the_payload_says_when_it_is_ready() {
        let watch = Watch::default();
        watch.line("[    0.000000] Linux version 6.1");
        assert!(!watch.is_ready());
        watch.line("ready ms=812");
        assert!(watch.is_ready());
    }
}
