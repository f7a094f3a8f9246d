//! The serial line of a guest under QEMU: what it prints, with the time at which it did, and what it is asked.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::{BenchError, host, interrupt};

/// Between two looks whether the operator wants to end.
const LOOK_UP: Duration = Duration::from_millis(50);

/// Questions, as digits that the guest reads (`workload/ports.rs` of `migrate`).
const CHECK: u8 = b'1';
const REPORT_STALL: u8 = b'4';
const RESET_STALL: u8 = b'5';

/// A serial line whose other end is QEMU's. Dropping it hangs up.
#[derive(Debug)]
pub(super) struct Console {
    path: PathBuf,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    log: Mutex<Log>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Log {
    lines: Vec<(Instant, String)>,
    stream: Option<UnixStream>,
    hung_up: bool,
}

/// A heartbeat line.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) struct Beat {
    /// By this host's clock.
    pub(super) at: Instant,
    /// By the guest's.
    pub(super) tsc: u64,
    /// Pages that it has written so far.
    pub(super) writes: u64,
}

impl Beat {
    fn parse(at: Instant, line: &str) -> Option<Self> {
        let fields = line.strip_prefix("hb ")?;
        let field = |name: &str| fields.split(' ').find_map(|field| field.strip_prefix(name));
        let tsc = u64::from_str_radix(field("tsc=")?, 16).ok()?;
        Some(Self { at, tsc, writes: field("writes=")?.parse().ok()? })
    }

    /// Pages that the guest wrote per second since an earlier beat; nothing if this is the same one.
    pub(super) fn pages_per_second_since(self, earlier: Self) -> Option<f64> {
        let seconds = self.at.saturating_duration_since(earlier.at).as_secs_f64();
        (seconds > 0.0).then(|| self.writes.saturating_sub(earlier.writes) as f64 / seconds)
    }
}

