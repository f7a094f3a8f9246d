//! Who answers at which I/O port, besides the payload's own ports ([`crate::workload::ports`]).

use std::ops::RangeInclusive;

pub(super) use crate::workload::ports::{BEAT, COMMAND, REST};

/// The serial console's registers (COM1).
pub(super) const SERIAL: RangeInclusive<u16> = 0x3f8..=0x3ff;
/// The data port of the clock chip, whose registers all read as zero: no update is under way, no date is known.
/// An absent chip would answer with ones, "being updated", and guests would wait long for the end of that.
pub(super) const CLOCK_DATA: u16 = 0x71;
/// The keyboard controller, which has no keyboard. Its status always says that it takes a command, and that
/// there is something to read: drivers then give up at once.
pub(super) const KEYBOARD: u16 = 0x64;
pub(super) const KEYBOARD_STATUS: u8 = 1;
/// The one command it knows: the reset of the PC.
pub(super) const KEYBOARD_RESET: u8 = 0xfe;
