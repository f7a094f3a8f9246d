//! Compiles the guest program that `migrate` embeds: `$OUT_DIR/guest.elf`, see `guest/main.rs`.
//!
//! It is a program for a bare machine, but the `core` of the Linux target serves, so no other target
//! need be installed: the compiler that builds `migrate` builds the guest. `RUSTFLAGS` do not reach it, which
//! is right: the guest must not use instructions that a virtual CPU may lack.

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    for path in ["build.rs", "guest", "src/workload"] {
        println!("cargo::rerun-if-changed={path}");
    }
    let target = variable("TARGET");
    assert!(
        target.starts_with("x86_64-"),
        "the guest is an x86-64 program: build migrate for x86-64, not for {target}"
    );
    let elf = Path::new(&variable("OUT_DIR")).join("guest.elf");
    let mut rustc = Command::new(variable("RUSTC"));
    rustc.args(["guest/main.rs", "--crate-name=guest", "--crate-type=bin", "--edition=2024", "--target", &target]);
    rustc.args(["-Copt-level=3", "-Ccodegen-units=1", "-Cpanic=abort", "-Crelocation-model=static", "-Cstrip=symbols"]);
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Tguest/link.ld"] {
        rustc.arg(format!("-Clink-arg={argument}"));
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg(format!("-Clinker={linker}"));
    }
    let output = rustc.arg("-o").arg(&elf).output().unwrap_or_else(|error| panic!("cannot run {rustc:?}: {error}"));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "the guest does not compile:\n{messages}");
    messages.lines().for_each(|line| println!("cargo::warning={line}"));
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|error| panic!("cargo sets {name} for build scripts: {error}"))
}
