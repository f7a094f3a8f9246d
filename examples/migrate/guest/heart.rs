//! A vCPU's heart: it looks at the clock all the time and remembers the longest gap. vCPU 0's also beats,
//! that is, writes a port that the host time-stamps, and prints.

use core::fmt::{self, Write};

use crate::hardware::{port_write, print_byte, tsc};
use crate::ledger::{Entry, Ledger};
use crate::workload::line::Line;
use crate::workload::ports;

/// A rest for a vCPU that has nothing left to do: a second at a time.
pub(crate) const MICROS_FOREVER: u32 = 1_000_000;

/// The guest's time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    khz: u64,
}

impl Clock {
    /// A clock of this frequency.
    pub(crate) const fn new(khz: u64) -> Self {
        Self { khz }
    }

    /// Ticks in a second.
    pub(crate) const fn ticks_per_second(self) -> u64 {
        self.khz * 1000
    }

    /// Ticks in so many milliseconds.
    pub(crate) fn ticks(self, ms: u32) -> u64 {
        self.khz * u64::from(ms)
    }

    /// Microseconds in so many ticks.
    pub(crate) const fn micros(self, ticks: u64) -> u64 {
        ticks.saturating_mul(1000) / self.khz
    }
}

/// The heart.
#[derive(Debug)]
pub(crate) struct Heart {
    ledger: &'static Ledger,
    interval: u64,
    last_look: u64,
    next_beat: u64,
}

impl Heart {
    /// A heart that only looks at the clock.
    pub(crate) fn new(ledger: &'static Ledger) -> Self {
        Self { ledger, interval: 0, last_look: tsc(), next_beat: u64::MAX }
    }

    /// Beats once in `interval` ticks from now on.
    pub(crate) fn beat_every(&mut self, interval: u64) {
        self.interval = interval;
        self.next_beat = tsc();
    }

    /// Looks at the clock, and beats if it is time to.
    pub(crate) fn look(&mut self) -> u64 {
        let now = tsc();
        self.note_gap(now.saturating_sub(self.last_look));
        self.last_look = now;
        if now >= self.next_beat {
            self.next_beat = now + self.interval;
            let beats = self.ledger.load(Entry::Beats) + 1;
            self.ledger.store(Entry::Beats, beats);
            port_write(ports::BEAT, beats as u32);
        }
        now
    }

    /// When the next beat is due.
    pub(crate) const fn next_beat(&self) -> u64 {
        self.next_beat
    }

    /// Prints a line.
    pub(crate) fn print(&mut self, line: &Line<'_>) {
        // Writing to the port cannot fail, and neither does formatting numbers.
        let _ = writeln!(self, "{line}");
    }

    /// Forgets the gaps so far.
    pub(crate) fn forget_gaps(&self) {
        self.ledger.store(Entry::LongestGap, 0);
        self.ledger.store(Entry::RecentGap, 0);
    }

    fn note_gap(&self, gap: u64) {
        for entry in [Entry::LongestGap, Entry::RecentGap] {
            if gap > self.ledger.load(entry) {
                self.ledger.store(entry, gap);
            }
        }
    }
}

/// A byte on the serial port takes the hypervisor some time, so the heart goes on between them.
impl Write for Heart {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            print_byte(byte);
            self.look();
        }
        Ok(())
    }
}
