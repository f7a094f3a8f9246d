//! All vCPUs of a machine and their threads: started, paused, resumed and ended together.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::error::KvmError;
use crate::exit::{Ending, ExitHandler};
use crate::kick;
use crate::vcpu::{Order, Vcpu};
use crate::vm::Vm;

/// The vCPUs, shared by their threads, the throttle and the machine.
#[derive(Debug)]
pub(crate) struct Crew {
    pub(crate) vcpus: Vec<Vcpu>,
    state: Mutex<State>,
    /// Keeps guest memory mapped while any thread can run a vCPU.
    _vm: Arc<Vm>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    ended: Option<Ending>,
}

impl Crew {
    pub(crate) fn new(vcpus: Vec<Vcpu>, vm: Arc<Vm>) -> Self {
        Self { vcpus, state: Mutex::default(), _vm: vm }
    }

    /// Lets all vCPUs run.
    pub(crate) fn resume(&self) -> Result<(), KvmError> {
        let mut state = self.state();
        refuse_ended(&state)?;
        state.running = true;
        self.order_all(Order::Run);
        Ok(())
    }

    /// Stops all vCPUs, and waits until they stand still.
    pub(crate) fn pause(&self) -> Result<(), KvmError> {
        let mut state = self.state();
        state.running = false;
        self.order_all(Order::Park);
        drop(state);
        self.vcpus.iter().try_for_each(Vcpu::wait_parked)?;
        refuse_ended(&self.state())
    }

    pub(crate) fn is_running(&self) -> bool {
        self.state().running
    }

    pub(crate) fn ended(&self) -> Option<Ending> {
        self.state().ended.clone()
    }

    /// Keeps running vCPUs out of the guest until then; `None` lets them in again.
    pub(crate) fn throttle(&self, until: Option<Instant>) {
        self.vcpus.iter().for_each(|vcpu| vcpu.throttle(until));
    }

    fn order_all(&self, order: Order) {
        self.vcpus.iter().for_each(|vcpu| vcpu.order(order));
    }

    /// The guest has ended: no vCPU runs on. True for the first vCPU to say so.
    fn end(&self, ending: &Ending) -> bool {
        let mut state = self.state();
        state.running = false;
        self.order_all(Order::Park);
        let is_first = state.ended.is_none();
        state.ended.get_or_insert_with(|| ending.clone());
        is_first
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn refuse_ended(state: &State) -> Result<(), KvmError> {
    state.ended.clone().map_or(Ok(()), |ending| Err(KvmError::Ended(ending)))
}

/// The running threads; dropping them ends them.
#[derive(Debug)]
pub(crate) struct Threads {
    crew: Arc<Crew>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    /// Starts a thread per vCPU, parked.
    pub(crate) fn start(crew: &Arc<Crew>, handler: Arc<dyn ExitHandler>) -> io::Result<Self> {
        kick::install_handler()?;
        let mut started = Self { crew: Arc::clone(crew), threads: Vec::with_capacity(crew.vcpus.len()) };
        for (index, handler) in std::iter::repeat_n(handler, crew.vcpus.len()).enumerate() {
            let crew = Arc::clone(crew);
            let builder = std::thread::Builder::new().name(format!("vcpu-{index}"));
            started.threads.push(builder.spawn(move || serve(&crew, &crew.vcpus[index], &*handler))?);
        }
        Ok(started)
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.crew.order_all(Order::Leave);
        for thread in self.threads.drain(..) {
            // Panics were caught and reported as the guest's end.
            let _ = thread.join();
        }
    }
}

/// A vCPU thread: runs its vCPU until it is told to leave, and reports the guest's end on the way.
fn serve(crew: &Crew, vcpu: &Vcpu, handler: &dyn ExitHandler) {
    if let Err(error) = kick::unblock_in_this_thread() {
        report(crew, vcpu, handler, &Ending::RunFailed { errno: error.raw_os_error().unwrap_or(0) });
    }
    loop {
        match catch_unwind(AssertUnwindSafe(|| vcpu.work(handler))) {
            Ok(None) => return,
            Ok(Some(ending)) => report(crew, vcpu, handler, &ending),
            Err(_) => report(crew, vcpu, handler, &Ending::HandlerPanicked),
        }
    }
}

fn report(crew: &Crew, vcpu: &Vcpu, handler: &dyn ExitHandler, ending: &Ending) {
    if crew.end(ending) {
        // There is nobody left to tell if this panics too.
        let _ = catch_unwind(AssertUnwindSafe(|| handler.ended(vcpu.index, ending)));
    }
}
