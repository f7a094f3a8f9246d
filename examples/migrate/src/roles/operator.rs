//! The operator's wishes: Ctrl-C, SIGTERM, SIGUSR1 and Enter, whatever the program does meanwhile.
//!
//! Ctrl-C cancels a migration that runs and otherwise ends the program; SIGTERM does both in turn.
//! Neither ever cuts a guest off in the middle of something: the third Ctrl-C does.

use std::io::{self, BufRead};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, select, unbounded};
use pageferry::host::Control;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::cli::Moment;

/// Interrupts after which the program ends at once.
const PATIENCE: usize = 3;

/// Listens to the operator from the moment it is made.
#[derive(Debug)]
pub(crate) struct Operator {
    control: Control,
    stop: Receiver<()>,
    go: Receiver<()>,
    pressed_enter: Receiver<()>,
}

/// Whether to go on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Wish {
    GoOn,
    Stop,
}

impl Operator {
    /// Starts to listen. `with_keys` when Enter on standard input means something.
    pub(crate) fn listen(with_keys: bool) -> io::Result<Self> {
        let control = Control::new();
        let (stop_sender, stop) = unbounded();
        let (go_sender, go) = unbounded();
        let signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
        let listener = Listener { control: control.clone(), interrupts: 0, stop: stop_sender, go: go_sender };
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || listener.run(signals))?;
        let (key_sender, pressed_enter) = unbounded();
        if with_keys {
            std::thread::Builder::new().name("keys".to_owned()).spawn(move || watch_keys(&key_sender))?;
        }
        Ok(Self { control, stop, go, pressed_enter })
    }

    /// Steers the migration; cancelled by Ctrl-C and SIGTERM.
    pub(crate) fn control(&self) -> &Control {
        &self.control
    }

    /// Waits until the guest is to be migrated.
    pub(crate) fn wait_for_moment(&self, moment: Moment) -> Wish {
        if moment.on_key {
            return self.wait_for(&self.pressed_enter);
        }
        if moment.on_signal {
            return self.wait_for(&self.go);
        }
        self.wait(moment.after)
    }

    /// Waits, unless the program is to end.
    pub(crate) fn wait(&self, time: Duration) -> Wish {
        match self.stop.recv_timeout(time) {
            Ok(()) => Wish::Stop,
            Err(_) => Wish::GoOn,
        }
    }

    /// What is wanted now; whoever waits for it hears it again.
    pub(crate) fn wish(&self) -> Wish {
        if self.stop.is_empty() { Wish::GoOn } else { Wish::Stop }
    }

    /// After a migration: the Ctrl-C that cancelled it has done its work.
    pub(crate) fn forget_cancel(&self) {
        if self.control.is_cancelled() {
            let _ = self.stop.try_recv();
        }
    }

    /// Waits for the order to end the program.
    pub(crate) fn wait_for_end(&self) {
        // The listener lives as long as the process: this is never an error.
        let _ = self.stop.recv();
    }

    fn wait_for(&self, wanted: &Receiver<()>) -> Wish {
        select! {
            recv(wanted) -> came => {
                // Standard input has ended: Enter will never come.
                if came.is_err() {
                    self.wait_for_end();
                    return Wish::Stop;
                }
                Wish::GoOn
            }
            recv(self.stop) -> _ => Wish::Stop,
        }
    }
}

struct Listener {
    control: Control,
    interrupts: usize,
    stop: Sender<()>,
    go: Sender<()>,
}

impl Listener {
    fn run(mut self, mut signals: Signals) {
        for signal in signals.forever() {
            match signal {
                SIGUSR1 => send(&self.go, 1),
                SIGTERM => self.interrupt(2),
                _ => self.interrupt(1),
            }
        }
    }

    fn interrupt(&mut self, stops: usize) {
        self.interrupts += 1;
        if self.interrupts >= PATIENCE {
            // Ends the process the way an unhandled Ctrl-C does.
            let _ = signal_hook::low_level::emulate_default_handler(SIGINT);
        }
        send(&self.stop, stops);
        self.control.cancel();
    }
}

fn send(to: &Sender<()>, times: usize) {
    for _ in 0..times {
        // Nobody listens any more when the program is ending anyway.
        let _ = to.send(());
    }
}

fn watch_keys(pressed: &Sender<()>) {
    for line in io::stdin().lock().lines() {
        if line.is_err() || pressed.send(()).is_err() {
            return;
        }
    }
}
