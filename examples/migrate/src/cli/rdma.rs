//! Options of lanes over RDMA.

use clap::Args;

use super::units::size;

/// What a side may register with its RDMA device, which locks it in memory.
#[derive(Args, Clone, Copy, Debug, Default)]
#[command(next_help_heading = "Network")]
pub(crate) struct Rdma {
    /// Over rdma://, lock all of the guest's memory on this side and register it at once, in place of windows that come and go
    #[arg(long)]
    pub(crate) rdma_pin_all: bool,
    /// Over rdma://, most memory that the lanes register on this side; without it, what `ulimit -l` allows
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "rdma_pin_all")]
    pub(crate) rdma_locked_memory: Option<u64>,
}
