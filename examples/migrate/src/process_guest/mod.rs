//! A guest without KVM.
mod pagemap;
mod tracker;