impl Console {
    /// Waits at `path` for QEMU to call.
    pub(super) fn listen(path: PathBuf) -> Result<Self, BenchError> {
        let listener = UnixListener::bind(&path).map_err(host("cannot make a socket for a serial line"))?;
        let shared = Arc::new(Shared::default());
        let own = Arc::clone(&shared);
        std::thread::spawn(move || {
            if let Ok((stream, _)) = listener.accept() {
                own.read(stream);
            }
        });
        Ok(Self { path, shared })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits until the guest has filled its memory.
    pub(super) fn wait_ready(&self, patience: Duration) -> Result<(), BenchError> {
        self.wait_for(0, "ready ", patience).map(drop)
    }

    /// The first heartbeat.
    pub(super) fn first_beat(&self, patience: Duration) -> Result<Beat, BenchError> {
        let (at, line) = self.wait_for(0, "hb ", patience)?;
        Beat::parse(at, &line).ok_or_else(|| BenchError::Tool(format!("the guest under QEMU says {line:?}")))
    }

    /// The last heartbeat so far.
    pub(super) fn last_beat(&self) -> Option<Beat> {
        let log = self.lock();
        log.lines.iter().rev().find_map(|(at, line)| Beat::parse(*at, line))
    }

    /// The longest time between two looks at the clock since the last time that the guest was asked to forget it.
    pub(super) fn longest_stall(&self, patience: Duration) -> Result<Duration, BenchError> {
        let line = self.ask(REPORT_STALL, "stall ", patience)?;
        let micros = line.split_once("longest_us=").and_then(|(_, digits)| digits.trim().parse().ok());
        micros.map(Duration::from_micros).ok_or_else(|| BenchError::Tool(format!("the guest says {line:?}")))
    }

    /// From here on new stalls count.
    pub(super) fn forget_stalls(&self, patience: Duration) -> Result<(), BenchError> {
        self.say(RESET_STALL)?;
        // It obeys in order.
        self.longest_stall(patience).map(drop)
    }

    /// Has the guest look at every byte of its memory; an error if one is wrong.
    pub(super) fn check(&self, patience: Duration) -> Result<(), BenchError> {
        let line = self.ask(CHECK, "check ", patience)?;
        if line.starts_with("check ok") {
            Ok(())
        } else {
            Err(BenchError::Wrong(format!("the guest under QEMU says {line:?}")))
        }
    }

    fn ask(&self, question: u8, answer: &str, patience: Duration) -> Result<String, BenchError> {
        let heard = self.lock().lines.len();
        self.say(question)?;
        self.wait_for(heard, answer, patience).map(|(_, line)| line)
    }

    fn say(&self, byte: u8) -> Result<(), BenchError> {
        let mut log = self.lock();
        let stream = log.stream.as_mut().ok_or_else(|| BenchError::Tool("QEMU has no serial line".to_owned()))?;
        stream.write_all(&[byte]).map_err(host("cannot speak to the guest under QEMU"))
    }

    /// The first line from number `from` on that starts so.
    fn wait_for(&self, from: usize, start: &str, patience: Duration) -> Result<(Instant, String), BenchError> {
        let deadline = Instant::now() + patience;
        let mut log = self.lock();
        let mut seen = from;
        loop {
            if let Some(found) = log.lines.iter().skip(seen).find(|(_, line)| line.starts_with(start)) {
                return Ok(found.clone());
            }
            let broken = log.lines.iter().skip(seen).any(|(_, line)| line.starts_with("panic "));
            seen = log.lines.len();
            if broken || log.hung_up || Instant::now() > deadline {
                let last: Vec<&str> = log.lines.iter().rev().take(3).map(|(_, line)| line.as_str()).collect();
                return Err(BenchError::Tool(format!(
                    "the guest under QEMU does not say {start:?}, but last {last:?}"
                )));
            }
            interrupt::check()?;
            log = self.shared.changed.wait_timeout(log, LOOK_UP).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, stream: UnixStream) {
        let writing = stream.try_clone();
        self.lock().stream = writing.ok();
        let lines = BufReader::new(stream).split(b'\n').map_while(Result::ok);
        for line in lines {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            self.lock().lines.push((Instant::now(), text));
            self.changed.notify_all();
        }
        self.lock().hung_up = true;
        self.changed.notify_all();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // Ends the thread, whether QEMU has called or not.
        let stream = self.lock().stream.take();
        match stream {
            Some(stream) => drop(stream.shutdown(Shutdown::Both)),
            None => drop(UnixStream::connect(&self.path)),
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// What went by between two heartbeats that the guest's clock does not know of: QEMU stops it with the guest.
pub(super) fn hidden(before: Beat, after: Beat, tsc_khz: u64) -> Duration {
    let by_guest = after.tsc.saturating_sub(before.tsc) as f64 / (tsc_khz.max(1) as f64 * 1e3);
    after.at.saturating_duration_since(before.at).saturating_sub(Duration::from_secs_f64(by_guest))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use crate::scratch::Scratch;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_guest_is_heard_and_asked() {
        let scratch = Scratch::new().unwrap();
        let console = Console::listen(scratch.fresh("serial")).unwrap();
        let mut guest = UnixStream::connect(console.path()).unwrap();
        guest.write_all(b"boot ram=1 data=1\r\nready ms=5\nhb n=1 tsc=ff stall_us=3 writes=9\n").unwrap();
        console.wait_ready(PATIENCE).unwrap();
        let beat = console.first_beat(PATIENCE).unwrap();
        assert_eq!((beat.tsc, beat.writes), (255, 9));
        assert_eq!(console.last_beat(), Some(beat));
        let answering = std::thread::spawn(move || {
            let mut asked = [0; 4];
            for (index, answer) in
                ["stall longest_us=7000", "", "stall longest_us=9", "check FAILED page=1"].into_iter().enumerate()
            {
                guest.read_exact(&mut asked[index..=index]).unwrap();
                if !answer.is_empty() {
                    guest.write_all(format!("{answer}\n").as_bytes()).unwrap();
                }
            }
            (asked, guest)
        });
        assert_eq!(console.longest_stall(PATIENCE).unwrap(), Duration::from_millis(7));
        console.forget_stalls(PATIENCE).unwrap();
        let error = console.check(PATIENCE).unwrap_err().to_string();
        assert!(error.contains("check FAILED page=1"), "{error}");
        let (asked, guest) = answering.join().unwrap();
        assert_eq!(&asked, b"4541");
        drop(guest);
        let error = console.wait_for(0, "never", PATIENCE).unwrap_err().to_string();
        assert!(error.contains("never"), "{error}");
    }

    #[test]
    fn the_time_that_a_guest_slept_through_is_the_difference_of_two_clocks() {
        let at = Instant::now();
        let before = Beat { at, tsc: 1_000, writes: 10 };
        let after = Beat { at: at + Duration::from_millis(900), tsc: 1_000 + 2_000_000 * 250, writes: 100 };
        assert_eq!(hidden(before, after, 2_000_000), Duration::from_millis(650));
        assert_eq!(hidden(after, before, 2_000_000), Duration::ZERO);
        assert_eq!(after.pages_per_second_since(before), Some(100.0));
        assert_eq!(before.pages_per_second_since(before), None);
    }
}
