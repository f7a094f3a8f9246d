//! A guest saved to a file, and restored from it.
//!
//! Both are migrations, and use the engine's encoding, placement and hand-over as they are. Saving, the source's
//! peer is a *recorder* in this process ([`FileDialer`]): it speaks the destination's half of the protocol and writes
//! down what the source sends. Restoring, the destination's peer is a *player* ([`FileAcceptor`]): it speaks the
//! source's half and repeats what was written down. `FORMAT.md` beside the crate says what stands in the file.
//!
//! The guest is saved when it is handed over: the file gets its name then, complete, and never before. Whatever fails
//! earlier leaves the guest at the source and no file.
#![deny(unsafe_code)]

mod error;
mod format;

mod device;
mod partial;
mod pool;

mod recorder;
mod save;
mod writing;

mod player;
mod reading;
mod restore;

pub use error::{FileFailure, Part};
pub use format::FORMAT_VERSION;
pub use restore::{FileAcceptor, RestoreOptions};
pub use save::{FileDialer, SaveOptions};
