//! The short answer: how long each guest took, in sentences.

use crate::study::model::DOWNTIME_SECONDS;
use crate::study::{Engine, Guest, Link, Study};

use super::group::{Group, Quantity, cell};
use super::verdict::{Duel, tally};
use super::words;

/// A standstill of so many times what is allowed was forced, not chosen.
const FORCED: f64 = 2.0;

/// A guest that does less of its work than this while it is moved has been slowed so that a person would notice.
const NOTICEABLE: f64 = 0.95;

/// One guest over all links.
#[derive(Clone, Debug)]
pub(crate) struct Answer<'a> {
    pub(crate) guest: &'a Guest,
    pub(crate) parts: Vec<Part<'a>>,
}

/// One guest over one link.
#[derive(Clone, Debug)]
pub(crate) struct Part<'a> {
    pub(crate) link: &'a Link,
    /// `8.61 s`, `given up after 240 s`.
    pub(crate) time: String,
    pub(crate) downtime: Option<String>,
    /// What else must be said: that it was forced, how far the guest was slowed.
    pub(crate) besides: Vec<String>,
    /// The fastest of the others; nothing if none was run.
    pub(crate) theirs: Option<String>,
}

/// Ours is the first mover that is ours; without one, the first of all.
pub(crate) fn answers(study: &Study) -> Vec<Answer<'_>> {
    let first = study.movers.iter().find(|mover| mover.engine == Engine::Pageferry).or(study.movers.first());
    let Some(first) = first else { return Vec::new() };
    let of = |guest| {
        let groups = study.links.iter().filter_map(|link| Group::of(study, link, guest, first));
        Answer { guest, parts: groups.map(|group| Part::new(study, &group)).collect() }
    };
    study.guests.iter().map(of).filter(|answer| !answer.parts.is_empty()).collect()
}

impl<'a> Part<'a> {
    fn new(study: &Study, group: &Group<'a>) -> Self {
        let downtime = group.sample(Quantity::Downtime).median();
        let known = group.standing.completed > 0 && downtime.is_finite();
        Self {
            link: group.link,
            time: group.time_in_words(),
            downtime: known.then(|| words::seconds(downtime)),
            besides: besides(group, downtime),
            theirs: theirs(study, group),
        }
    }

    /// `8.61 s over 1 Gbit/s`, with what else must be said.
    pub(crate) fn in_words(&self) -> String {
        let besides = if self.besides.is_empty() { String::new() } else { format!(" ({})", self.besides.join(", ")) };
        format!("{} over {}{besides}", self.time, words::link(self.link))
    }
}

fn besides(group: &Group<'_>, downtime: f64) -> Vec<String> {
    let mut said = Vec::new();
    if group.standing.completed > 0 && downtime > DOWNTIME_SECONDS * FORCED {
        said.push(format!("forced to stand still for {}", words::seconds(downtime)));
    }
    let throttle = group.median_of(|run| run.throttle_percent);
    if throttle > 0.0 {
        said.push(format!("slowed by up to {} %", words::count(throttle)));
    }
    let worked = group.worked();
    if worked < NOTICEABLE {
        said.push(format!("did {} of its writes meanwhile", words::percent(worked)));
    }
    if group.standing.unverified > 0 {
        said.push("memory not verified".to_owned());
    }
    said
}

fn theirs(study: &Study, ours: &Group<'_>) -> Option<String> {
    let all = cell(study, ours.link, ours.guest).into_iter();
    let others: Vec<Group<'_>> = all.filter(|group| group.is_ours() != ours.is_ours()).collect();
    let finished = others.iter().filter(|group| group.finished());
    let time = |group: &Group<'_>| group.sample(Quantity::Time).median();
    match finished.min_by(|a, b| time(a).total_cmp(&time(b))) {
        Some(best) => Some(format!("{} with {}", words::seconds(time(best)), best.mover.name)),
        None if others.is_empty() => None,
        None => Some("none finished".to_owned()),
    }
}

/// How ours stands against the best of any QEMU, in one sentence; nothing if there is no QEMU.
pub(crate) fn standing(duels: &[Duel<'_>]) -> Option<String> {
    let tally = tally(duels);
    if duels.iter().all(|duel| duel.qemus == 0) {
        return None;
    }
    let compared = tally.better + tally.level + tally.worse;
    let mut said = vec![format!(
        "Against the best value of any QEMU setting, quantity by quantity, ours is better in {} of {compared} comparisons, level in {} and worse in {}.",
        tally.better, tally.level, tally.worse
    )];
    let mut add = |count: usize, one: &str, many: &str| {
        if count > 0 {
            said.push(format!("In {count} {}.", if count == 1 { one } else { many }));
        }
    };
    add(tally.alone, "cell only ours finished", "cells only ours finished");
    add(tally.unfinished, "cell ours did not finish every time", "cells ours did not finish every time");
    Some(said.join(" "))
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
        assert!(part.in_words().ends_with(" s over 1 Gbit/s") && part.downtime.is_some(), "{part:?}");
        assert!(part.theirs.as_ref().unwrap().ends_with(" with qemu-multifd-4-zstd"), "{part:?}");
        assert!(standing(&verdict::duels(&study)).unwrap().contains("comparisons"));
    }

    #[test]
    fn what_was_given_up_or_forced_is_said() {
        let mut study = example::small(&[240.0]);
        study.runs[0].downtime_ms = Some(2600.0);
        study.runs[0].throttle_percent = 80.0;
        study.guests[0].dirty_bytes_per_second = 100;
        study.runs[0].guest_bytes_per_second = Some(31.0);
        let words = answers(&study)[0].parts[0].in_words();
        assert_eq!(
            words,
            "240 s over 100 Mbit/s (forced to stand still for 2.60 s, slowed by up to 80 %, did 31 % of its writes meanwhile)"
        );
        assert_eq!(answers(&study)[0].parts[0].theirs, None);
        study.runs[0].end = End::GivenUp;
        let words = answers(&study)[0].parts[0].in_words();
        assert_eq!(
            words,
            "given up after 240 s over 100 Mbit/s (slowed by up to 80 %, did 31 % of its writes meanwhile)"
        );
        assert!(standing(&verdict::duels(&study)).is_none());
    }
}
