//! What the adapter's calls cost on this host: pause and resume, saving and loading state, starting
//! a dirty log over a sparse terabyte and harvesting it clean. Prints medians of several runs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use pageferry::dirty::{Accumulator, DirtySource, Point};
use pageferry::memory::{Backing, GuestMemory, Layout, MappedMemory, Region};
use pageferry::vm::VmResult;
use pageferry_kvm::{DirtyLogMode, ExitHandler, Host, Machine, MachineConfig};

const RUNS: usize = 25;

/// No devices at all.
struct Nothing;

impl ExitHandler for Nothing {}

fn main() -> VmResult<()> {
    let host = Host::open()?;
    for vcpus in [1, 2, 16] {
        state(&host, vcpus)?;
    }
    for mode in [DirtyLogMode::ManualInitiallySet, DirtyLogMode::Manual, DirtyLogMode::Plain] {
        terabyte(&host, mode)?;
    }
    Ok(())
}

fn state(host: &Host, vcpus: u32) -> VmResult<()> {
    let memory = memory(16 << 20)?;
    // Jumps to itself in real mode, where a processor starts; the others wait for its message.
    memory.write(pageferry::memory::RegionId(0), 0, &[0xeb, 0xfe])?;
    let mut source = Machine::new(host, MachineConfig::new(host, vcpus), memory.clone())?;
    let mut special = source.vcpu(0)?.get_sregs()?;
    (special.cs.base, special.cs.selector) = (0, 0);
    source.vcpu(0)?.set_sregs(&special)?;
    source.vcpu(0)?.set_regs(&pageferry_kvm::kvm_bindings::kvm_regs { rflags: 2, ..Default::default() })?;
    source.start(Arc::new(Nothing))?;
    let pause = median(|| {
        source.resume()?;
        std::thread::sleep(Duration::from_millis(2));
        timed(|| Ok(source.pause()?))
    })?;
    let bytes = source.save()?;
    let save = median(|| timed(|| Ok(source.save().map(drop)?)))?;
    let config = MachineConfig::from_bytes(&source.config().to_bytes())?;
    let load = median(|| {
        let destination = Machine::new(host, config.clone(), memory.clone())?;
        timed(|| Ok(destination.load(&bytes)?))
    })?;
    let len = bytes.len();
    println!("{vcpus:2} vCPUs: pause {pause:?}, save {save:?} ({len} bytes), load {load:?}");
    Ok(())
}

fn terabyte(host: &Host, mode: DirtyLogMode) -> VmResult<()> {
    let memory = memory(1 << 40)?;
    let machine = Machine::new(host, MachineConfig::new(host, 1), memory.clone())?;
    let mut log = machine.dirty_log(mode);
    let mut accumulator = Accumulator::new(memory.layout().clone());
    let start = timed(|| log.start(memory.layout()))?;
    let mut harvest = || timed(|| log.harvest(Point::Running, &mut accumulator));
    let first = harvest()?;
    let clean = median(harvest)?;
    println!("1 TiB, {:?}: start {start:?}, first harvest {first:?}, clean harvest {clean:?}", log.mode());
    Ok(())
}

fn memory(len: u64) -> VmResult<Arc<MappedMemory>> {
    let layout = Layout::new(vec![Region::ram("ram", 0, len)])?;
    Ok(Arc::new(MappedMemory::new(layout, Backing::Memfd)?))
}

type Timed = VmResult<Duration>;

fn timed(work: impl FnOnce() -> VmResult<()>) -> Timed {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed())
}

fn median(mut run: impl FnMut() -> Timed) -> Timed {
    let mut times = (0..RUNS).map(|_| run()).collect::<Result<Vec<_>, _>>()?;
    times.sort_unstable();
    Ok(times[RUNS / 2])
}
