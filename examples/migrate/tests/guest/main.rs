//! The guest program under KVM.
mod machine;
#[path = "../../src/payload.rs"]
mod payload;
#[allow(dead_code)]
#[path = "../../src/workload/mod.rs"]
mod workload;

use machine::{Machine, have_kvm};
use workload::params::Params;

#[test]
fn hello() {
    if !have_kvm() {
        return;
    }
    let vcpus = std::env::var("VCPUS").map_or(1, |v| v.parse().unwrap());
    let mib: u64 = std::env::var("MIB").map_or(16, |v| v.parse().unwrap());
    let machine =
        Machine::start(mib << 20, Params { vcpus, ..Params::parse(&std::env::var("P").unwrap_or_default()).unwrap() });
    for i in 0..std::env::var("LINES").map_or(7, |v| v.parse().unwrap()) {
        if i > 2 && i % 4 == 3 {
            machine.command(workload::ports::Command::Check);
        }
        machine.line();
    }
}
