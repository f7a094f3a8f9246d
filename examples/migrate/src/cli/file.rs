//! `migrate save` and `migrate restore`.

use std::path::PathBuf;

use clap::Args;

use super::{Encoding, GuestOptions, Lane, Limits, Linger, Moment, Output, PlaceOptions, Rdma};

pub(super) const SAVE_EXAMPLES: &str = "\
Examples:
  migrate save guest.ferry --memory 4G                    saved after a second, while it runs
  migrate save guest.ferry --on-key --lanes 8             at a key, by eight threads
  migrate save guest.ferry --overwrite --bandwidth 200M/s --json
  migrate save guest.ferry --kernel vmlinux --initrd initramfs.cpio --memory 256M

The file holds all of the guest's memory: it gets mode 0600. It has its name once it is complete, and not before. If the saving
fails, the guest runs on here.";

pub(super) const RESTORE_EXAMPLES: &str = "\
Examples:
  migrate restore guest.ferry
  migrate restore guest.ferry --linger 10s --json
  migrate restore guest.ferry --backing memfd --prefault

The file stays as it is. A guest that is restored twice runs twice: that is for its owner to want.";

/// `migrate save`.
#[derive(Args, Debug)]
pub(crate) struct SaveOptions {
    /// Where to
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Replace a file of that name
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Threads that hand pages to the file; as many place them when the guest is restored. Without it, one for each core,
    /// at most 4
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=128))]
    lanes: Option<u16>,
    #[command(flatten)]
    pub(crate) moment: Moment,
    #[command(flatten)]
    pub(crate) guest: GuestOptions,
    #[command(flatten)]
    pub(crate) limits: Limits,
    #[command(flatten)]
    pub(crate) encoding: Encoding,
    #[command(flatten)]
    pub(crate) linger: Linger,
    #[command(flatten)]
    pub(crate) output: Output,
}

impl SaveOptions {
    /// The lanes to the file.
    pub(crate) fn lane(&self) -> Lane {
        let cores = || std::thread::available_parallelism().map_or(1, |cores| cores.get().min(4) as u16);
        let lanes = self.lanes.unwrap_or_else(cores);
        Lane { lanes, bind: Vec::new(), tls_name: None, interface: None, rdma: Rdma::default() }
    }
}

/// `migrate restore`.
#[derive(Args, Debug)]
pub(crate) struct RestoreOptions {
    /// The saved guest
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) place: PlaceOptions,
    #[command(flatten)]
    pub(crate) linger: Linger,
    #[command(flatten)]
    pub(crate) output: Output,
}
