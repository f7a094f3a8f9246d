//! Encoder threads that give way to the rest of the host, the guest's vCPUs above all.
#![allow(unsafe_code)]

use std::io;

use pageferry::host::{Joiner, Spawner, StdSpawner, ThreadRole};

/// The nicest that Linux knows.
const NICEST: i32 = 19;

/// Starts plain threads, encoders with so much less priority than this program has.
#[derive(Debug, Clone, Copy)]
pub(super) struct GentleSpawner {
    pub(super) encoder_nice: u8,
}

impl Spawner for GentleSpawner {
    fn spawn(&self, role: ThreadRole, work: Box<dyn FnOnce() + Send>) -> io::Result<Box<dyn Joiner>> {
        let nice = i32::from(self.encoder_nice);
        if nice == 0 || !matches!(role, ThreadRole::Encoder(_)) {
            return StdSpawner.spawn(role, work);
        }
        let gently = Box::new(move || {
            give_way(nice);
            work();
        });
        StdSpawner.spawn(role, gently)
    }
}

/// Makes the calling thread, not the process, so much nicer: to Linux a thread is a process of its own here.
fn give_way(by: i32) {
    let nice = (own_nice() + by).min(NICEST);
    // SAFETY: two plain system calls on the calling thread; no memory is involved. Giving priority away
    // needs no right, and an encoder whose host refuses it all the same works on as it is.
    unsafe {
        let thread = libc::gettid() as libc::id_t;
        let _ = libc::setpriority(libc::PRIO_PROCESS, thread, nice);
    }
}

fn own_nice() -> i32 {
    // SAFETY: two plain system calls on the calling thread, which exists; no memory is involved.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, libc::gettid() as libc::id_t) }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;

    fn nice_of(role: ThreadRole, encoder_nice: u8) -> i32 {
        let (tell, told) = bounded(1);
        let work = Box::new(move || tell.send(own_nice()).unwrap());
        GentleSpawner { encoder_nice }.spawn(role, work).unwrap().join();
        told.recv().unwrap()
    }

    #[test]
    fn only_encoders_give_way_and_only_if_asked_to() {
        let own = own_nice();
        assert_eq!(nice_of(ThreadRole::Encoder(1), 7), (own + 7).min(NICEST));
        assert_eq!(nice_of(ThreadRole::Encoder(1), 19), NICEST);
        assert_eq!(nice_of(ThreadRole::Encoder(1), 0), own);
        assert_eq!(nice_of(ThreadRole::Sender(1), 7), own);
        assert_eq!(own_nice(), own);
    }
}
