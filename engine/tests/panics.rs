//! A VMM that panics in a call of the engine: the panic goes on to whoever called the engine, and leaves nothing behind.
#![allow(missing_docs)]

mod common;

use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::direct::{DirectAcceptor, DirectDialer, Known};
use common::{Guest, Room};
use pageferry::dirty::DirtySource;
use pageferry::host::{Joiner, Spawner, StdSpawner, ThreadRole};
use pageferry::memory::{GuestMemory, Layout, MappedMemory};
use pageferry::stats::Event;
use pageferry::transport::{self, Acceptor, Dialer};
use pageferry::vm::{Step, VmResult};
use pageferry::{
    Control, Destination, DestinationConfig, DestinationVm, Failed, Report, Source, SourceConfig, SourceVm,
};

/// Counts the threads that run.
#[derive(Default, Clone)]
struct Counting(Arc<AtomicUsize>);

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Spawner for Counting {
    fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Joiner>> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let counted = Counted(self.0.clone());
        let work = move || {
            let _counted = counted;
            work();
        };
        StdSpawner.spawn(role, Box::new(work))
    }
}

impl Counting {
    /// Threads that only open a connection end soon after the migration, by themselves.
    fn comes_to_nothing(&self) -> bool {
        let until = Instant::now() + Duration::from_secs(10);
        while self.0.load(Ordering::SeqCst) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.0.load(Ordering::SeqCst) == 0
    }
}

/// Which call panics.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Call {
    Prepare,
    Load,
    Commit,
    Abort,
    /// Of the observer, when the destination has accepted: its memory is exposed by then.
    Observe,
    Pause,
    Save,
    Harvest,
}

struct Clumsy<V> {
    vm: V,
    at: Call,
}

impl<V> Clumsy<V> {
    fn panic_at(&self, call: Call) {
        assert!(self.at != call, "the VMM panics in {call:?}");
    }
}

impl DestinationVm for Clumsy<Room> {
    fn prepare(&mut self, config: &[u8], layout: &Layout) -> VmResult<Arc<dyn GuestMemory>> {
        self.panic_at(Call::Prepare);
        self.vm.prepare(config, layout)
    }

    fn load(&mut self, state: &mut dyn Read) -> VmResult<()> {
        self.panic_at(Call::Load);
        // Refused, where it is to come to an abort.
        if self.at == Call::Abort { Err("no".into()) } else { self.vm.load(state) }
    }

    fn commit(&mut self, run: bool) -> VmResult<()> {
        self.panic_at(Call::Commit);
        self.vm.commit(run)
    }

    fn abort(&mut self) {
        self.panic_at(Call::Abort);
        self.vm.abort();
    }
}

impl SourceVm for Clumsy<Guest> {
    fn memory(&self) -> Arc<dyn GuestMemory> {
        self.vm.memory()
    }

    fn dirty(&mut self) -> &mut dyn DirtySource {
        // Harvested first after the guest was paused: by then all threads run.
        assert!(self.at != Call::Harvest || self.vm.is_running_now(), "the VMM panics in Harvest");
        self.vm.dirty()
    }

    fn describe(&mut self, out: &mut dyn Write) -> VmResult<()> {
        self.vm.describe(out)
    }

    fn pause(&mut self) -> VmResult<()> {
        self.panic_at(Call::Pause);
        self.vm.pause()
    }

    fn resume(&mut self) -> VmResult<()> {
        self.vm.resume()
    }

    fn save(&mut self, out: &mut dyn Write) -> VmResult<()> {
        self.panic_at(Call::Save);
        self.vm.save(out)
    }

    fn step(&mut self, step: Step) -> VmResult<()> {
        self.vm.step(step)
    }
}

/// Nobody else has a part of this memory.
fn is_let_go(memory: Option<&Arc<MappedMemory>>) -> bool {
    memory.is_none_or(|memory| Arc::strong_count(memory) == 1)
}

