//! Two hosts on one machine: network namespaces joined by a pair of interfaces, shaped to a rate on both ends.
//!
//! What leaves the source is read from its interface's own counter. The kernel counts there what it is handed: frames of up to
//! 64 KiB that are cut later, so TCP and IP headers count once a frame and not once a packet. Goodput is counted the same way, so
//! that quotients of both are right; link-layer totals would be some 4 % higher.

mod copy;
mod goodput;
mod relay;
mod shape;
mod spec;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use rustix::thread::LinkNameSpaceType;

pub(crate) use self::copy::CopySide;
use self::relay::Relay;
pub(crate) use self::shape::Rate;
pub(crate) use self::spec::LinkSpec;

use crate::process::Program;
use crate::study::Shaper;
use crate::{BenchError, host, interrupt};

/// Where the destination listens in its namespace, and where a relay does in front of it.
const PORT: u16 = 7000;
const RELAY_PORT: u16 = 7001;

/// Where both ends are on one host, the destination's port is one of these.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;

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
    pub(crate) fn ip(self) -> IpAddr {
        let last = if self == Self::Source { 1 } else { 2 };
        Ipv4Addr::new(192, 0, 2, last).into()
    }

    pub(crate) fn address(self) -> String {
        self.ip().to_string()
    }

    fn namespace(self, owner: u32) -> String {
        let name = if self == Self::Source { "source" } else { "destination" };
        format!("{PREFIX}{owner}-{name}")
    }
}

/// Two hosts and what lies between them. Dropping it removes all of it.
#[derive(Debug)]
pub(crate) struct Network {
    spec: LinkSpec,
    // Before the namespaces, in which its sockets are.
    relay: Option<Relay>,
    hosts: Hosts,
}

#[derive(Debug)]
enum Hosts {
    Namespaces(Wire),
    /// Both ends on this host; the relay is all there is between them.
    Loopback {
        /// Where the destination listens.
        destination: SocketAddr,
    },
}

impl Network {
    /// Makes namespaces and shapes the wire between them; a relay at the destination adds the distance.
    pub(crate) fn new(spec: impl Into<LinkSpec>) -> Result<Self, BenchError> {
        let spec = spec.into();
        let wire = Wire::new(spec.rate)?;
        let relay = if spec.rtt.is_zero() { None } else { Some(wire.relay(spec.rtt)?) };
        Ok(Self { spec, relay, hosts: Hosts::Namespaces(wire) })
    }

    /// What stands in for it where this user may make none: a relay between two ports of the loopback interface.
    pub(crate) fn relayed(spec: LinkSpec) -> Result<Self, BenchError> {
        let destination = free_port().map_err(host("cannot find a free port"))?;
        let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let relay = Relay::start(listen, destination, spec.rate, spec.rtt, || Ok(()));
        Ok(Self {
            spec,
            relay: Some(relay.map_err(host("cannot start a relay"))?),
            hosts: Hosts::Loopback { destination },
        })
    }

    pub(crate) fn rate(&self) -> Rate {
        self.spec.rate
    }

    pub(crate) fn shaper(&self) -> Shaper {
        match (&self.hosts, self.spec.rate) {
            (Hosts::Loopback { .. }, _) => Shaper::Relay,
            (_, Rate::Unshaped) => Shaper::Nothing,
            _ => Shaper::TokenBucket,
        }
    }

    /// A program that will run on one side.
    pub(crate) fn command(&self, side: Side, program: &Path) -> Command {
        match &self.hosts {
            Hosts::Namespaces(wire) => wire.command(side, program),
            Hosts::Loopback { .. } => Command::new(program),
        }
    }

    /// Where the destination listens.
    pub(crate) fn destination(&self) -> SocketAddr {
        match &self.hosts {
            Hosts::Namespaces(_) => destination_port(PORT),
            Hosts::Loopback { destination } => *destination,
        }
    }

    /// Where the source dials to reach it.
    pub(crate) fn route(&self) -> SocketAddr {
        self.relay.as_ref().map_or_else(|| self.destination(), Relay::address)
    }

    /// Bytes that have left the source so far.
    pub(crate) fn sent_bytes(&self) -> Result<u64, BenchError> {
        match (&self.hosts, &self.relay) {
            (Hosts::Loopback { .. }, Some(relay)) => Ok(relay.carried()),
            (Hosts::Namespaces(wire), _) => wire.sent_bytes(Side::Source),
            (Hosts::Loopback { .. }, None) => Ok(0),
        }
    }

    /// Bytes of payload per second that a plain copy gets.
    pub(crate) fn try_out(&self) -> Result<f64, BenchError> {
        copy::try_out(self)
    }

