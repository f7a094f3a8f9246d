//! A deterministic simulator of migrations. The real sessions, planner, accumulator, encoder, placer,
//! barrier and frames run under a virtual clock, between a network that delays, stalls, cuts,
//! truncates and damages bytes, and a guest that knows what every page of it must hold. One seed
//! decides everything, so a run that breaks a rule can be replayed.
#![deny(unsafe_code)]

mod audit;
mod campaign;
mod canary;
mod clock;
mod destination;
mod exhaustive;
mod fault;
mod guest;
mod network;
mod random;
mod receiver;
#[cfg(test)]
mod regressions;
mod run;
mod scenario;
mod sender;
mod source;
mod trace;
mod verify;
mod vm;
mod world;

pub use campaign::{Codings, Failure, Statistics, run_seeds};
pub use canary::{CanaryResult, run_canaries};
pub use exhaustive::{run_case, run_exhaustive};
pub use run::{Ending, RunResult, run_seed};
