//! Everything that will be run, checked before anything is.

use std::path::Path;
use std::time::Duration;

use super::HarnessOptions;
use super::presets::Preset;
use crate::BenchError;
use crate::movers::{Memory, Mover, Ours, Qemu, Setting, Subject, forbidden_kvm, migrate_program};
use crate::network::{self, LinkSpec};

/// What is not alike between the engines.
const NICE_QEMU: &str = "QEMU's machine gives the guest no port to rest on, so its virtual CPU is busy all the time; it runs at niceness 10, \
                         so that it takes no CPU time from QEMU's migration. On a machine that is short of CPUs such a guest writes less than it is told to, \
                         which helps QEMU to converge, and may notice longer stalls. Ours runs everything at the usual priority.";

const NO_KVM: &str = "This machine has no /dev/kvm: guests are threads of a process that writes as a virtual machine would, and no virtual machine moved.";

/// What a matrix is called that is no preset's.
const CUSTOM: &str = "custom";

/// The matrix.
#[derive(Debug)]
pub(super) struct Plan {
    name: &'static str,
    pub(super) links: Vec<PlannedLink>,
    pub(super) guests: Vec<PlannedGuest>,
    pub(super) movers: Vec<Box<dyn Mover>>,
    /// Whether the relay stands in for namespaces.
    pub(super) relayed: bool,
    /// What a reader must know.
    pub(super) notes: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct PlannedLink {
    pub(super) spec: LinkSpec,
    pub(super) turns: u32,
    pub(super) limit: Duration,
}

#[derive(Clone, Debug)]
pub(super) struct PlannedGuest {
    pub(super) subject: Subject,
    /// Whether only ours moves it.
    pub(super) ours_alone: bool,
}

impl PlannedGuest {
    /// Who moves it.
    pub(super) fn movers<'a>(&self, all: &'a [Box<dyn Mover>]) -> impl Iterator<Item = &'a dyn Mover> {
        let ours_alone = self.ours_alone;
        all.iter().map(AsRef::as_ref).filter(move |mover: &&dyn Mover| !ours_alone || mover.is_ours())
    }

    /// Whether it is moved in turn with a plain copy: if nothing of it can be packed and nothing is sent twice.
    pub(super) fn is_beside_copy(&self) -> bool {
        self.subject.memory.is_incompressible()
    }
}

impl Plan {
    pub(super) fn new(options: &HarnessOptions) -> Result<Self, BenchError> {
        let preset = if options.test { Preset::Tiny } else { options.preset };
        let parts = preset.parts();
        let name = if options.changes_the_matrix() && !options.test { CUSTOM } else { parts.name };
        let mut notes = Vec::new();
        if cfg!(debug_assertions) {
            notes.push("this is a debug build: build with --release before believing a number".to_owned());
        }
        let guests = guests(options, &parts)?;
        let program = migrate_program(options.migrate.as_deref());
        let ours = if options.ours.is_empty() { vec!["ours".parse::<Setting>()] } else { Vec::new() };
        let ours = ours.into_iter().collect::<Result<Vec<_>, _>>().map_err(BenchError::Tool)?;
        let ours = ours.iter().chain(&options.ours).map(|setting| Ours::new(program.clone(), setting.clone()));
        let mut movers: Vec<Box<dyn Mover>> = ours.map(|ours| Box::new(ours) as Box<dyn Mover>).collect();
        let subjects: Vec<Subject> = guests.iter().map(|guest| guest.subject.clone()).collect();
        let lacking = movers.iter().flat_map(|mover| mover.missing(&subjects)).collect::<Vec<_>>();
        if !lacking.is_empty() {
            return Err(BenchError::Lacking(lacking));
        }
        let named = parse_all(&options.qemu, if options.no_qemu { &[] } else { parts.qemu })?;
        for setting in named {
            let qemu = Qemu::new(program.clone(), setting);
            match qemu.missing(&subjects) {
                lacking if lacking.is_empty() => movers.push(Box::new(qemu)),
                lacking if options.qemu.is_empty() => {
                    note_once(
                        &mut notes,
                        format!("nothing was run beside ours: this machine lacks {}", lacking.join(", ")),
                    );
                }
                lacking => return Err(BenchError::Lacking(lacking)),
            }
        }
        if movers.iter().any(|mover| !mover.is_ours()) {
            notes.push(NICE_QEMU.to_owned());
        }
        let lacking = network::missing_for_namespaces();
        let relayed = options.relay || !lacking.is_empty();
        if relayed {
            let why = if options.relay {
                "as was asked for".to_owned()
            } else {
                format!("since this machine lacks {}", lacking.join(", "))
            };
            notes.push(format!(
                "a relay in the harness stood in for shaped links, {why}: both ends share a network, wire bytes are payload without headers, and the relay's CPU time is its own"
            ));
        }
        if subjects.iter().any(|subject| subject.memory.is_running()) && !Path::new("/dev/kvm").exists() {
            notes.push(NO_KVM.to_owned());
        }
        let plan = Self { name, links: links(options, &parts)?, guests, movers, relayed, notes };
        plan.check_names()?;
        plan.check_transports()?;
        Ok(plan)
    }

