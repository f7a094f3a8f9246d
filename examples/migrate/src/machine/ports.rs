//! Who answers at which I/O port.

use std::ops::RangeInclusive;

/// The serial console's registers (COM1).
pub(super) const SERIAL: RangeInclusive<u16> = 0x3f8..=0x3ff;
/// The keyboard controller, which has no keyboard: it is always ready for a command ...
pub(super) const KEYBOARD: u16 = 0x64;
pub(super) const KEYBOARD_IDLE: u8 = 0;
/// ... and knows one, the reset of the PC.
pub(super) const KEYBOARD_RESET: u8 = 0xfe;
/// Microseconds that a vCPU with nothing to do wants to rest (our payload; 32 bits).
pub(super) const REST: u16 = 0xe00;
/// Number of the heartbeat that happens now (our payload; 32 bits).
pub(super) const BEAT: u16 = 0xe04;
/// The next command for the guest, 0 for none; reading takes it away (our payload; 32 bits).
pub(super) const COMMAND: u16 = 0xe08;
