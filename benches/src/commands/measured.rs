//! One measured transfer to the other process, plain or by migration, with its answer checked.

use std::net::TcpStream;
use std::sync::Arc;
use std::time::Instant;

use pageferry::memory::MappedMemory;
use pageferry::stats::Report;
use pageferry::{Control, Source, SourceConfig};

use super::{gib, gigabytes_per_second};
use crate::guest::{self, StillGuest};
use crate::over::{Door, Over};
use crate::peer::{Order, Peer, Received};
use crate::{BenchError, host, plain, sys};

/// What a transfer took.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    pub(super) seconds: f64,
    pub(super) source_cpu: f64,
    pub(super) destination_cpu: f64,
}

impl Cost {
    pub(super) fn speed(&self, bytes: u64) -> f64 {
        gigabytes_per_second(bytes, self.seconds)
    }

    /// CPU-seconds per GiB, both sides together.
    pub(super) fn cpu_per_gib(&self, bytes: u64) -> f64 {
        (self.source_cpu + self.destination_cpu) / gib(bytes)
    }
}

/// Runs `work` and takes its time and this process's CPU time.
fn timed<T>(work: impl FnOnce() -> Result<T, BenchError>) -> Result<(T, f64, f64), BenchError> {
    let (cpu, started) = (sys::cpu_seconds(), Instant::now());
    let result = work()?;
    Ok((result, started.elapsed().as_secs_f64(), sys::cpu_seconds() - cpu))
}

/// Copies the memory over there with `write` and `read`.
pub(super) fn copy_plainly(
    peer: &mut Peer,
    memory: &MappedMemory,
    expected: u64,
    chunk: usize,
) -> Result<Cost, BenchError> {
    let Door::Tcp(address) = peer.listen(Order::ReceivePlain { chunk })? else {
        return Err(BenchError::Peer("does not listen on TCP".to_owned()));
    };
    let mut stream = TcpStream::connect(address).map_err(host("cannot connect"))?;
    let window = guest::window(memory)?;
    let ((), seconds, source_cpu) = timed(|| plain::send(&mut stream, window, chunk).map_err(host("cannot send")))?;
    let received = peer.received()?;
    check("the plain copy", &received, expected)?;
    Ok(Cost { seconds, source_cpu, destination_cpu: received.cpu_seconds })
}

/// How a guest is migrated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub(super) running: bool,
    pub(super) lanes: u16,
    pub(super) over: Over,
}

/// Migrates a guest with this memory over there: the whole call, from before the first connection to
/// after the last message.
pub(super) fn migrate(
    peer: &mut Peer,
    memory: &Arc<MappedMemory>,
    way: Way,
) -> Result<(Cost, Report, Received), BenchError> {
    let dialer = peer.listen(Order::ReceiveGuest { over: way.over })?.dial()?;
    let mut config = SourceConfig::default();
    config.lanes = way.lanes;
    let mut guest = StillGuest::new(Arc::clone(memory), way.running);
    let (report, seconds, source_cpu) =
        timed(|| Ok(Source::new(config).run(&mut guest, dialer, &Control::new()).map_err(Box::new)?))?;
    let received = peer.received()?;
    if report.digest_match != Some(true) {
        return Err(BenchError::Wrong("the engine's digests were not compared".to_owned()));
    }
    let cost = Cost { seconds, source_cpu, destination_cpu: received.cpu_seconds };
    Ok((cost, report, received))
}

/// The memory over there must be what it is here.
pub(super) fn check(what: &str, received: &Received, expected: u64) -> Result<(), BenchError> {
    if received.fingerprint == Some(expected) {
        return Ok(());
    }
    let found = received.fingerprint;
    Err(BenchError::Wrong(format!("{what} differs: fingerprint {expected:x} was sent, {found:x?} arrived")))
}
