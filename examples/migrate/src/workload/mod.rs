//! What a demonstration guest does, and how host and guest talk about it.
//!
//! These files are compiled twice: into `migrate`, and (by `build.rs`) into the guest program that
//! `migrate` boots under KVM. So they use `core` only. Because the bytes every page must hold are
//! defined here once, as a pure function of (seed, page number, generation), the guest can check
//! all of its own memory after a migration, and a guest made of plain host threads can do the same.
//!
//! The road of a byte: [`params`] says what to do, [`sweep`] which page is written next and when,
//! [`content`] what it then holds, [`page`] puts it there. [`ports`] and [`mod@line`] are the guest's
//! side doors to the host: what it does with I/O ports and what it prints.

pub(crate) mod content;
pub(crate) mod line;
pub(crate) mod page;
pub(crate) mod params;
pub(crate) mod ports;
pub(crate) mod sweep;
