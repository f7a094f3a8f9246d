//! A guest under KVM, as the roles see it: the example machine, and the conversation with the
//! program in it over serial console and command port ([`conversation`]).
//!
//! The guest is our own program, which knows what its memory must hold, or a Linux of the user's,
//! which can be watched on its console and no more.

mod conversation;
mod destination;
mod source;

pub(crate) use destination::ArrivingKvmGuest;
pub(crate) use source::{KvmGuest, Linux};

/// What runs in the machine.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Program {
    /// The guest program of this crate.
    Ours,
    /// A kernel of the user's.
    Linux,
}

impl From<crate::cli::Backing> for crate::machine::GuestBacking {
    fn from(backing: crate::cli::Backing) -> Self {
        match backing {
            crate::cli::Backing::Anon => Self::Anonymous,
            crate::cli::Backing::Memfd => Self::Memfd,
            crate::cli::Backing::Huge => Self::HugePages2M,
        }
    }
}
