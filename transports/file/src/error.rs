//! What goes wrong with a saved guest, whose fault it is, and what to do.

use std::io;
use std::path::PathBuf;

/// Why a guest cannot be saved to a file, or restored from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FileFailure {
    /// There is a file of that name, and it is not to be replaced.
    #[error("{} exists already; choose another name, remove it, or ask for it to be replaced", path.display())]
    Exists {
        /// The final name.
        path: PathBuf,
    },
    /// A path that names no file.
    #[error("{} names no file; give a path such as /var/lib/guests/one.ferry", path.display())]
    NoName {
        /// The path.
        path: PathBuf,
    },
    /// The folder cannot be written.
    #[error("cannot write to folder {}: {source}", folder.display())]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// What was being written is gone.
    #[error("somebody removed or replaced {} while the guest was being saved; save it again", path.display())]
    Removed {
        /// The unfinished file.
        path: PathBuf,
    },
    /// The host could not write.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The unfinished file, or the final name.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The host could not read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// The file was made by something else.
    #[error("{} is no saved guest: it does not start like one", path.display())]
    NotASave {
        /// The file.
        path: PathBuf,
    },
    /// The file's format is of another version.
    #[error(
        "{} has format {found}, this program reads format {ours}: restore it with the version that saved it, or a newer one",
        path.display()
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The version that this build reads.
        ours: u32,
    },
    /// The frames in the file are of another version of the protocol.
    #[error(
        "{} holds a guest in protocol {found}, this program speaks {lowest} to {highest}: restore it with the version that saved it",
        path.display()
    )]
    Protocol {
        /// The file.
        path: PathBuf,
        /// The version of its frames.
        found: u16,
        /// The lowest version that this build speaks.
        lowest: u16,
        /// The highest.
        highest: u16,
    },
    /// The file ends early.
    #[error("{} is truncated: it ends at byte {len} of {expected}; fetch it again, it cannot be restored", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Bytes that are there.
        len: u64,
        /// Bytes that there were, or at least.
        expected: u64,
    },
    /// The file goes on after its end.
    #[error("{} is damaged: it has {len} bytes, and {expected} belong to the guest; it cannot be restored", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Bytes that are there.
        len: u64,
        /// Bytes that belong there.
        expected: u64,
    },
    /// Bytes that are not what was written.
    #[error(
        "{} is damaged: the checksum of {part} (bytes {offset} to {}) is wrong; fetch it again, it cannot be restored",
        path.display(), offset + len
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which part of it.
        part: Part,
        /// Where that part starts.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Numbers that contradict each other under a checksum that is right: made so.
    #[error("{} is no valid save: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What cannot be.
        what: String,
    },
    /// The saving came to its end already.
    #[error("the saving of {} was cancelled", path.display())]
    Cancelled {
        /// The final name.
        path: PathBuf,
    },
}

/// A part of a saved guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Part {
    /// The first block.
    Header,
    /// The table of extents.
    Table,
    /// An extent, counted from 0.
    Extent(usize),
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Header => f.write_str("the header"),
            Self::Table => f.write_str("the table of extents"),
            Self::Extent(index) => write!(f, "extent {index}"),
        }
    }
}

impl FileFailure {
    fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Exists { .. } => io::ErrorKind::AlreadyExists,
            Self::NoName { .. } => io::ErrorKind::InvalidInput,
            Self::Folder { source, .. } | Self::Write { source, .. } | Self::Read { source, .. } => source.kind(),
            Self::Removed { .. } => io::ErrorKind::NotFound,
            Self::Cancelled { .. } => io::ErrorKind::BrokenPipe,
            Self::Truncated { .. } => io::ErrorKind::UnexpectedEof,
            _ => io::ErrorKind::InvalidData,
        }
    }
}

impl From<FileFailure> for io::Error {
    fn from(failure: FileFailure) -> Self {
        Self::new(failure.kind(), failure)
    }
}
