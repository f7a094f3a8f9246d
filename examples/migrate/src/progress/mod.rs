//! What a run shows while it goes on: JSON lines for scripts, a bar on a terminal, plain lines
//! everywhere else. Nothing here is coloured, so nothing needs to be taken out of a log.

mod eta;
mod events;

pub(crate) use events::JsonEvent;

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry::host::Observer;
use pageferry::stats::{Event, Progress, RoundReport};

use crate::cli::units::{show_bytes, show_duration, show_rate};
use crate::report::{self, FinalReport, show_ratio};
use eta::Eta;

/// Plain output says how things stand this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(2);

/// Where everything that a run says goes through.
#[derive(Debug)]
pub(crate) struct Screen(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    style: Style,
    eta: Eta,
    /// When a plain progress line was last shown, since the start of the migration.
    last_plain: Option<Duration>,
    accepted: bool,
}

#[derive(Debug)]
enum Style {
    Json,
    Bar(ProgressBar),
    Plain,
}

impl Screen {
    /// JSON if asked for, else what fits standard error.
    pub(crate) fn choose(json: bool) -> Self {
        let style = match (json, io::stderr().is_terminal()) {
            (true, _) => Style::Json,
            (false, true) => Style::Bar(bar()),
            (false, false) => Style::Plain,
        };
        Self(Mutex::new(Inner { style, eta: Eta::default(), last_plain: None, accepted: false }))
    }

    /// Whether a migration has come as far as that the destination accepted the guest.
    pub(crate) fn was_accepted(&self) -> bool {
        self.lock().accepted
    }

    /// Tells the operator something.
    pub(crate) fn note(&self, text: &str) {
        self.lock().show(&JsonEvent::Note { text: text.to_owned() }, text);
    }

    /// Says where this side listens, and what a sender is to be given.
    pub(crate) fn listening(&self, address: &str, connect: &str) {
        let text = if connect == address {
            format!("listening on {address}")
        } else {
            format!(
                "listening on {address}; encrypted, for one sender that is given this:\n  migrate send --to {connect}"
            )
        };
        let (address, connect) = (address.to_owned(), connect.to_owned());
        self.lock().show(&JsonEvent::Listening { address, connect }, &text);
    }

    /// Shows a line of the guest's console.
    pub(crate) fn console(&self, line: &str) {
        let inner = self.lock();
        match &inner.style {
            Style::Json => print_json(&JsonEvent::Console { text: line.to_owned() }),
            Style::Bar(bar) => bar.suspend(|| print_line(line)),
            Style::Plain => print_line(line),
        }
    }

    /// The end of a run.
    pub(crate) fn report(&self, report: &FinalReport) {
        let inner = self.lock();
        match &inner.style {
            Style::Json => print_json(report),
            style => {
                style.put_bar_away();
                print_line(report::show(report).trim_end());
            }
        }
    }

