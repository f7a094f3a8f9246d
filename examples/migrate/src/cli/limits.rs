//! Options of the migration itself, and of the network it takes.

use std::net::IpAddr;
use std::time::Duration;

use clap::{Args, ValueEnum};
use pageferry::config::SourceConfig;

use super::Rdma;
use super::units::{duration, rate};

/// What the migration may cost.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Limits")]
pub(crate) struct Limits {
    /// Longest predicted standstill at which the guest is switched over
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "300ms")]
    pub(crate) downtime_limit: Duration,
    /// Longest time the migration may take
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1h")]
    pub(crate) timeout: Duration,
    /// What happens then
    #[arg(long, value_name = "WHAT", value_enum, default_value_t)]
    pub(crate) on_timeout: OnTimeout,
    /// Most bytes per second, over all lanes together; without it, what the link carries
    #[arg(long, value_name = "RATE", value_parser = rate)]
    pub(crate) bandwidth: Option<u64>,
    /// Most vCPU time in per cent that may be taken from a guest whose memory does not get small; 0 for none
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99), default_value = "99")]
    pub(crate) max_throttle: u8,
    /// How both memories are compared before the hand-over
    #[arg(long, value_name = "HOW", value_enum, default_value_t)]
    pub(crate) verify: Verify,
    /// Give up on a peer that says nothing for this long
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s")]
    pub(crate) peer_timeout: Duration,
    /// How long to go on asking who owns the guest when the link breaks at the hand-over
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "30s")]
    pub(crate) settle_window: Duration,
}

/// The network the pages take.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Network")]
pub(crate) struct Lane {
    /// Connections that carry pages
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=128), default_value = "1")]
    pub(crate) lanes: u16,
    /// Address to connect from; with several paths one for each, with commas between
    #[arg(long, value_name = "ADDR", value_delimiter = ',')]
    pub(crate) bind: Vec<IpAddr>,
    /// Name to expect in the destination's certificate, if it is not the host's
    #[arg(long, value_name = "NAME", help_heading = "Security")]
    pub(crate) tls_name: Option<String>,
    /// Network interface to connect through, such as a dedicated migration network's
    #[arg(long, value_name = "NAME")]
    pub(crate) interface: Option<String>,
    #[command(flatten)]
    pub(crate) rdma: Rdma,
}

impl Lane {
    /// Whether it leaves to the host which network is taken.
    pub(crate) fn names_no_network(&self) -> bool {
        self.bind.is_empty() && self.interface.is_none()
    }
}

/// What happens when the time is up.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum OnTimeout {
    /// Give up; the guest stays at the source
    #[default]
    Cancel,
    /// Stop the guest for as long as the rest takes
    Switch,
}

/// How both memories are compared.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) enum Verify {
    /// By a digest kept up to date on the way: what was sent has arrived
    #[default]
    Digest,
    /// Also by hashing all memory on both sides while the guest stands still: no write was missed
    Full,
}

impl Limits {
    /// The engine's own words for these choices.
    pub(crate) fn source_config(&self, lanes: u16) -> SourceConfig {
        let mut config = SourceConfig::default();
        config.lanes = lanes;
        config.downtime_limit = self.downtime_limit;
        config.timeout = self.timeout;
        config.on_timeout = match self.on_timeout {
            OnTimeout::Cancel => pageferry::config::OnTimeout::Cancel,
            OnTimeout::Switch => pageferry::config::OnTimeout::SwitchOver,
        };
        config.bandwidth = self.bandwidth;
        config.max_throttle = self.max_throttle;
        config.verify = match self.verify {
            Verify::Digest => pageferry::config::Verify::Digest,
            Verify::Full => pageferry::config::Verify::Full,
        };
        config.peer_timeout = self.peer_timeout;
        config.settle_window = self.settle_window;
        config
    }
}
