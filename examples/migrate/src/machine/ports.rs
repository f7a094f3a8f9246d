//! Who answers at which I/O port, besides the payload's own ports ([`crate::workload::ports`]).

use std::ops::RangeInclusive;

pub(super) use crate::workload::ports::{BEAT, COMMAND, REST};

/// The serial console's registers (COM1).
pub(super) const SERIAL: RangeInclusive<u16> = 0x3f8..=0x3ff;
/// The keyboard controller, which has no keyboard: it is always ready for a command ...
pub(super) const KEYBOARD: u16 = 0x64;
pub(super) const KEYBOARD_IDLE: u8 = 0;
/// ... and knows one, the reset of the PC.
pub(super) const KEYBOARD_RESET: u8 = 0xfe;