    /// The end of a run that came to nothing.
    pub(crate) fn not_started(&self, report: &FinalReport) {
        let inner = self.lock();
        match &inner.style {
            Style::Json => print_json(report),
            style => style.say(&format!("error: {}", report.error.as_deref().unwrap_or("no reason given"))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Observer for Screen {
    fn event(&self, event: &Event) {
        let mut inner = self.lock();
        inner.accepted |= matches!(event, Event::Accepted { .. });
        let remaining = match event {
            Event::Progress(progress) => inner.eta.update(progress.elapsed, progress.remaining),
            _ => None,
        };
        match (&inner.style, event) {
            (Style::Json, _) => {
                if let Some(line) = JsonEvent::of(event, remaining) {
                    print_json(&line);
                }
            }
            (Style::Bar(bar), Event::Progress(progress)) => draw(bar, progress, remaining),
            (Style::Plain, Event::Progress(progress)) => inner.plain_progress(progress, remaining),
            (style, _) => {
                if let Some(text) = words(event) {
                    style.say(&text);
                }
                if matches!(event, Event::HandedOver | Event::Aborted) {
                    style.put_bar_away();
                }
            }
        }
    }
}

impl Inner {
    fn show(&self, event: &JsonEvent, text: &str) {
        match &self.style {
            Style::Json => print_json(event),
            style => style.say(text),
        }
    }

    fn plain_progress(&mut self, progress: &Progress, remaining: Option<Duration>) {
        let due = self.last_plain.is_none_or(|last| progress.elapsed >= last + PLAIN_INTERVAL);
        if due {
            self.last_plain = Some(progress.elapsed);
            let percent = percent_done(progress);
            self.style.say(&format!("{percent:.0} % {}", describe(progress, remaining)));
        }
    }
}

impl Style {
    fn put_bar_away(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }

    /// A line for people, on standard error.
    fn say(&self, text: &str) {
        match self {
            Self::Bar(bar) => bar.suspend(|| say_line(text)),
            _ => say_line(text),
        }
    }
}

/// A bar that is not shown before there is progress to show.
fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
    if let Ok(style) = ProgressStyle::with_template("[{bar:8}] {percent:>3} % {wide_msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn draw(bar: &ProgressBar, progress: &Progress, remaining: Option<Duration>) {
    bar.set_message(describe(progress, remaining));
    bar.set_length(progress.round_pages);
    bar.set_position(progress.round_pages.saturating_sub(progress.remaining_pages));
    if bar.is_hidden() {
        bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(8));
    }
}

fn percent_done(progress: &Progress) -> f64 {
    let done = progress.round_pages.saturating_sub(progress.remaining_pages);
    if progress.round_pages == 0 { 100.0 } else { done as f64 * 100.0 / progress.round_pages as f64 }
}

fn describe(progress: &Progress, remaining: Option<Duration>) -> String {
    let left = show_bytes(progress.remaining_pages * pageferry::units::PAGE_SIZE as u64);
    let dirty = progress.dirty_rate.map_or("unknown".to_owned(), show_rate);
    let eta = remaining.map_or("unknown".to_owned(), show_duration);
    let (round, rate) = (progress.round, show_rate(progress.wire_rate));
    let ratio = show_ratio(progress.wire_bytes, progress.guest_bytes);
    format!("round {round}, ETA {eta}, {left} left, {rate}, dirty {dirty}, ratio {ratio}")
}

/// An event in words, where it is worth a line.
fn words(event: &Event) -> Option<String> {
    match event {
        Event::Accepted { peer, pages_total } => Some(format!("{peer} accepted the guest of {pages_total} pages")),
        Event::RoundFinished(round) => Some(round_words(round)),
        Event::Throttled(0) => Some("the vCPUs run at full speed again".to_owned()),
        Event::Throttled(percent) => Some(format!("rounds do not shrink: vCPUs slowed down by {percent} %")),
        Event::Paused => Some("guest paused for the switch-over".to_owned()),
        Event::HandedOver => Some("guest runs at the destination".to_owned()),
        Event::Aborted => Some("migration given up; the guest stays at the source".to_owned()),
        _ => None,
    }
}

fn round_words(round: &RoundReport) -> String {
    format!(
        "round {}: {} pages ({} zero) in {}, {} on the wire at {}, {} pages dirty again",
        round.round,
        round.pages,
        round.zero_pages,
        show_duration(round.duration),
        show_bytes(round.wire_bytes),
        show_rate(round.wire_rate),
        round.dirty_pages
    )
}

fn print_json(line: &impl serde::Serialize) {
    if let Ok(text) = serde_json::to_string(line) {
        print_line(&text);
    }
}

/// A line on standard output. A reader that has gone must not harm the guest.
fn print_line(text: &str) {
    let mut out = io::stdout().lock();
    let _ = writeln!(out, "{text}").and_then(|()| out.flush());
}

fn say_line(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_progress_line_tells_rate_remaining_dirty_rate_round_and_time_left() {
        let progress = Progress {
            round: 3,
            round_pages: 1000,
            remaining_pages: 256,
            wire_bytes: 42,
            guest_bytes: 100,
            wire_rate: 110.0 * 1024.0 * 1024.0,
            dirty_rate: Some(20.0 * 1024.0 * 1024.0),
            ..Progress::default()
        };
        let text = describe(&progress, Some(Duration::from_secs(4)));
        assert_eq!(text, "round 3, ETA 4.0 s, 1 MiB left, 110 MiB/s, dirty 20 MiB/s, ratio 42 %");
        assert!((percent_done(&progress) - 74.4).abs() < 0.01);
    }

    #[test]
    fn an_empty_round_is_done_and_an_unknown_time_is_said_to_be_unknown() {
        assert!((percent_done(&Progress::default()) - 100.0).abs() < 0.01);
        assert!(describe(&Progress::default(), None).contains("ETA unknown"));
    }
}