    /// The preset's name, or another one if options have made something else of it: it must not take the preset's place.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Whether this user may run the guests.
    pub(super) fn check_rights(&self) -> Result<(), BenchError> {
        let running = self.guests.iter().any(|guest| guest.subject.memory.is_running());
        let forbidden = if running { forbidden_kvm() } else { None };
        forbidden.map_or(Ok(()), |lacking| Err(BenchError::Lacking(vec![lacking])))
    }

    /// What is told apart by name must have different names.
    fn check_names(&self) -> Result<(), BenchError> {
        let movers = self.movers.iter().map(|mover| mover.name().to_owned());
        let guests = self.guests.iter().map(|guest| guest.subject.memory.to_string());
        let links = self.links.iter().map(|link| link.spec.to_string());
        for mut names in [movers.collect::<Vec<_>>(), guests.collect(), links.collect()] {
            names.sort();
            if let Some(name) = names.windows(2).find_map(|pair| (pair[0] == pair[1]).then(|| pair[0].clone())) {
                return Err(BenchError::Tool(format!("two of what is compared are called {name:?}")));
            }
        }
        Ok(())
    }

    /// A relay carries TCP alone.
    fn check_transports(&self) -> Result<(), BenchError> {
        let relays = self.relayed || self.links.iter().any(|link| !link.spec.rtt.is_zero());
        match self.movers.iter().find(|mover| relays && !mover.is_over_tcp()) {
            Some(mover) => Err(BenchError::Tool(format!(
                "{} does not run over TCP, and the relay that adds distance or stands in for shaped links carries nothing else",
                mover.name()
            ))),
            None => Ok(()),
        }
    }
}

fn note_once(notes: &mut Vec<String>, note: String) {
    if !notes.contains(&note) {
        notes.push(note);
    }
}

fn parse_all<T: Clone + std::str::FromStr<Err = String>>(given: &[T], default: &[&str]) -> Result<Vec<T>, BenchError> {
    if !given.is_empty() {
        return Ok(given.to_vec());
    }
    default.iter().map(|text| text.parse()).collect::<Result<_, _>>().map_err(BenchError::Tool)
}

fn guests(options: &HarnessOptions, parts: &super::presets::Parts) -> Result<Vec<PlannedGuest>, BenchError> {
    let bytes = options.size.unwrap_or(parts.mebibytes << 20);
    let planned = |memory, ours_alone| PlannedGuest { subject: Subject { memory, bytes }, ours_alone };
    let named: Vec<Memory> = parse_all(&options.guest, parts.guests)?;
    let alone: Vec<Memory> = if options.guest.is_empty() { parse_all(&[], parts.ours_alone)? } else { Vec::new() };
    let named = named.into_iter().map(|memory| planned(memory, false));
    Ok(named.chain(alone.into_iter().map(|memory| planned(memory, true))).collect())
}

