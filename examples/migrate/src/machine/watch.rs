//! What the host sees of a guest: its lines, its heartbeats and its end.

use std::sync::Mutex;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::devices::lock;
use crate::workload::line::Line;

/// Collects what the guest does; shared by the devices and everyone who listens.
#[derive(Debug, Default)]
pub(super) struct Watch(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    listeners: Vec<Sender<String>>,
    beats: u64,
    ready: bool,
    end: Option<String>,
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
        seen.ready |= matches!(Line::parse(text), Some(Line::Ready { .. }));
        seen.listeners.retain(|listener| listener.send(text.to_owned()).is_ok());
    }

    pub(super) fn beat(&self) {
        lock(&self.0).beats += 1;
    }

    /// The payload's heartbeats on this side.
    pub(super) fn beats(&self) -> u64 {
        lock(&self.0).beats
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
        let heard: Vec<String> = early.iter().collect();
        assert_eq!(heard, ["one", "two"]);
        assert_eq!(watch.end().as_deref(), Some("it was reset"));
        assert!(watch.listen().recv().is_err(), "nobody waits for a guest that has ended");
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
