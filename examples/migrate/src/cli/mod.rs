//! The command line: `migrate demo`, `migrate receive`, `migrate send`, `migrate save`, `migrate restore`, `migrate export`.

mod address;
mod demo;
mod encoding;
mod exit;
mod file;
mod guest;
mod limits;
mod rdma;
mod security;
pub(crate) mod units;

pub(crate) use address::{Address, NetAddress, Scheme, without_pairings};
pub(crate) use demo::DemoTransport;
pub(crate) use encoding::Encoding;
pub(crate) use exit::ExitStatus;
pub(crate) use file::{RestoreOptions, SaveOptions};
pub(crate) use guest::{Backing, GuestKind, GuestOptions};
pub(crate) use limits::{Lane, Limits, Verify};
pub(crate) use rdma::Rdma;
pub(crate) use security::Security;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use units::{duration, size};

/// Moves a running guest from one process to another, and proves that every byte arrived.
#[derive(Parser, Debug)]
#[command(name = "migrate", version, propagate_version = true, max_term_width = 100)]
#[command(after_long_help = exit::HELP)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub(crate) enum Command {
    /// Both ends on this machine, as two processes: starts a guest and moves it.
    #[command(after_help = DEMO_EXAMPLES, after_long_help = examples_and_exit(DEMO_EXAMPLES))]
    Demo(Box<DemoOptions>),
    /// Waits for a guest and runs it once it has arrived.
    #[command(after_help = RECEIVE_EXAMPLES, after_long_help = examples_and_exit(RECEIVE_EXAMPLES))]
    Receive(ReceiveOptions),
    /// Starts a guest and moves it to where `migrate receive` listens.
    #[command(after_help = SEND_EXAMPLES, after_long_help = examples_and_exit(SEND_EXAMPLES))]
    Send(Box<SendOptions>),
    /// Starts a guest and saves it to a file, where it ends; `migrate restore` goes on with it.
    #[command(after_help = file::SAVE_EXAMPLES, after_long_help = examples_and_exit(file::SAVE_EXAMPLES))]
    Save(Box<SaveOptions>),
    /// Goes on with a guest that `migrate save` has put into a file.
    #[command(after_help = file::RESTORE_EXAMPLES, after_long_help = examples_and_exit(file::RESTORE_EXAMPLES))]
    Restore(RestoreOptions),
    /// Writes the built-in guest's program or its memory to a file, for another machine to run or to move.
    #[command(after_help = EXPORT_EXAMPLES, after_long_help = examples_and_exit(EXPORT_EXAMPLES))]
    Export(Box<ExportOptions>),
}

const DEMO_EXAMPLES: &str = "\
Examples:
  migrate demo                                      1 GiB, 2 vCPUs, 20 MiB/s of writes
  migrate demo --memory 4G --rate 200M/s --writes full --lanes 4
  migrate demo --bandwidth 1Gbit/s --verify full    as over a 1 Gbps link, every page hashed again
  migrate demo --compress off --delta-cache 0 --no-duplicates    every page with content sent whole
  migrate demo --transport quic                     or tls, unix, paths: everything but plain TCP
  migrate demo --guest process --json               without KVM; the report as the last line
  migrate demo --image memory.img --verify full     the memory of another machine, dumped to a file";

const RECEIVE_EXAMPLES: &str = "\
Examples:
  migrate receive --listen 0.0.0.0:7000                     encrypted; prints what the sender needs
  migrate receive --listen tls://0.0.0.0:7000 --tls-dir /etc/pageferry
  migrate receive --listen 10.0.1.7:7000,10.0.2.7:7000      two paths: goes on when one dies
  migrate receive --listen unix:/run/guest.sock
  migrate receive --listen [::1]:7000 --max-memory 4G --linger 10s --json";

const SEND_EXAMPLES: &str = "\
Examples:
  migrate send --to tls://192.0.2.7:7000/pair-... --memory 4G --vcpus 4    as `migrate receive` has printed it
  migrate send --to 192.0.2.7:7000 --pairing-file - < pairing    not on the command line, which everybody here sees
  migrate send --to tls://host:7000 --tls-dir /etc/pageferry --on-key --bind 192.0.2.6 --lanes 4
  migrate send --to tcp://192.0.2.7:7000 --insecure-plaintext --encoders 4 --encoder-nice 10 --delta-cache 1G
  migrate send --to [::1]:7000 --on-signal --linger 5s --json
  migrate send --to unix:/run/guest.sock                    to another process of this host
  migrate send --to unix:/run/guest.sock --backing memfd --hand-over-memory    and nothing is copied
  migrate send --to 127.0.0.1:7000 --kernel vmlinux --initrd initramfs.cpio --memory 256M";