fn links(options: &HarnessOptions, parts: &super::presets::Parts) -> Result<Vec<PlannedLink>, BenchError> {
    // Links of the command line's own get what the slowest of the preset has.
    let slowest = parts.links.iter().max_by_key(|link| link.limit_seconds);
    let (turns, seconds) = slowest.map_or((1, 60), |link| (link.turns, link.limit_seconds));
    let planned = |spec, turns, seconds| PlannedLink {
        spec,
        turns: options.turns.unwrap_or(turns),
        limit: Duration::from_secs(options.limit.unwrap_or(seconds)),
    };
    if !options.link.is_empty() {
        return Ok(options.link.iter().map(|spec| planned(*spec, turns, seconds)).collect());
    }
    let parse = |link: &super::presets::LinkPart| Ok(planned(link.link.parse()?, link.turns, link.limit_seconds));
    parts.links.iter().map(parse).collect::<Result<_, String>>().map_err(BenchError::Tool)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: HarnessOptions,
    }

    /// A plan for this program as `migrate`: what is planned does not depend on it.
    fn try_plan(arguments: &str) -> Result<Plan, BenchError> {
        let own = std::env::current_exe().unwrap();
        let line = format!("harness --migrate {} --relay {arguments}", own.display());
        Plan::new(&Line::parse_from(line.split_whitespace()).options)
    }

    fn plan(arguments: &str) -> Plan {
        try_plan(arguments).unwrap()
    }

    fn names(plan: &Plan, guest: usize) -> Vec<&str> {
        plan.guests[guest].movers(&plan.movers).map(Mover::name).collect()
    }

    #[test]
    fn options_change_the_parts_of_a_preset() {
        let quick = plan("--no-qemu");
        assert_eq!((quick.links.len(), quick.guests.len(), quick.movers.len()), (2, 5, 1));
        assert!(
            quick.guests[4].ours_alone
                && quick.guests[4].is_beside_copy()
                && !quick.guests[0].is_beside_copy()
                && quick.guests[0].subject.bytes == 256 << 20
        );
        let own = plan("--preset paper --link 50mbit --guest full9 --size 64M --turns 7 --limit 9 --no-qemu");
        assert_eq!((own.links.len(), own.guests.len()), (1, 1));
        assert_eq!((own.links[0].turns, own.links[0].limit), (7, Duration::from_secs(9)));
        assert_eq!(own.guests[0].subject.to_string_for_test(), "full9 67108864");
        assert_eq!((quick.name(), own.name(), plan("--test --no-qemu").name()), ("custom", "custom", "tiny"));
        for (line, changes) in [("", false), ("--preset paper", false), ("--turns 1", true), ("--link 1gbit", true)] {
            let words = ["harness"].into_iter().chain(line.split_whitespace());
            assert_eq!(Line::parse_from(words).options.changes_the_matrix(), changes, "{line}");
        }
    }

    #[test]
    fn every_one_of_ours_moves_what_ours_moves_alone() {
        let plan = plan("--ours a --ours b=--lanes=2 --no-qemu");
        assert_eq!(names(&plan, 0), ["a", "b"]);
        assert_eq!(names(&plan, 4), ["a", "b"]);
    }

    #[test]
    fn what_cannot_be_told_apart_or_cannot_pass_is_refused() {
        for wrong in ["--ours a --ours a", "--guest idle,idle", "--link 1gbit,1gbit", "--ours q=quic://"] {
            assert!(try_plan(&format!("{wrong} --no-qemu")).is_err(), "{wrong}");
        }
        let lacking = Line::parse_from(["harness", "--migrate", "/nowhere", "--no-qemu"]).options;
        let said = Plan::new(&lacking).unwrap_err().to_string();
        assert!(said.contains("/nowhere") && said.contains("cargo build"), "{said}");
    }

    impl Subject {
        fn to_string_for_test(&self) -> String {
            format!("{} {}", self.memory, self.bytes)
        }
    }
}
