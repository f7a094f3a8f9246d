//! Faster links than were measured: what the model says of them, and what CPU time allows.

use crate::study::model::{DOWNTIME_SECONDS, Expected, expect};
use crate::study::{Guest, Link, Study, Writes};

use super::group::{Group, cell};

/// What is assumed to be left of a link's rate for payload; 1,448 of 1,538 bytes of an Ethernet frame are.
pub(crate) const PAYLOAD_SHARE: f64 = 0.94;

/// The links of the outlook, in bits per second.
pub(crate) const RATES: [f64; 4] = [1e8, 1e9, 1e10, 1e11];

const GIB: f64 = (1_u64 << 30) as f64;

/// What the model expects of a guest over a link of this rate.
pub(crate) fn expected(guest: &Guest, bits_per_second: f64) -> Expected {
    expect(guest, payload(bits_per_second), DOWNTIME_SECONDS)
}

fn payload(bits_per_second: f64) -> f64 {
    bits_per_second / 8.0 * PAYLOAD_SHARE
}

/// What a GiB of guest memory costs a mover that no link holds up.
#[derive(Clone, Debug)]
pub(crate) struct CpuCost<'a> {
    pub(crate) group: Group<'a>,
    /// Seconds of CPU time per GiB of guest memory.
    pub(crate) source: f64,
    pub(crate) destination: f64,
}

impl CpuCost<'_> {
    /// Of the side that costs more.
    pub(crate) fn dearer(&self) -> f64 {
        self.source.max(self.destination)
    }

    /// Bits of guest memory that one core of the dearer side can move in a second.
    pub(crate) fn bits_per_core(&self) -> f64 {
        GIB * 8.0 / self.dearer()
    }

    /// Cores that the dearer side needs to take up guest memory as fast as a link could carry it as it is.
    pub(crate) fn cores_for(&self, bits_per_second: f64) -> f64 {
        self.dearer() * payload(bits_per_second) / GIB
    }
}

/// A link that holds nobody up. Over a shaped one who waits for it spends CPU time on waiting, and who may choose spends it on
/// packing harder: neither says what a faster link would cost.
pub(crate) fn unshaped_link(study: &Study) -> Option<&Link> {
    let measured = |link: &&Link| study.runs.iter().any(|run| run.link == link.name);
    study.links.iter().filter(measured).find(|link| link.bits_per_second.is_none())
}

/// Costs on such a link, of guests that stand idle, or of all if none does; none without such a link.
pub(crate) fn cpu_costs(study: &Study) -> Vec<CpuCost<'_>> {
    let Some(link) = unshaped_link(study) else { return Vec::new() };
    let groups = || study.guests.iter().flat_map(move |guest| cell(study, link, guest)).filter(Group::finished);
    let idle = groups().any(|group| group.guest.writes == Writes::Idle);
    let chosen = groups().filter(|group| !idle || group.guest.writes == Writes::Idle);
    chosen.map(CpuCost::new).collect()
}

impl<'a> CpuCost<'a> {
    fn new(group: Group<'a>) -> Self {
        let gibs = group.guest.bytes as f64 / GIB;
        let source = group.median_of(|run| run.source.cpu_seconds) / gibs;
        let destination = group.median_of(|run| run.destination.cpu_seconds) / gibs;
        Self { group, source, destination }
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn costs_are_those_of_idle_guests_on_a_link_that_holds_nobody_up() {
        let study = example::full();
        let costs = cpu_costs(&study);
        assert_eq!(unshaped_link(&study).unwrap().name, "unshaped");
        assert_eq!(costs.len(), study.movers.len());
        assert!(costs.iter().all(|cost| cost.group.guest.name == "idle" && cost.group.link.name == "unshaped"));
    }

    #[test]
    fn cores_follow_from_the_dearer_side() {
        let mut study = example::small(&[10.0]);
        assert!(cpu_costs(&study).is_empty());
        study.links[0].bits_per_second = None;
        study.guests[0].bytes = 2 << 30;
        study.runs[0].source.cpu_seconds = 1.0;
        study.runs[0].destination.cpu_seconds = 4.0;
        let cost = &cpu_costs(&study)[0];
        assert!((cost.source - 0.5).abs() < 1e-9 && (cost.dearer() - 2.0).abs() < 1e-9);
        assert!((cost.bits_per_core() - GIB * 4.0).abs() < 1.0);
        assert!((cost.cores_for(GIB * 8.0) - 2.0 * PAYLOAD_SHARE).abs() < 1e-9);
    }

    #[test]
    fn a_study_without_runs_has_no_costs() {
        assert!(unshaped_link(&example::nothing()).is_none() && cpu_costs(&example::nothing()).is_empty());
    }

    #[test]
    fn a_faster_link_takes_less_time() {
        let study = example::full();
        let Expected::Ends { seconds, .. } = expected(&study.guests[0], 1e11) else { panic!("it never ends") };
        assert!((seconds - 0.0914).abs() < 0.001, "{seconds}");
    }
}