const EXPORT_EXAMPLES: &str = "\
Examples:
  migrate export memory guest.ram --memory 1G --seed 1      what a guest of 1 GiB holds once it is filled
  migrate export program guest.elf --rate 20M/s --seed 1    prints the command line that makes it work so

The program is an ELF file with a PVH entry, for -kernel and -append of QEMU. Where its processor does not tell its clock
frequency, add tsc_khz=KHZ to the command line.";

fn examples_and_exit(examples: &str) -> String {
    format!("{examples}\n\n{}", exit::HELP)
}

/// `migrate demo`.
#[derive(Args, Debug)]
pub(crate) struct DemoOptions {
    #[command(flatten)]
    pub(crate) guest: GuestOptions,
    #[command(flatten)]
    pub(crate) limits: Limits,
    #[command(flatten)]
    pub(crate) lane: Lane,
    #[command(flatten)]
    pub(crate) encoding: Encoding,
    /// What the pages travel by
    #[arg(long, value_name = "TRANSPORT", value_enum, default_value_t, help_heading = "Network")]
    pub(crate) transport: DemoTransport,
    #[command(flatten)]
    pub(crate) output: Output,
    /// How long the guest runs before it is moved, its memory filled
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1s", help_heading = "Moment")]
    pub(crate) after: Duration,
    /// How long the guest runs on after the migration before its memory is checked
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1s", help_heading = "Moment")]
    pub(crate) linger: Duration,
    /// Most memory the destination gives a guest; without it, what the host has available
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Guest")]
    pub(crate) max_memory: Option<u64>,
    /// Touch all memory at the destination before the first page comes, so that a measurement does not
    /// contain the host's page faults
    #[arg(long, help_heading = "Guest")]
    pub(crate) prefault: bool,
}

/// `migrate receive`.
#[derive(Args, Debug)]
pub(crate) struct ReceiveOptions {
    /// Where to listen: ADDR:PORT, tls://ADDR:PORT, quic://ADDR:PORT, tcp://ADDR:PORT or unix:PATH; several network
    /// addresses, with commas between, are several paths. Port 0 takes a free one. Without a scheme: TCP within this
    /// host, TLS for others
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) listen: Address,
    #[command(flatten)]
    pub(crate) security: Security,
    /// Network interface to listen on, such as a dedicated migration network's
    #[arg(long, value_name = "NAME", help_heading = "Network")]
    pub(crate) interface: Option<String>,
    #[command(flatten)]
    pub(crate) rdma: Rdma,
    #[command(flatten)]
    pub(crate) place: PlaceOptions,
    /// Give up when no guest has come for this long
    #[arg(long, value_name = "TIME", value_parser = duration, help_heading = "Limits")]
    pub(crate) wait: Option<Duration>,
    /// Give up on a peer that says nothing for this long
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "10s", help_heading = "Limits")]
    pub(crate) peer_timeout: Duration,
    /// How long to wait to be asked who owns the guest when the link breaks at the hand-over
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "30s", help_heading = "Limits")]
    pub(crate) settle_window: Duration,
    #[command(flatten)]
    pub(crate) linger: Linger,
    #[command(flatten)]
    pub(crate) output: Output,
    /// Ends when the process with this id, which started this one, ends
    #[arg(long, value_name = "PID", hide = true)]
    pub(crate) with_parent: Option<u32>,
}

/// What is made ready for a guest that arrives.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct PlaceOptions {
    /// Most memory to give a guest; without it, what the host has available
    #[arg(long, value_name = "SIZE", value_parser = size, help_heading = "Guest")]
    pub(crate) max_memory: Option<u64>,
    /// Take a guest even if the host has less memory than it could touch
    #[arg(long, help_heading = "Guest")]
    pub(crate) overcommit: bool,
    /// What stands behind the guest's memory here
    #[arg(long, value_name = "KIND", value_enum, default_value_t, help_heading = "Guest")]
    pub(crate) backing: Backing,
    /// Touch all memory at the destination before the first page comes, so that a measurement does not
    /// contain the host's page faults
    #[arg(long, help_heading = "Guest")]
    pub(crate) prefault: bool,
}

