//! One vCPU and its thread.
//!
//! A thread is parked, running its vCPU, or resting. Others give it an [`Order`]; between two
//! entries into the guest it stands at its *gate* and obeys. Whoever changes an order also kicks the
//! vCPU out of the guest (see [`crate::kick`]).
//!
//! A vCPU that left the guest for I/O has not finished its instruction: KVM does that at the next
//! KVM_RUN. So a thread never parks after an exit. It enters KVM_RUN again with `immediate_exit` set,
//! which finishes the instruction (or exits once more, for the rest of a long one) and returns
//! `EINTR`; only then it goes to the gate.

use std::ops::ControlFlow;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::error::{KvmError, call};
use crate::exit::{Ending, ExitHandler, Reaction};
use crate::kick::{RunPage, Thread};

/// How long a vCPU may take to stop. Longer than any sane exit handler runs.
const PARK_TIMEOUT: Duration = Duration::from_secs(10);

/// What a vCPU's thread is to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Order {
    Park,
    Run,
    Leave,
}

/// A vCPU, shared by its thread and those that command it.
#[derive(Debug)]
pub(crate) struct Vcpu {
    pub(crate) index: u32,
    /// Held by the thread only while it is past the gate.
    fd: Mutex<VcpuFd>,
    page: RunPage,
    gate: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Debug)]
struct Gate {
    order: Order,
    /// The thread stands still with no instruction half done; true before it exists, too.
    parked: bool,
    /// The thread, from its start to its end.
    thread: Option<Thread>,
    throttled_until: Option<Instant>,
}

impl Vcpu {
    pub(crate) fn new(index: u32, fd: VcpuFd) -> Result<Self, KvmError> {
        let page = RunPage::map(&fd).map_err(call(format!("mapping the shared page of vCPU {index}")))?;
        let gate = Gate { order: Order::Park, parked: true, thread: None, throttled_until: None };
        Ok(Self { index, fd: Mutex::new(fd), page, gate: Mutex::new(gate), changed: Condvar::new() })
    }

