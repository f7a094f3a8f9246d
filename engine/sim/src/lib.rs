//! A deterministic simulator of migrations. The real sessions, planner, accumulator, encoder, placer,
//! barrier and frames run under a virtual clock, between a network that delays, stalls, cuts,
//! truncates and damages bytes, and a guest that knows what every page of it must hold. One seed
//! decides everything, so a run that breaks a rule can be replayed.
#![deny(unsafe_code)]

mod clock;
mod destination;
mod fault;
mod guest;
mod network;
mod random;
mod receiver;
mod run;
mod scenario;
mod sender;
mod source;
mod trace;
mod verify;
mod vm;
mod world;

pub use run::{Ending, RunResult, run_seed};
pub use scenario::Canary;
