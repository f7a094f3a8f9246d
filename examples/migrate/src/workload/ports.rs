//! The I/O ports of the guest, all 32 bits wide except the serial port.
//!
//! A machine without these ports (QEMU) ignores the writes and answers reads with ones: the guest
//! then never rests, and hears commands on the serial port.

/// The data register of the first serial port (COM1), 8 bits wide; the guest prints its lines here,
/// without asking whether the port is ready for a byte: in a virtual machine it always is.
pub(crate) const SERIAL_DATA: u16 = 0x3f8;
/// The status of the first serial port: [`SERIAL_RECEIVED`] is set while a byte waits in [`SERIAL_DATA`].
pub(crate) const SERIAL_STATUS: u16 = 0x3fd;
/// See [`SERIAL_STATUS`].
pub(crate) const SERIAL_RECEIVED: u8 = 1;
/// Written by a vCPU that has nothing to do: the microseconds it wants to sleep. The host sleeps that
/// long outside its locks (a pause or a shorter sleep is fine) and then resumes the vCPU.
pub(crate) const REST: u16 = 0xe00;
/// Written by vCPU 0 every `heartbeat` ms with the number of the beat, for the host to time-stamp.
pub(crate) const BEAT: u16 = 0xe04;
/// Read by vCPU 0 every few ms: the pending [`Command`], which reading takes away; 0 when there is none.
pub(crate) const COMMAND: u16 = 0xe08;

/// What the host asks of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum Command {
    /// Stop writing, check all memory, print the result, and go on as before.
    Check = 1,
    /// Stop writing until [`Command::Resume`]; the heart beats on.
    Stop = 2,
    /// Write again.
    Resume = 3,
    /// Print the longest stall since the last [`Command::ResetStall`].
    ReportStall = 4,
    /// Forget the stalls so far.
    ResetStall = 5,
}

impl Command {
    /// What a machine answers that has no such port.
    pub(crate) const NO_PORT: u32 = u32::MAX;

    /// The command that a byte from the serial port stands for: its number as a digit.
    pub(crate) const fn from_serial(byte: u8) -> Option<Self> {
        Self::from_port((byte as u32).wrapping_sub(b'0' as u32))
    }

    /// The command a read of the port returned.
    pub(crate) const fn from_port(value: u32) -> Option<Self> {
        match value {
            1 => Some(Self::Check),
            2 => Some(Self::Stop),
            3 => Some(Self::Resume),
            4 => Some(Self::ReportStall),
            5 => Some(Self::ResetStall),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_comes_back_from_the_port() {
        for command in [Command::Check, Command::Stop, Command::Resume, Command::ReportStall, Command::ResetStall] {
            assert_eq!(Command::from_port(command as u32), Some(command));
            assert_eq!(Command::from_serial(b'0' + command as u8), Some(command));
        }
    }

    #[test]
    fn a_missing_port_is_no_command() {
        assert_eq!(Command::from_port(Command::NO_PORT), None);
        assert_eq!(Command::from_port(0), None);
        for byte in [0, b'\n', b'0', b'6', 0xff] {
            assert_eq!(Command::from_serial(byte), None);
        }
    }
}
