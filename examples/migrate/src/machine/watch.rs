//! What the host sees of a guest: its lines, its heartbeats and its end.

use std::sync::{Condvar, Mutex};
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::devices::lock;

/// A line that the guest has printed.
#[derive(Clone, Debug)]
pub(crate) struct GuestLine {
    /// When its last byte came.
    pub(crate) at: Instant,
    /// Its text, without the line end.
    pub(crate) text: String,
}

/// A heartbeat of our payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Beat {
    /// When it happened.
    pub(crate) at: Instant,
    /// The guest's own count.
    pub(crate) number: u32,
}

/// Collects what the guest does; shared by the devices and everyone who listens.
#[derive(Debug, Default)]
pub(super) struct Watch {
    seen: Mutex<Seen>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Seen {
    listeners: Vec<Sender<GuestLine>>,
    last_beat: Option<Beat>,
    ended: Option<String>,
}

impl Watch {
    /// Every line from now on. Drop the receiver to stop listening.
    pub(super) fn listen(&self) -> Receiver<GuestLine> {
        let (sender, receiver) = unbounded();
        lock(&self.seen).listeners.push(sender);
        receiver
    }

    pub(super) fn line(&self, text: &str) {
        let line = GuestLine { at: Instant::now(), text: text.to_owned() };
        lock(&self.seen).listeners.retain(|listener| listener.send(line.clone()).is_ok());
    }

    pub(super) fn beat(&self, number: u32) {
        lock(&self.seen).last_beat = Some(Beat { at: Instant::now(), number });
        self.changed.notify_all();
    }

    pub(super) fn last_beat(&self) -> Option<Beat> {
        lock(&self.seen).last_beat
    }

    /// The guest has ended; nobody will hear another line.
    pub(super) fn ended(&self, why: String) {
        let mut seen = lock(&self.seen);
        seen.ended = Some(why);
        seen.listeners.clear();
        self.changed.notify_all();
    }

    pub(super) fn end(&self) -> Option<String> {
        lock(&self.seen).ended.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_hear_lines_until_the_guest_ends() {
        let watch = Watch::default();
        let (early, dropped) = (watch.listen(), watch.listen());
        watch.line("one");
        drop(dropped);
        watch.line("two");
        watch.ended("it was reset".to_owned());
        let heard: Vec<String> = early.iter().map(|line| line.text).collect();
        assert_eq!(heard, ["one", "two"]);
        assert_eq!(watch.end().as_deref(), Some("it was reset"));
    }
}
