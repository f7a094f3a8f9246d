//! What a guest prints, shown to the operator for as long as there is a guest.
//!
//! Our own program prints lines for this program to read: the operator sees only the others. A kernel of the user's
//! may print anything, also a prompt that no line end follows: it is shown when nothing more comes for a moment.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, unbounded};

use crate::machine::GuestHandle;
use crate::progress::Screen;
use crate::workload::line::Line;

/// An unfinished line is shown when nothing follows it for this long.
const UNFINISHED: Duration = Duration::from_millis(50);

/// Longest line shown as one; what is longer comes in pieces.
const LINE_MAX: usize = 4096;

/// The guest's end of a console, and the bytes that it prints.
pub(super) fn channel() -> (Box<dyn Write + Send>, Receiver<Vec<u8>>) {
    let (sender, receiver) = unbounded();
    (Box::new(Output(sender)), receiver)
}

/// Shows what a guest prints: of our own program its lines that are not meant for us, else all that is `printed`.
pub(super) fn show(handle: &GuestHandle, printed: Receiver<Vec<u8>>, screen: &Arc<Screen>) -> io::Result<()> {
    let (screen, builder) = (Arc::clone(screen), std::thread::Builder::new().name("console".to_owned()));
    if handle.is_payload() {
        let lines = handle.lines();
        let strange =
            move || lines.iter().filter(|line| Line::parse(line).is_none()).for_each(|line| screen.console(&line));
        builder.spawn(strange)?;
    } else {
        builder.spawn(move || show_bytes(&printed, |line| screen.console(line)))?;
    }
    Ok(())
}

/// Passes on bytes; an error once nobody takes them, which ends the echo.
struct Output(Sender<Vec<u8>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn show_bytes(printed: &Receiver<Vec<u8>>, show: impl FnMut(&str)) {
    let mut lines = Lines { show, unfinished: Vec::new(), shown_early: false };
    loop {
        let next = if lines.unfinished.is_empty() {
            printed.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            printed.recv_timeout(UNFINISHED)
        };
        match next {
            Ok(bytes) => bytes.into_iter().for_each(|byte| lines.take(byte)),
            Err(RecvTimeoutError::Timeout) => lines.show_unfinished(),
            Err(RecvTimeoutError::Disconnected) => return lines.show_unfinished(),
        }
    }
}

struct Lines<S> {
    show: S,
    unfinished: Vec<u8>,
    /// What came last was shown without its line end, which adds nothing.
    shown_early: bool,
}

impl<S: FnMut(&str)> Lines<S> {
    fn take(&mut self, byte: u8) {
        match byte {
            b'\r' => {}
            b'\n' if self.shown_early && self.unfinished.is_empty() => self.shown_early = false,
            b'\n' => {
                self.show_now();
                self.shown_early = false;
            }
            _ => self.unfinished.push(byte),
        }
        if self.unfinished.len() >= LINE_MAX {
            self.show_unfinished();
        }
    }

    fn show_unfinished(&mut self) {
        if !self.unfinished.is_empty() {
            self.show_now();
            self.shown_early = true;
        }
    }

    fn show_now(&mut self) {
        (self.show)(&String::from_utf8_lossy(&self.unfinished));
        self.unfinished.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(bytes: &[&[u8]]) -> Vec<String> {
        let (sender, receiver) = unbounded();
        for bytes in bytes {
            sender.send(bytes.to_vec()).unwrap();
        }
        drop(sender);
        let mut lines = Vec::new();
        show_bytes(&receiver, |line| lines.push(line.to_owned()));
        lines
    }

    #[test]
    fn a_kernels_lines_are_shown_whatever_they_look_like() {
        assert_eq!(
            shown(&[b"ready ms=5\r\n", b"\n", b"panic no ", b"root\nlogin: "]),
            ["ready ms=5", "", "panic no root", "login: "]
        );
    }

    #[test]
    fn an_unfinished_line_is_shown_before_its_end_comes_and_only_once() {
        let (sender, receiver) = unbounded();
        let (shown_sender, shown) = unbounded();
        let shower =
            std::thread::spawn(move || show_bytes(&receiver, |line| shown_sender.send(line.to_owned()).unwrap()));
        sender.send(b"login: ".to_vec()).unwrap();
        assert_eq!(shown.recv().unwrap(), "login: ");
        sender.send(b"\nPassword: \n".to_vec()).unwrap();
        assert_eq!(shown.recv().unwrap(), "Password: ");
        drop(sender);
        shower.join().unwrap();
        assert!(shown.try_recv().is_err());
    }
}