/// `migrate send`.
#[derive(Args, Debug)]
pub(crate) struct SendOptions {
    /// Where the destination listens: the address that it has printed
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) to: Address,
    /// File with the pairing, or with the whole address as `migrate receive` has printed it; - for the first line of standard
    /// input. Other users of this host see every command line, and so a pairing in --to
    #[arg(long, value_name = "FILE")]
    pub(crate) pairing_file: Option<PathBuf>,
    /// Hand the guest's memory over instead of copying it, to a receiver on this host: to replace this process while the
    /// guest lives on. Needs --to unix:PATH and --backing memfd
    #[arg(long)]
    pub(crate) hand_over_memory: bool,
    #[command(flatten)]
    pub(crate) security: Security,
    #[command(flatten)]
    pub(crate) moment: Moment,
    #[command(flatten)]
    pub(crate) guest: GuestOptions,
    #[command(flatten)]
    pub(crate) limits: Limits,
    #[command(flatten)]
    pub(crate) lane: Lane,
    #[command(flatten)]
    pub(crate) encoding: Encoding,
    #[command(flatten)]
    pub(crate) linger: Linger,
    #[command(flatten)]
    pub(crate) output: Output,
}

/// `migrate export`.
#[derive(Args, Debug)]
pub(crate) struct ExportOptions {
    /// What to write
    #[arg(value_enum)]
    pub(crate) what: ExportWhat,
    /// Where to
    #[arg(value_name = "FILE")]
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) guest: GuestOptions,
}

/// Part of the built-in guest.
#[derive(ValueEnum, Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum ExportWhat {
    /// The program that it runs
    Program,
    /// What its memory holds once it is filled
    Memory,
}

/// When to migrate.
#[derive(Args, Clone, Copy, Debug)]
#[group(multiple = false)]
pub(crate) struct Moment {
    /// Migrate when the guest has run for this long, its memory filled
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "1s", help_heading = "Moment")]
    pub(crate) after: Duration,
    /// Migrate when Enter is pressed
    #[arg(long, help_heading = "Moment")]
    pub(crate) on_key: bool,
    /// Migrate on SIGUSR1
    #[arg(long, help_heading = "Moment")]
    pub(crate) on_signal: bool,
}

/// How long a guest that is on this side in the end runs on.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Linger {
    /// How long the guest runs on here when it is on this side after the migration; its memory is
    /// checked and reported at the end. `forever`: checked and reported after a second, then until Ctrl-C
    #[arg(long, value_name = "TIME|forever", value_parser = linger, default_value = "forever", help_heading = "Moment")]
    pub(crate) linger: LingerTime,
}

/// A time, or without end.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LingerTime {
    For(Duration),
    Forever,
}

fn linger(text: &str) -> Result<LingerTime, units::UnitError> {
    if text == "forever" { Ok(LingerTime::Forever) } else { duration(text).map(LingerTime::For) }
}

/// What is printed.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct Output {
    /// Progress as JSON lines on standard output, the final report as the last of them
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::params::Rate;

    fn parse(line: &str) -> Result<Command, clap::Error> {
        Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.command)
    }

    #[test]
    fn the_definition_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn demo_needs_no_option() {
        let Ok(Command::Demo(demo)) = parse("migrate demo") else { panic!("not a demo") };
        assert_eq!((demo.guest.memory(), demo.guest.vcpus), (1 << 30, 2));
        assert_eq!(demo.guest.rate, Rate::BytesPerSecond(20 << 20));
    }

    #[test]
    fn the_moment_is_a_delay_a_key_or_a_signal() {
        let Ok(Command::Send(send)) = parse("migrate send --to 127.0.0.1:1 --on-key") else { panic!("not a send") };
        assert!(send.moment.on_key);
        assert!(parse("migrate send --to 127.0.0.1:1 --on-key --on-signal").is_err());
        assert!(parse("migrate send --to 127.0.0.1:1 --on-key --after 1s").is_err());
    }

    #[test]
    fn a_bad_value_is_named_with_its_option() {
        let error = parse("migrate demo --bandwidth fast").unwrap_err().to_string();
        assert!(error.contains("--bandwidth") && error.contains("100Mbit/s"), "{error}");
        let error = parse("migrate demo --mix zero=50,text=10").unwrap_err().to_string();
        assert!(error.contains("--mix") && error.contains("60"), "{error}");
    }
}
