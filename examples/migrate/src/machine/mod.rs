//! A small virtual machine monitor made from `pageferry-kvm`: what a VMM that links Pageferry must have, and no more.
//!
//! A guest boots from a [`BootImage`] (our payload, or Linux) into a [`LiveGuest`], which the engine can migrate
//! away. It arrives in an [`ArrivingGuest`]. Either side hands out a [`GuestHandle`] to watch the guest, and to
//! send it commands. Its devices are few: the processors' own timers and interrupt controllers, which KVM brings,
//! and a serial console.

mod boot;
mod console;
mod description;
mod destination;
mod devices;
mod error;
mod handle;
mod input;
mod pc;
mod ports;
mod ram;
mod room;
mod source;
mod watch;

#[cfg(test)]
mod tests;

pub(crate) use boot::{BootImage, Boots};
pub(crate) use description::GuestBacking;
pub(crate) use destination::{ArrivalConfig, ArrivingGuest};
pub(crate) use handle::GuestHandle;
pub(crate) use pc::ConsoleEnds;
pub(crate) use ram::check_size;
pub(crate) use room::{Allowance, NoRoom, check as check_room};
pub(crate) use source::{GuestConfig, LiveGuest};
