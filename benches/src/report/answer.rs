//! The short answer: how long each guest took, in sentences.

use crate::study::model::DOWNTIME_SECONDS;
use crate::study::{Engine, Guest, Link, Study};

use super::group::{Group, Quantity, cell};
use super::verdict::{Duel, tally};
use super::words;

/// A standstill of so many times what is allowed was forced, not chosen.
const FORCED: f64 = 2.0;

/// One guest over all links.
#[derive(Clone, Debug)]
pub(crate) struct Answer<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) parts: Vec<Part>,
}

/// One guest over one link.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Part {
    /// `8.61 s over 1 Gbit/s`.
    pub(crate) ours: String,
    /// What else must be said: the standstill, how far it was slowed.
    pub(crate) besides: Vec<String>,
    /// The fastest QEMU; nothing if none was run.
    pub(crate) theirs: Option<String>,
}

/// Ours is the first mover that is ours; without one, the first of all.
pub(crate) fn answers(study: &Study) -> Vec<Answer<'_>> {
    let first = study.movers.iter().find(|mover| mover.engine == Engine::Pageferry).or(study.movers.first());
    let Some(first) = first else { return Vec::new() };
    let of = |guest| {
        let parts = study.links.iter().filter_map(|link| {
            let group = Group::of(study, link, guest, first)?;
            Some(Part { ours: time(&group), besides: besides(&group), theirs: theirs(study, link, guest, &group) })
        });
        Answer { guest, parts: parts.collect() }
    };
    study.guests.iter().map(of).filter(|answer| !answer.parts.is_empty()).collect()
}

fn time(group: &Group<'_>) -> String {
    format!("{} over {}", group.time_in_words(), link_words(group.link))
}

fn link_words(link: &Link) -> String {
    if link.bits_per_second.is_some() { words::link(link) } else { format!("a link that is {}", words::link(link)) }
}

fn besides(group: &Group<'_>) -> Vec<String> {
    let mut said = Vec::new();
    let downtime = group.sample(Quantity::Downtime).median();
    if group.standing.completed > 0 && downtime.is_finite() {
        let how = if downtime > DOWNTIME_SECONDS * FORCED { "forced to stand still for" } else { "downtime" };
        said.push(format!("{how} {}", words::seconds(downtime)));
    }
    let throttle = group.median_of(|run| run.throttle_percent);
    if throttle > 0.0 {
        said.push(format!("slowed by up to {} %", words::digits(throttle)));
    }
    if group.standing.unverified > 0 {
        said.push("memory not verified".to_owned());
    }
    said
}

fn theirs(study: &Study, link: &Link, guest: &Guest, ours: &Group<'_>) -> Option<String> {
    let others: Vec<Group<'_>> =
        cell(study, link, guest).into_iter().filter(|group| group.is_ours() != ours.is_ours()).collect();
    let finished = others.iter().filter(|group| group.finished());
    let time = |group: &Group<'_>| group.sample(Quantity::Time).median();
    match finished.min_by(|a, b| time(a).total_cmp(&time(b))) {
        Some(best) => Some(format!("{} {}", best.mover.name, words::seconds(time(best)))),
        None if others.is_empty() => None,
        None => Some("no QEMU finished".to_owned()),
    }
}

/// How ours stands against the best of any QEMU, in one sentence; nothing if there is no QEMU.
pub(crate) fn standing(duels: &[Duel<'_>]) -> Option<String> {
    let tally = tally(duels);
    if duels.iter().all(|duel| duel.qemus == 0) {
        return None;
    }
    let compared = tally.better + tally.level + tally.worse;
    let mut words = format!(
        "Against the best value of any QEMU setting, quantity by quantity, ours is better in {} of {compared} comparisons, level in {} and worse in {}.",
        tally.better, tally.level, tally.worse
    );
    let mut add = |count: usize, one: &str, many: &str| {
        if count > 0 {
            words += &format!(" In {count} {}.", if count == 1 { one } else { many });
        }
    };
    add(tally.alone, "cell only ours finished", "cells only ours finished");
    add(tally.unfinished, "cell ours did not finish every time", "cells ours did not finish every time");
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::super::{example, verdict};
    use super::*;
    use crate::study::End;

    #[test]
    fn an_answer_has_the_median_time_and_the_best_of_the_others() {
        let study = example::full();
        let answers = answers(&study);
        assert_eq!((answers.len(), answers[0].parts.len()), (study.guests.len(), study.links.len()));
        let part = &answers[0].parts[1];
        assert!(part.ours.ends_with(" over 1 Gbit/s"), "{part:?}");
        assert!(part.theirs.as_ref().unwrap().starts_with("qemu-multifd-4-zstd "), "{part:?}");
        assert!(standing(&verdict::duels(&study)).unwrap().contains("comparisons"));
    }

    #[test]
    fn what_was_given_up_or_forced_is_said() {
        let mut study = example::small(&[240.0]);
        study.runs[0].downtime_ms = Some(2600.0);
        study.runs[0].throttle_percent = 80.0;
        let part = answers(&study)[0].parts[0].clone();
        assert_eq!(part.besides, ["forced to stand still for 2.60 s", "slowed by up to 80.0 %"]);
        assert_eq!(part.theirs, None);
        study.runs[0].end = End::GivenUp;
        let part = answers(&study)[0].parts[0].clone();
        assert_eq!(part.ours, "given up after 240 s over 100 Mbit/s");
        assert!(standing(&verdict::duels(&study)).is_none());
    }
}