    /// The descriptor, while the thread is parked.
    pub(crate) fn paused(&self) -> Result<MutexGuard<'_, VcpuFd>, KvmError> {
        let gate = self.gate();
        if gate.order == Order::Run || !gate.parked {
            return Err(KvmError::Running { index: self.index });
        }
        match self.fd.try_lock() {
            Ok(fd) => Ok(fd),
            Err(TryLockError::Poisoned(poisoned)) => Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => Err(KvmError::Held { index: self.index }),
        }
    }

    /// Gives an order and makes the thread notice it.
    pub(crate) fn order(&self, order: Order) {
        let mut gate = self.gate();
        gate.order = order;
        gate.throttled_until = None;
        self.kick(&gate);
    }

    /// Waits until the thread is parked.
    pub(crate) fn wait_parked(&self) -> Result<(), KvmError> {
        let gate = self.gate();
        let (gate, _) = self
            .changed
            .wait_timeout_while(gate, PARK_TIMEOUT, |gate| !gate.parked)
            .unwrap_or_else(PoisonError::into_inner);
        if gate.parked { Ok(()) } else { Err(KvmError::Stuck { index: self.index, seconds: PARK_TIMEOUT.as_secs() }) }
    }

    /// Keeps a running vCPU out of the guest until then; `None` lets it in again.
    pub(crate) fn throttle(&self, until: Option<Instant>) {
        let mut gate = self.gate();
        if gate.order == Order::Run {
            gate.throttled_until = until;
            self.kick(&gate);
        }
    }

    /// The thread's work: obeys orders until it is told to leave. Returns how the guest ended, if
    /// this vCPU ended it; then it may be called again.
    pub(crate) fn work(&self, handler: &dyn ExitHandler) -> Option<Ending> {
        self.gate().thread = Some(Thread::current());
        while self.pass_gate() {
            let mut fd = self.fd();
            let ended = loop {
                match self.run_once(&mut fd, handler) {
                    ControlFlow::Continue(()) => {}
                    ControlFlow::Break(ended) => break ended,
                }
            };
            if ended.is_some() {
                return ended;
            }
        }
        None
    }

    /// Waits at the gate; false when the thread is to leave.
    fn pass_gate(&self) -> bool {
        let mut gate = self.gate();
        loop {
            let now = Instant::now();
            gate = match (gate.order, gate.throttled_until) {
                (Order::Leave, _) => {
                    gate.thread = None;
                    self.park(&mut gate);
                    return false;
                }
                (Order::Park, _) => {
                    self.park(&mut gate);
                    self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner)
                }
                (Order::Run, Some(until)) if until > now => self.wait_at_most(gate, until - now),
                (Order::Run, _) => {
                    gate.throttled_until = None;
                    gate.parked = false;
                    self.page.set_immediate_exit(false);
                    return true;
                }
            };
        }
    }

    fn park(&self, gate: &mut Gate) {
        if !gate.parked {
            gate.parked = true;
            self.changed.notify_all();
        }
    }

    /// Enters the guest once and serves its exit. Breaks when the thread must go to the gate, with
    /// the reason if the guest has ended.
    fn run_once(&self, fd: &mut VcpuFd, handler: &dyn ExitHandler) -> ControlFlow<Option<Ending>> {
        let reaction = match fd.run() {
            Ok(exit) => self.serve(exit, handler).map_err(Some),
            Err(error) if error.errno() == libc::EINTR => Err(None),
            // A vCPU that waits for its start-up message was woken.
            Err(error) if error.errno() == libc::EAGAIN => Ok(Reaction::Continue),
            Err(error) => Err(Some(Ending::RunFailed { errno: error.errno() })),
        };
        match reaction {
            Ok(Reaction::Continue) => ControlFlow::Continue(()),
            Ok(Reaction::Rest(rest)) => {
                self.rest(rest);
                ControlFlow::Continue(())
            }
            Ok(Reaction::End) => ControlFlow::Break(Some(Ending::Requested)),
            Err(ended) => ControlFlow::Break(ended),
        }
    }

    fn serve(&self, exit: VcpuExit<'_>, handler: &dyn ExitHandler) -> Result<Reaction, Ending> {
        let vcpu = self.index;
        match exit {
            // String instructions deliver several elements at once.
            VcpuExit::IoOut(port, data) => {
                let elements = data.chunks(self.page.io_size().max(1));
                Ok(elements.map(|element| handler.pio_out(vcpu, port, element)).fold(Reaction::Continue, stronger))
            }
            VcpuExit::IoIn(port, data) => {
                let elements = data.chunks_mut(self.page.io_size().max(1));
                Ok(elements.map(|element| handler.pio_in(vcpu, port, element)).fold(Reaction::Continue, stronger))
            }
            VcpuExit::MmioWrite(address, data) => Ok(handler.mmio_write(vcpu, address, data)),
            VcpuExit::MmioRead(address, data) => Ok(handler.mmio_read(vcpu, address, data)),
            VcpuExit::Intr | VcpuExit::IrqWindowOpen => Ok(Reaction::Continue),
            VcpuExit::Shutdown => Err(Ending::Shutdown),
            VcpuExit::Hlt => Err(Ending::Halted),
            VcpuExit::InternalError => Err(Ending::InternalError { suberror: self.page.internal_suberror() }),
            VcpuExit::FailEntry(reason, _) => Err(Ending::FailedEntry { reason }),
            other => Err(Ending::UnknownExit(format!("{other:?}"))),
        }
    }

    /// Rests until the time is over or an order comes.
    fn rest(&self, rest: Duration) {
        let until = Instant::now() + rest;
        let mut gate = self.gate();
        while gate.order == Order::Run {
            match until.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => gate = self.wait_at_most(gate, left),
                _ => break,
            }
        }
    }

    fn wait_at_most<'a>(&self, gate: MutexGuard<'a, Gate>, time: Duration) -> MutexGuard<'a, Gate> {
        self.changed.wait_timeout(gate, time).unwrap_or_else(PoisonError::into_inner).0
    }

    #[allow(unsafe_code)]
    fn kick(&self, gate: &Gate) {
        self.page.set_immediate_exit(true);
        self.changed.notify_all();
        if let (false, Some(thread)) = (gate.parked, gate.thread) {
            // SAFETY: the thread takes itself out of the gate, under the lock held here, before it ends.
            unsafe { thread.kick() };
        }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of two reactions to one exit, the one that must not be missed.
fn stronger(one: Reaction, other: Reaction) -> Reaction {
    match (one, other) {
        (Reaction::End, _) | (_, Reaction::End) => Reaction::End,
        (Reaction::Rest(a), Reaction::Rest(b)) => Reaction::Rest(a.max(b)),
        (Reaction::Rest(rest), _) | (_, Reaction::Rest(rest)) => Reaction::Rest(rest),
        _ => Reaction::Continue,
    }
}
