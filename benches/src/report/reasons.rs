//! Why ours is behind where it is behind on every machine: what follows from how the engines work. Anything else needs a
//! person who looks into it, and a remark.

use crate::study::Writes;

use super::group::{Group, Quantity};

/// So much less must be on the wire that CPU time has bought something.
const WORTH_IT: f64 = 0.8;

/// A guest that did less than this share of what ours let it do was held back so much that it shows in what was sent.
const HELD_BACK: f64 = 0.8;

const PROOF_AND_PACKING: &str = "Ours packs what it sends and hashes every page (zero test, duplicates, delta, zstd, a 128-bit digest of all memory \
     that is compared before the hand-over): the CPU time buys fewer bytes and the proof. This setting of QEMU sends pages as they are and \
     proves nothing. --compress off takes most of it away.";

const PROOF_ALONE: &str = "Ours hashes every page (zero test, duplicates, a 128-bit digest of all memory that is compared before the hand-over) and \
     tries to pack what it sends, which saved little here. This setting of QEMU sends pages as they are and proves nothing.";

const LAST_PAGES: &str = "Post-copy runs the guest at the destination before its memory is there: its downtime is that of the machine state alone. \
     Ours is pre-copy: the last dirty pages belong to the downtime. Post-copy is not built yet.";

const STANDS_STILL: &str = "Ours is pre-copy: its guest stands still for all of the downtime, last dirty pages included, and for the pauses of a throttle. \
     In post-copy it waits for one page at a time. Post-copy is not built yet.";

const WRITTEN_FASTER_THAN_CARRIED: &str = "The guest writes whole pages faster than the link carries them. Pre-copy sends what is written again until the throttle \
     has slowed the guest down; post-copy after a first pass sends no page more than twice. Post-copy is not built yet.";

const NOT_PACKED_IN_TIME: &str = "Ours packs no harder than the processors can while the link stays busy, and sends the rest as it is: it was done no later, \
     with more bytes. --compress N packs everything at level N.";

const GUEST_HELD_BACK: &str = "QEMU's guest did much less of its work meanwhile, at a niceness of 10 beside QEMU's packing (see how much each worked): what a \
     guest does not write need not be sent again. Ours let its guest do more.";

