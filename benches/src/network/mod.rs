//! Two hosts on one machine: network namespaces joined by a pair of interfaces, shaped to a rate on both ends.
//!
//! What leaves the source is read from its interface's own counter. The kernel counts there what it is handed: frames of up to
//! 64 KiB that are cut later, so TCP and IP headers count once a frame and not once a packet. Goodput is counted the same way, so
//! that quotients of both are right; link-layer totals would be some 4 % higher.

mod goodput;
mod shape;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

pub(crate) use shape::Rate;

use crate::process::Program;
use crate::{BenchError, host};

/// Every namespace's name starts with this and the number of the process that made it.
const PREFIX: &str = "pageferry-link-";

/// The interface's name, the same in both namespaces.
const INTERFACE: &str = "wire";

/// Where named namespaces are kept.
const NAMESPACES: &str = "/run/netns";

/// One of the two hosts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Side {
    Source,
    Destination,
}

impl Side {
    const BOTH: [Self; 2] = [Self::Source, Self::Destination];

    /// Its address on the wire (from the block that is set aside for documentation).
    pub(crate) fn address(self) -> &'static str {
        match self {
            Self::Source => "192.0.2.1",
            Self::Destination => "192.0.2.2",
        }
    }

    fn namespace(self, owner: u32) -> String {
        let name = if self == Self::Source { "source" } else { "destination" };
        format!("{PREFIX}{owner}-{name}")
    }
}

/// Two namespaces and the wire between them. Dropping it removes them.
#[derive(Debug)]
pub(crate) struct Network {
    rate: Rate,
    owner: u32,
}

impl Network {
    /// Makes the namespaces and shapes the wire. Namespaces of processes that were killed are removed first.
    pub(crate) fn new(rate: Rate) -> Result<Self, BenchError> {
        remove_orphans();
        // From here on dropping it removes whatever part of it came to be.
        let network = Self { rate, owner: std::process::id() };
        for side in Side::BOTH {
            ip(&["netns", "add", &side.namespace(network.owner)])?;
        }
        network.join()?;
        for side in Side::BOTH {
            network.set_up(side)?;
        }
        Ok(network)
    }

    pub(crate) fn rate(&self) -> Rate {
        self.rate
    }

    /// A program that will run on one side.
    pub(crate) fn command(&self, side: Side, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &side.namespace(self.owner)]).arg(program);
        command
    }

    /// Bytes that have left this side so far.
    pub(crate) fn sent_bytes(&self, side: Side) -> Result<u64, BenchError> {
        let path = format!("/sys/class/net/{INTERFACE}/statistics/tx_bytes");
        let mut command = self.command(side, Path::new("cat"));
        let output = checked(command.arg(path))?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.trim().parse().map_err(|_| BenchError::Tool(format!("the interface's counter says {text:?}")))
    }

    /// Bytes of payload per second that one connection carries, by iperf3.
    pub(crate) fn goodput(&self, seconds: u32) -> Result<f64, BenchError> {
        goodput::measure(self, seconds)
    }

    fn join(&self) -> Result<(), BenchError> {
        let [source, destination] = Side::BOTH.map(|side| side.namespace(self.owner));
        let pair = ["link", "add", INTERFACE, "netns", &source, "type", "veth"];
        ip(&[&pair[..], &["peer", "name", INTERFACE, "netns", &destination]].concat())
    }

    fn set_up(&self, side: Side) -> Result<(), BenchError> {
        let namespace = side.namespace(self.owner);
        ip(&["-n", &namespace, "addr", "add", &format!("{}/24", side.address()), "dev", INTERFACE])?;
        for interface in ["lo", INTERFACE] {
            ip(&["-n", &namespace, "link", "set", interface, "up"])?;
        }
        match self.rate.shaping() {
            Some(shaping) => {
                let mut command = Command::new("tc");
                command.args(["-n", &namespace, "qdisc", "add", "dev", INTERFACE, "root"]).args(shaping);
                checked(&mut command).map(drop)
            }
            None => Ok(()),
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for side in Side::BOTH {
            remove(&side.namespace(self.owner));
        }
    }
}

/// What a measurement over a shaped link needs and this machine does not have.
pub(crate) fn missing() -> Vec<String> {
    let mut missing = Vec::new();
    for (program, package) in [("ip", "iproute2"), ("tc", "iproute2"), ("iperf3", "iperf3")] {
        if !Program::is_installed(program) {
            missing.push(format!("`{program}` (package {package})"));
        }
    }
    if !crate::sys::is_root() {
        missing.push("the rights of root".to_owned());
    } else if missing.is_empty() {
        missing.extend(try_namespace().err().map(|error| format!("network namespaces ({error})")));
    }
    missing
}

fn try_namespace() -> Result<(), BenchError> {
    let name = format!("{PREFIX}{}-trial", std::process::id());
    let made = ip(&["netns", "add", &name]);
    remove(&name);
    made
}

fn remove(namespace: &str) {
    // Nothing is left to do if it cannot be removed; one that was never made has no entry.
    if Path::new(NAMESPACES).join(namespace).exists() {
        let _ = ip(&["netns", "del", namespace]);
    }
}

/// Removes namespaces whose makers have ended without doing so.
fn remove_orphans() {
    for entry in fs::read_dir(NAMESPACES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if maker(&name).is_some_and(|maker| !Path::new(&format!("/proc/{maker}")).exists()) {
            remove(&name);
        }
    }
}

/// The process that made a namespace of ours.
fn maker(namespace: &str) -> Option<u32> {
    namespace.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn ip(arguments: &[&str]) -> Result<(), BenchError> {
    checked(Command::new("ip").args(arguments)).map(drop)
}

fn checked(command: &mut Command) -> Result<Output, BenchError> {
    let output = command.output().map_err(host("cannot start a network tool"))?;
    if output.status.success() {
        return Ok(output);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(BenchError::Tool(format!("{command:?} failed: {}", said.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_namespaces_have_a_maker() {
        assert_eq!(maker(&Side::Source.namespace(712)), Some(712));
        assert_eq!(maker("pageferry-link-x-source"), None);
        assert_eq!(maker("blue"), None);
    }
}