fn source_config() -> SourceConfig {
    let mut config = SourceConfig::default();
    (config.lanes, config.settle_window) = (2, Duration::from_millis(300));
    config
}

fn send(guest: &mut dyn SourceVm, dialer: Arc<dyn Dialer>, spawner: Counting) -> Result<Report, Failed> {
    Source::new(source_config()).spawner(Arc::new(spawner)).run(guest, dialer, &Control::new())
}

#[test]
fn a_panic_of_the_destinations_vmm_leaves_no_memory_exposed_and_no_thread_behind() {
    for at in [Call::Prepare, Call::Observe, Call::Load, Call::Commit, Call::Abort] {
        let (known, threads) = (Arc::new(Known::default()), Counting::default());
        let (dialer, acceptor) = transport::in_memory();
        // Somebody could come at any time: the door does not end by itself.
        let somebody = dialer.clone();
        let (dialer, acceptor) = (DirectDialer(dialer, known.clone()), DirectAcceptor(acceptor, known.clone()));
        let lent = threads.clone();
        let arrival = std::thread::spawn(move || {
            let mut room = Clumsy { vm: Room::default(), at };
            let mut config = DestinationConfig::default();
            config.wait_for_source = Some(Duration::from_secs(20));
            let run = || {
                let acceptor = Arc::new(acceptor) as Arc<dyn Acceptor>;
                let observe = move |event: &Event| {
                    assert!(at != Call::Observe || !matches!(event, Event::Accepted { .. }), "the VMM panics");
                };
                let destination = Destination::new(config).spawner(Arc::new(lent)).observer(Arc::new(observe));
                destination.run(&mut room, acceptor, &Control::new())
            };
            let panicked = catch_unwind(AssertUnwindSafe(run)).is_err();
            (panicked, room.vm)
        });
        let mut guest = Guest::new(600, Some(Duration::from_micros(200)));
        let sent = send(&mut guest, Arc::new(dialer), Counting::default());
        let (panicked, room) = arrival.join().unwrap();
        assert!(panicked, "{at:?}");
        assert!(known.to.lock().unwrap().is_none(), "{at:?}: memory is still exposed");
        assert!(threads.comes_to_nothing(), "{at:?}: threads are left");
        drop(somebody);
        assert!(is_let_go(room.memory.as_ref()), "{at:?}: memory is still held");
        // Before Commit it is certain who owns the guest; after it, it is not.
        match (at, sent) {
            (Call::Commit, Err(Failed::Undecided { .. })) => assert!(!guest.is_running_now()),
            (Call::Prepare | Call::Observe | Call::Load | Call::Abort, Err(Failed::SourceStillOwns { .. })) => {
                assert!(guest.is_running_now());
            }
            (_, other) => panic!("{at:?}: {other:?}"),
        }
    }
}

#[test]
fn a_panic_of_the_sources_vmm_leaves_no_thread_behind_and_the_destination_lets_go() {
    for at in [Call::Pause, Call::Save, Call::Harvest] {
        let threads = Counting::default();
        let (dialer, acceptor) = transport::in_memory();
        let arrival = std::thread::spawn(move || {
            let mut room = Room::default();
            let result = Destination::new(DestinationConfig::default()).run(
                &mut room,
                Arc::new(acceptor) as Arc<dyn Acceptor>,
                &Control::new(),
            );
            (result, room)
        });
        let mut guest = Clumsy { vm: Guest::new(600, None), at };
        let lent = threads.clone();
        let panicked =
            catch_unwind(AssertUnwindSafe(|| send(&mut guest, Arc::new(dialer) as Arc<dyn Dialer>, lent))).is_err();
        assert!(panicked, "{at:?}");
        assert!(threads.comes_to_nothing(), "{at:?}: threads are left");
        assert_eq!(Arc::strong_count(&guest.vm.shared.memory), 1, "{at:?}: memory is still held");
        let (result, room) = arrival.join().unwrap();
        assert!(result.is_err() && room.aborted && room.committed.is_none(), "{at:?}");
    }
}
