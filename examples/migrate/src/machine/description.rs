//! What the destination must know before it makes room for a guest, and the state it takes over
//! at the end: the two blocks of bytes that cross between the machines of this program.

use std::io::{self, Read};

use pageferry::memory::Backing;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::devices::DevicesState;
use super::error::MachineError;
use super::pc::{Kind, Pc};

/// Changes whenever one of the blocks does.
const VERSION: u16 = 2;

/// More machine state than any guest of this program has; a peer cannot make us read more.
const STATE_MAX: u64 = 64 << 20;

/// A machine as the source describes it.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
pub(super) struct Description {
    pub(super) ram_bytes: u64,
    pub(super) kind: Kind,
    /// vCPU count, CPUID and clock speed: [`pageferry_kvm::MachineConfig`].
    pub(super) machine: Vec<u8>,
}

/// The state of a paused machine.
#[derive(Serialize, Deserialize, Debug, PartialEq, Eq)]
pub(super) struct State {
    /// vCPUs and interrupt controllers: [`pageferry_kvm::Machine::save`].
    pub(super) machine: Vec<u8>,
    pub(super) devices: DevicesState,
}

/// What the guest's memory is made of.
#[derive(Serialize, Deserialize, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum GuestBacking {
    /// Private memory.
    #[default]
    Anonymous,
    /// A memfd, mapped shared.
    Memfd,
    /// Reserved huge pages of 2 MiB.
    HugePages2M,
}

impl GuestBacking {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Anonymous => "anonymous memory",
            Self::Memfd => "a memfd",
            Self::HugePages2M => "huge pages of 2 MiB",
        }
    }
}

impl From<GuestBacking> for Backing {
    fn from(backing: GuestBacking) -> Self {
        match backing {
            GuestBacking::Anonymous => Self::Anonymous,
            GuestBacking::Memfd => Self::Memfd,
            GuestBacking::HugePages2M => Self::HugePages2M,
        }
    }
}

impl Description {
    pub(super) fn of(pc: &Pc) -> Self {
        let memory = pc.machine.memory();
        Self {
            ram_bytes: memory.layout().regions().iter().map(|region| region.len).sum(),
            kind: pc.kind,
            machine: pc.machine.config().to_bytes(),
        }
    }

    pub(super) fn write(&self, out: &mut dyn io::Write) -> io::Result<()> {
        write(self, out)
    }

    pub(super) fn read(bytes: &[u8]) -> Result<Self, MachineError> {
        read("machine description", bytes)
    }
}

impl State {
    pub(super) fn write(&self, out: &mut dyn io::Write) -> io::Result<()> {
        write(self, out)
    }

    pub(super) fn read(from: &mut dyn Read) -> Result<Self, MachineError> {
        let mut bytes = Vec::new();
        let invalid = |why: &dyn ToString| MachineError::invalid("machine state", why);
        let read_bytes = from.take(STATE_MAX + 1).read_to_end(&mut bytes).map_err(|error| invalid(&error))?;
        if read_bytes as u64 > STATE_MAX {
            return Err(invalid(&"it is too long"));
        }
        read("machine state", &bytes)
    }
}

fn write(block: &impl Serialize, out: &mut dyn io::Write) -> io::Result<()> {
    out.write_all(&VERSION.to_le_bytes())?;
    out.write_all(&postcard::to_stdvec(block).map_err(io::Error::other)?)
}

fn read<T: DeserializeOwned>(what: &'static str, bytes: &[u8]) -> Result<T, MachineError> {
    let Some((version, block)) = bytes.split_first_chunk() else {
        return Err(MachineError::invalid(what, &"it is empty"));
    };
    match u16::from_le_bytes(*version) {
        VERSION => match postcard::take_from_bytes(block) {
            Ok((value, [])) => Ok(value),
            Ok((_, rest)) => Err(MachineError::invalid(what, &format!("{} bytes follow its end", rest.len()))),
            Err(error) => Err(MachineError::invalid(what, &error)),
        },
        theirs => Err(MachineError::Version { theirs, ours: VERSION }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn description() -> Description {
        let kind = Kind { backing: GuestBacking::Memfd, payload: true };
        Description { ram_bytes: 1 << 30, kind, machine: vec![1, 2, 3] }
    }

    #[test]
    fn a_description_arrives_as_it_was_sent() {
        let mut bytes = Vec::new();
        description().write(&mut bytes).unwrap();
        assert_eq!(Description::read(&bytes).unwrap(), description());
    }

    #[test]
    fn another_version_and_cut_bytes_are_refused_with_what_was_found() {
        let mut bytes = Vec::new();
        description().write(&mut bytes).unwrap();
        for len in 0..bytes.len() {
            assert!(Description::read(&bytes[..len]).is_err(), "{len} bytes");
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(Description::read(&longer).unwrap_err().to_string().contains("1 bytes follow"));
        bytes[0] = 99;
        let error = Description::read(&bytes).unwrap_err().to_string();
        assert!(error.contains("version 99") && error.contains("version 2"), "{error}");
    }

    #[test]
    fn endless_state_is_refused() {
        let error = State::read(&mut io::repeat(1)).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
