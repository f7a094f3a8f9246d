//! Real guests under `/dev/kvm`: each test runs a few machine instructions and watches what they do.
//! Without KVM a test prints why it was skipped.

mod dirty;
mod fixture;
mod running;
mod state;