/// The reason that is known for a loss of ours to these runs of QEMU; nothing if there is none.
pub(super) fn known(ours: &Group<'_>, quantity: Quantity, theirs: &Group<'_>) -> Option<&'static str> {
    let in_postcopy = theirs.runs.iter().all(|run| run.in_postcopy == Some(true));
    let too_fast =
        ours.guest.writes == Writes::WholePages && ours.guest.dirty_bytes_per_second as f64 > ours.link.payload_rate();
    let both_pack = ["zstd", "xbzrle"].iter().any(|codec| theirs.mover.name.contains(codec));
    let set_to = |value| ours.mover.settings.replace('=', " ").contains(&format!("--compress{value}"));
    let (neither_packs, chooses) = (set_to(" off"), set_to(" auto") || !set_to(""));
    let median = |group: &Group<'_>, quantity| group.sample(quantity).median();
    let bytes = |group: &Group<'_>| median(group, Quantity::Bytes);
    let held_back = theirs.worked() < ours.worked() * HELD_BACK;
    let no_later = median(ours, Quantity::Time) <= median(theirs, Quantity::Time);
    match quantity {
        Quantity::Cpu if both_pack || neither_packs => None,
        Quantity::Cpu if bytes(ours) < bytes(theirs) * WORTH_IT => Some(PROOF_AND_PACKING),
        Quantity::Cpu => Some(PROOF_ALONE),
        Quantity::Downtime if in_postcopy => Some(LAST_PAGES),
        Quantity::Stall if in_postcopy => Some(STANDS_STILL),
        Quantity::Time | Quantity::Bytes if in_postcopy && too_fast => Some(WRITTEN_FASTER_THAN_CARRIED),
        Quantity::Time | Quantity::Bytes if both_pack && held_back => Some(GUEST_HELD_BACK),
        Quantity::Bytes if both_pack && chooses && no_later => Some(NOT_PACKED_IN_TIME),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use crate::study::{Engine, Mover, Study};

    /// What is known of a loss in this cell to QEMU of this name, which was in post-copy or not.
    fn reason(
        study: &Study,
        place: [&str; 2],
        quantity: Quantity,
        name: &str,
        in_postcopy: bool,
    ) -> Option<&'static str> {
        let link = study.links.iter().find(|link| link.name == place[0]).unwrap();
        let guest = study.guests.iter().find(|guest| guest.name == place[1]).unwrap();
        let (ours, plain) = (&study.movers[0], &study.movers[1]);
        let mover = Mover { name: name.to_owned(), engine: Engine::Qemu, ..plain.clone() };
        let group = Group::of(study, link, guest, plain).unwrap();
        let runs: Vec<_> = group.runs.iter().map(|run| (*run).clone()).collect();
        let runs: Vec<_> =
            runs.into_iter().map(|run| crate::study::Run { in_postcopy: Some(in_postcopy), ..run }).collect();
        let theirs = Group { mover: &mover, runs: runs.iter().collect(), ..group.clone() };
        known(&Group::of(study, link, guest, ours).unwrap(), quantity, &theirs)
    }

    #[test]
    fn a_reason_is_known_only_where_it_applies() {
        let mut study = example::full();
        let of = |study: &Study, place, quantity, name, in_postcopy| reason(study, place, quantity, name, in_postcopy);
        let (idle, fast) = (["1gbit", "idle"], ["1gbit", "full200"]);
        assert_eq!(of(&study, idle, Quantity::Cpu, "qemu-plain", false), Some(PROOF_AND_PACKING));
        assert_eq!(of(&study, idle, Quantity::Cpu, "qemu-multifd-2-zstd", false), None);
        assert_eq!(of(&study, idle, Quantity::Downtime, "qemu-postcopy", false), None);
        assert_eq!(of(&study, idle, Quantity::Downtime, "qemu-postcopy", true), Some(LAST_PAGES));
        assert_eq!(of(&study, idle, Quantity::Stall, "qemu-postcopy", true), Some(STANDS_STILL));
        assert_eq!(of(&study, idle, Quantity::Time, "qemu-postcopy", true), None);
        assert_eq!(of(&study, fast, Quantity::Time, "qemu-postcopy", true), Some(WRITTEN_FASTER_THAN_CARRIED));
        assert_eq!(of(&study, fast, Quantity::Bytes, "qemu-postcopy", false), None);
        assert_eq!(of(&study, idle, Quantity::Bytes, "qemu-plain", false), None);
        assert_eq!(of(&study, idle, Quantity::Bytes, "qemu-multifd-2-zstd", false), Some(NOT_PACKED_IN_TIME));
        for (settings, reason) in [("tcp --compress 3", None), ("tcp --compress auto", Some(NOT_PACKED_IN_TIME))] {
            study.movers[0].settings = settings.to_owned();
            assert_eq!(of(&study, idle, Quantity::Bytes, "qemu-multifd-2-zstd", false), reason);
        }
        let working = |ours: f64, theirs: f64| {
            let mut study = example::full();
            let runs = study.runs.iter_mut();
            runs.for_each(|run| run.guest_bytes_per_second = Some(if run.mover == "ours" { ours } else { theirs }));
            study
        };
        let time = |study: &Study, name| of(study, fast, Quantity::Time, name, false);
        assert_eq!(time(&working(180e6, 100e6), "qemu-multifd-2-zstd"), Some(GUEST_HELD_BACK));
        assert_eq!(time(&working(110e6, 100e6), "qemu-multifd-2-zstd"), None);
        assert_eq!(time(&working(180e6, 100e6), "qemu-plain"), None);
        let mut late = study.clone();
        late.runs.iter_mut().filter(|run| run.mover == "ours").for_each(|run| run.seconds += 1e3);
        assert_eq!(of(&late, idle, Quantity::Bytes, "qemu-multifd-2-zstd", false), None);
        let most = study.runs.iter().map(|run| run.wire_bytes).max().unwrap();
        study.runs.iter_mut().for_each(|run| run.wire_bytes = most);
        assert_eq!(of(&study, idle, Quantity::Cpu, "qemu-plain", false), Some(PROOF_ALONE));
        study.movers[0].settings = "tcp --compress=off".to_owned();
        assert_eq!(of(&study, idle, Quantity::Cpu, "qemu-plain", false), None);
    }
}