    /// Seconds that a plain copy of so many bytes takes.
    pub(crate) fn copy(&self, bytes: u64, limit: Duration) -> Result<f64, BenchError> {
        copy::copy(self, bytes, limit)
    }

    /// Bytes of payload per second that one connection carries, by iperf3.
    pub(crate) fn goodput(&self, seconds: u32) -> Result<f64, BenchError> {
        goodput::measure(self, seconds)
    }
}

/// Where something listens at the destination.
fn destination_port(port: u16) -> SocketAddr {
    SocketAddr::from((Side::Destination.ip(), port))
}

/// A port that nobody has at the moment, below those that the kernel gives to whoever asks for any: those are gone again
/// before the destination listens.
fn free_port() -> std::io::Result<SocketAddr> {
    let first = FIRST_PORT + (std::process::id() % u32::from(PORTS)) as u16;
    let candidates = (first..FIRST_PORT + PORTS).chain(FIRST_PORT..first);
    let mut refused = std::io::ErrorKind::AddrInUse.into();
    for port in candidates {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).and_then(|listener| listener.local_addr()) {
            Ok(address) => return Ok(address),
            Err(error) => refused = error,
        }
    }
    Err(refused)
}

/// Two namespaces and the wire between them. Dropping it removes them.
#[derive(Debug)]
struct Wire {
    rate: Rate,
    owner: u32,
}

impl Wire {
    /// Makes the namespaces and shapes the wire. Namespaces of processes that were killed are removed first.
    fn new(rate: Rate) -> Result<Self, BenchError> {
        remove_orphans();
        // From here on dropping it removes whatever part of it came to be.
        let wire = Self { rate, owner: std::process::id() };
        for side in Side::BOTH {
            ip(&["netns", "add", &side.namespace(wire.owner)])?;
        }
        wire.join()?;
        for side in Side::BOTH {
            wire.set_up(side)?;
        }
        Ok(wire)
    }

    fn command(&self, side: Side, program: &Path) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &side.namespace(self.owner)]).arg(program);
        command
    }

    /// A relay at the destination, which delays what passes: the wire has its rate already.
    fn relay(&self, rtt: Duration) -> Result<Relay, BenchError> {
        let namespace = Path::new(NAMESPACES).join(Side::Destination.namespace(self.owner));
        let enter = move || {
            let namespace = fs::File::open(namespace)?;
            let kind = Some(LinkNameSpaceType::Network);
            Ok(rustix::thread::move_into_link_name_space(namespace.as_fd(), kind)?)
        };
        let (listen, to) = (destination_port(RELAY_PORT), destination_port(PORT));
        Relay::start(listen, to, Rate::Unshaped, rtt, enter).map_err(host("cannot start a relay"))
    }

    /// Bytes that have left this side so far.
    fn sent_bytes(&self, side: Side) -> Result<u64, BenchError> {
        let path = format!("/sys/class/net/{INTERFACE}/statistics/tx_bytes");
        let mut command = self.command(side, Path::new("cat"));
        let output = checked(command.arg(path))?;
        let text = String::from_utf8_lossy(&output.stdout);
        text.trim().parse().map_err(|_| BenchError::Tool(format!("the interface's counter says {text:?}")))
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

impl Drop for Wire {
    fn drop(&mut self) {
        for side in Side::BOTH {
            remove(&side.namespace(self.owner));
        }
    }
}

/// What a measurement by iperf3 over a shaped link needs and this machine does not have.
pub(crate) fn missing() -> Vec<String> {
    missing_programs(&[("ip", "iproute2"), ("tc", "iproute2"), ("iperf3", "iperf3")])
}

/// What a shaped link alone needs.
pub(crate) fn missing_for_namespaces() -> Vec<String> {
    missing_programs(&[("ip", "iproute2"), ("tc", "iproute2")])
}

fn missing_programs(programs: &[(&str, &str)]) -> Vec<String> {
    let lacking = programs.iter().filter(|(program, _)| !Program::is_installed(program));
    let mut missing: Vec<String> =
        lacking.map(|(program, package)| format!("`{program}` (package {package})")).collect();
    if !crate::sys::is_root() {
        missing.push("the rights of root".to_owned());
    } else if missing.is_empty() {
        // A kernel may lack any part of it.
        let trial = Wire::new(Rate::BitsPerSecond(1_000_000_000));
        missing.extend(trial.err().map(|error| format!("network namespaces joined by a shaped wire ({error})")));
    }
    missing
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
    // In a group of its own Ctrl-C does not reach it: what is half made could not be taken down.
    let output = command.process_group(0).output().map_err(host("cannot start a network tool"))?;
    if output.status.success() {
        return Ok(output);
    }
    interrupt::check()?;
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
