//! `pageferry-bench`: what a migration costs, beside a plain copy of the same memory in the same run.
//!
//! Every benchmark checks its answer, and a wrong one ends the program with status 1. Speeds are
//! medians; whatever is compared runs in turn (A, B, A, B, ...), so that a noisy machine disturbs both alike.
#![deny(unsafe_code)]

mod commands;
mod guest;
mod interrupt;
mod keep;
mod machine;
mod movers;
mod network;
mod outcome;
mod over;
mod peer;
mod plain;
mod process;
mod report;
mod scratch;
mod shown;
mod steal;
mod study;
#[allow(unsafe_code)]
mod sys;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use shown::{Shown, say};

/// Measures Pageferry on this machine. Build it with --release.
#[derive(Parser, Debug)]
#[command(name = "pageferry-bench", version, max_term_width = 100)]
struct Cli {
    /// Print one JSON object instead of a table
    #[arg(long, global = true)]
    json: bool,
    /// Also write the JSON to benches/results/DATE-CLASS/, where CLASS names this kind of machine
    #[arg(long, global = true, value_name = "CLASS")]
    record: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// A plain read/write copy of memory over TCP, and iperf3 if it is installed
    Reference(commands::ReferenceOptions),
    /// A migration of incompressible memory, in turn with the plain copy
    Throughput(commands::ThroughputOptions),
    /// A migration of memory that was touched and holds zeros
    Zero(commands::ZeroOptions),
    /// A migration of memory that was hardly ever touched: what is not there is not read
    Holes(commands::HolesOptions),
    /// Taking the dirty bits of a huge guest in which nothing is dirty
    Harvest(commands::HarvestOptions),
    /// What a memory image is made of, and what compression and deduplication can make of it
    Image(commands::ImageOptions),
    /// The engine's inner loops, one thread
    Kernels(commands::KernelsOptions),
    /// Downtime of an idle KVM guest, by its own heartbeats (runs `migrate demo`)
    Downtime(commands::DowntimeOptions),
    /// Whole migrations over a shaped link, in turn with QEMU's (needs root, ip, tc, iperf3)
    Link(Box<commands::LinkOptions>),
    /// The same migration over every transport, in turn
    Transports(commands::TransportsOptions),
    /// A matrix of guests, links and engines, with a report: what 100 Mbit/s and 1 Gbit/s do to a migration
    Harness(Box<commands::HarnessOptions>),
    /// Draws a study again: a page, a table, values for other programs
    Report(commands::ReportOptions),
    /// What changed between two measurements, and whether it is more than noise
    Compare(commands::CompareOptions),
    /// One side of a plain copy; not for people
    #[command(hide = true)]
    Copy {
        #[command(subcommand)]
        side: network::CopySide,
    },
    /// The other process of a measurement; not for people
    #[command(hide = true)]
    Peer,
}

/// Why a benchmark gave no result.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error("{what}: {source}")]
    Host { what: &'static str, source: std::io::Error },
    #[error("cannot read {}: {source}", path.display())]
    File { path: std::path::PathBuf, source: std::io::Error },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: std::path::PathBuf, source: std::io::Error },
    #[error(transparent)]
    Transport(#[from] pageferry::transport::TransportError),
    #[error("the migration failed: {0}")]
    Migration(#[from] Box<pageferry::Failed>),
    #[error("guest memory: {0}")]
    Memory(#[from] pageferry::memory::MemoryError),
    #[error("guest layout: {0}")]
    Layout(#[from] pageferry::memory::LayoutError),
    #[error("the engine could not {what}: {source}")]
    Engine { what: &'static str, source: pageferry::vm::VmError },
    #[error("the other process {0}")]
    Peer(String),
    #[error("WRONG ANSWER: {0}")]
    Wrong(String),
    #[error("{name} ended early ({status}): {errors}")]
    Ended { name: &'static str, status: String, errors: String },
    #[error("{0}")]
    Tool(String),
    #[error("this machine lacks {}", .0.join(", "))]
    Lacking(Vec<String>),
    #[error("interrupted; everything is taken down")]
    Interrupted,
    #[error("skipped: {0}")]
    Skipped(String),
}

impl BenchError {
    /// 1 for a failure, 3 when this machine cannot measure it, 130 after Ctrl-C as shells have it.
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Lacking(_) => ExitCode::from(3),
            Self::Interrupted => ExitCode::from(130),
            _ => ExitCode::FAILURE,
        }
    }
}

/// Names what the host refused.
fn host(what: &'static str) -> impl FnOnce(std::io::Error) -> BenchError {
    move |source| BenchError::Host { what, source }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match &cli.command {
        Command::Peer => return peer::serve(),
        Command::Copy { side } => return done(side.run()),
        Command::Reference(options) => boxed(commands::reference(options)),
        Command::Throughput(options) => boxed(commands::throughput(options)),
        Command::Transports(options) => boxed(commands::transports(options)),
        Command::Zero(options) => boxed(commands::zero(options)),
        Command::Holes(options) => boxed(commands::holes(options)),
        Command::Harvest(options) => boxed(commands::harvest(options)),
        Command::Image(options) => boxed(commands::image(options)),
        Command::Kernels(options) => boxed(commands::kernels(options)),
        Command::Downtime(options) => boxed(commands::downtime(options)),
        Command::Link(options) => boxed(commands::link(options)),
        Command::Harness(options) => boxed(commands::harness(options, cli.record.as_deref())),
        Command::Report(options) => boxed(commands::report(options)),
        Command::Compare(options) => boxed(commands::compare(options)),
    };
    done(result.and_then(|found| publish(&cli, found.as_ref())))
}

fn done(result: Result<(), BenchError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(BenchError::Skipped(reason)) => {
            println!("skipped: {reason}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            say(format_args!("pageferry-bench: {error}"));
            error.exit_code()
        }
    }
}

fn boxed<T: Shown + 'static>(found: Result<T, BenchError>) -> Result<Box<dyn Shown>, BenchError> {
    found.map(|found| Box::new(found) as Box<dyn Shown>)
}

fn publish(cli: &Cli, found: &dyn Shown) -> Result<(), BenchError> {
    if let Some(class) = &cli.record {
        found.record(class)?;
    }
    if cli.json { shown::print(&(found.json() + "\n")) } else { shown::print(&found.to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
