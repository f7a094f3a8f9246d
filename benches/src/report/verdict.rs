//! Ours beside QEMU, cell by cell: by how much, and whether that is more than noise.

use crate::study::{Engine, Guest, Link, Mover, Study};

use super::group::{Group, Quantity, Sample, cell, cells, chance_apart};
use super::reasons;

/// With a single run there is no noise to be seen. What is less apart than this factor is taken for it: that is how far the least and
/// the most of three runs were apart in four of five cells at 1 Gbit/s on a virtual machine of two CPUs (`harness-paper` of 2026-11-22).
pub(crate) fn single_run_noise(quantity: Quantity) -> f64 {
    match quantity {
        Quantity::Time => 1.2,
        Quantity::Downtime => 1.5,
        Quantity::Stall => 3.0,
        Quantity::Bytes => 1.1,
        Quantity::Cpu => 1.35,
    }
}

/// What stands beside a loss that nobody has looked into.
pub(crate) const NO_REASON: &str = "No reason has been written down yet.";

/// How ours compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Judgement {
    Better,
    /// No further apart than the runs of either.
    Level,
    Worse,
}

impl Judgement {
    /// Less is better. Ranges that do not overlap are a difference; of a single run, [`single_run_noise`] is.
    pub(crate) fn of(quantity: Quantity, ours: &Sample, theirs: &Sample) -> Option<Self> {
        if ours.is_empty() || theirs.is_empty() {
            return None;
        }
        let worse = |a: &Sample, b: &Sample| match (a.len(), b.len()) {
            (1, _) | (_, 1) => a.median() > b.median() * single_run_noise(quantity),
            _ => a.least() > b.most(),
        };
        Some(match (worse(ours, theirs), worse(theirs, ours)) {
            (true, _) => Self::Worse,
            (_, true) => Self::Better,
            _ => Self::Level,
        })
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Better => "better",
            Self::Level => "level",
            Self::Worse => "worse",
        }
    }
}

/// What ours is held against.
#[derive(Clone, Debug)]
pub(crate) struct Against<'a> {
    pub(crate) mover: &'a Mover,
    pub(crate) sample: Sample,
    /// Ours divided by it.
    pub(crate) ratio: f64,
    pub(crate) judgement: Judgement,
}

impl<'a> Against<'a> {
    fn new(ours: &Sample, theirs: &Group<'a>, quantity: Quantity) -> Option<Self> {
        let sample = theirs.sample(quantity);
        let judgement = Judgement::of(quantity, ours, &sample)?;
        Some(Self { mover: theirs.mover, ratio: ours.median() / sample.median(), sample, judgement })
    }
}

/// One quantity of one of ours in a cell.
#[derive(Clone, Debug)]
pub(crate) struct Row<'a> {
    pub(crate) quantity: Quantity,
    pub(crate) ours: Sample,
    /// The QEMU that was the fastest in this cell.
    pub(crate) fastest: Option<Against<'a>>,
    /// The least value of any QEMU that finished.
    pub(crate) best: Option<Against<'a>>,
}

/// One of ours in a cell, against every QEMU that finished there.
#[derive(Clone, Debug)]
pub(crate) struct Duel<'a> {
    pub(crate) link: &'a Link,
    pub(crate) guest: &'a Guest,
    pub(crate) ours: Group<'a>,
    /// How many settings of QEMU were run here, and those that finished every time.
    pub(crate) qemus: usize,
    /// How many of those came to no end in time; one that failed says nothing of its engine.
    pub(crate) given_up: usize,
    pub(crate) finishers: Vec<Group<'a>>,
    pub(crate) rows: Vec<Row<'a>>,
}

/// Where ours is behind, or does not get to the end.
#[derive(Clone, Debug)]
pub(crate) struct Loss<'a> {
    pub(crate) link: &'a str,
    pub(crate) guest: &'a str,
    pub(crate) mover: &'a str,
    pub(crate) quantity: Quantity,
    pub(crate) words: String,
    /// What a person who looked into it has written, or else what is known of the engines; nothing if there is neither.
    pub(crate) reason: Option<&'a str>,
}

/// How often ours is ahead, level and behind the best of any QEMU.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Tally {
    pub(crate) better: usize,
    pub(crate) level: usize,
    pub(crate) worse: usize,
    /// Cells in which ours finished and no QEMU that was run did.
    pub(crate) alone: usize,
    /// Cells in which ours did not finish every time.
    pub(crate) unfinished: usize,
}

impl<'a> Duel<'a> {
    fn new(ours: Group<'a>, cell: &[Group<'a>]) -> Self {
        let others = || cell.iter().filter(|group| group.mover.engine == Engine::Qemu);
        let finishers: Vec<Group<'a>> = others().filter(|group| group.finished()).cloned().collect();
        let fastest = least(&finishers, Quantity::Time);
        let rows = Quantity::ALL.map(|quantity| {
            // Of ours as of theirs: those that came to an end do not speak for those that did not.
            let values = if ours.finished() { ours.sample(quantity) } else { Sample::default() };
            let against = |group: Option<&Group<'a>>| group.and_then(|group| Against::new(&values, group, quantity));
            let (fastest, best) = (against(fastest), against(least(&finishers, quantity)));
            Row { quantity, fastest, best, ours: values }
        });
        let qemus = others().count();
        let given_up = others().filter(|group| group.standing.given_up > 0).count();
        Self { link: ours.link, guest: ours.guest, rows: rows.into(), qemus, given_up, finishers, ours }
    }

    /// Whether ours came to its end, and every QEMU was too slow for it.
    pub(crate) fn is_alone(&self) -> bool {
        self.ours.finished() && self.finishers.is_empty() && self.qemus > 0 && self.given_up == self.qemus
    }

    fn losses<'b>(&'b self, study: &'a Study) -> impl Iterator<Item = Loss<'a>> + use<'a, 'b> {
        let (link, guest, mover) = (self.link.name.as_str(), self.guest.name.as_str(), self.ours.mover.name.as_str());
        let loss = move |quantity: Quantity, words: String, against: Option<&Group<'a>>| {
            let remark = study.remarks.iter().find(|remark| {
                let about = (remark.link.as_str(), remark.guest.as_str(), remark.quantity.as_str());
                let fits = |name: &String| against.is_some_and(|group| group.mover.name == *name);
                about == (link, guest, quantity.name()) && remark.against.as_ref().is_none_or(fits)
            });
            let known = against.and_then(|group| reasons::known(&self.ours, quantity, group));
            let reason = remark.map(|remark| remark.text.as_str()).or(known);
            Loss { link, guest, mover, quantity, words, reason }
        };
        let trouble = self.ours.standing.trouble().unwrap_or_default();
        let unfinished = (!self.ours.finished())
            .then(|| loss(Quantity::Time, format!("does not finish every time: {trouble}"), None));
        let behind = self.rows.iter().filter_map(move |row| {
            let best = row.best.as_ref().filter(|best| best.judgement == Judgement::Worse)?;
            let shown = |sample: &Sample| row.quantity.shown(sample.median());
            let words = format!("{} against {} of {}", shown(&row.ours), shown(&best.sample), best.mover.name);
            let against = self.finishers.iter().find(|group| group.mover.name == best.mover.name);
            Some(loss(row.quantity, format!("{words}, {}", super::words::ratio(best.ratio)), against))
        });
        unfinished.into_iter().chain(behind)
    }
}

fn least<'b, 'a>(groups: &'b [Group<'a>], quantity: Quantity) -> Option<&'b Group<'a>> {
    let valued = groups.iter().filter(|group| !group.sample(quantity).is_empty());
    valued.min_by(|a, b| a.sample(quantity).median().total_cmp(&b.sample(quantity).median()))
}

/// Each of ours in each cell.
pub(crate) fn duels(study: &Study) -> Vec<Duel<'_>> {
    let all = cells(study).flat_map(|(link, guest)| {
        let cell = cell(study, link, guest);
        let ours: Vec<Group<'_>> = cell.iter().filter(|group| group.is_ours()).cloned().collect();
        ours.into_iter().map(move |ours| Duel::new(ours, &cell))
    });
    all.collect()
}

/// Everything in which ours is behind, in the order of the cells.
pub(crate) fn losses<'a>(study: &'a Study, duels: &[Duel<'a>]) -> Vec<Loss<'a>> {
    duels.iter().flat_map(|duel| duel.losses(study)).collect()
}

/// Losses with the same reason together, in the order in which the first of each stands; those without one last.
pub(crate) fn by_reason<'a, 'b>(losses: &'b [Loss<'a>]) -> Vec<(&'a str, Vec<&'b Loss<'a>>)> {
    let mut groups: Vec<(&'a str, Vec<&'b Loss<'a>>)> = Vec::new();
    let (with, without): (Vec<_>, Vec<_>) = losses.iter().partition(|loss| loss.reason.is_some());
    for loss in with.into_iter().chain(without) {
        let reason = loss.reason.unwrap_or(NO_REASON);
        match groups.iter_mut().find(|(found, _)| *found == reason) {
            Some((_, group)) => group.push(loss),
            None => groups.push((reason, vec![loss])),
        }
    }
    groups
}

/// How likely two equals look different here, by the least number of runs that any two have where both have several; nothing if
/// there are no such.
pub(crate) fn chance(duels: &[Duel<'_>]) -> Option<(usize, f64)> {
    let compared = duels.iter().flat_map(|duel| &duel.rows);
    let runs = compared.filter_map(|row| Some(row.ours.len().min(row.best.as_ref()?.sample.len())));
    let least = runs.filter(|runs| *runs > 1).min()?;
    Some((least, chance_apart(least, least)))
}

pub(crate) fn tally(duels: &[Duel<'_>]) -> Tally {
    let mut tally = Tally::default();
    for duel in duels {
        tally.alone += usize::from(duel.is_alone());
        tally.unfinished += usize::from(!duel.ours.finished());
        for best in duel.rows.iter().filter_map(|row| row.best.as_ref()) {
            match best.judgement {
                Judgement::Better => tally.better += 1,
                Judgement::Level => tally.level += 1,
                Judgement::Worse => tally.worse += 1,
            }
        }
    }
    tally
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;
    use crate::study::{End, Remark};

    fn sample(values: &[f64]) -> Sample {
        Sample::new(values.iter().copied())
    }

    /// Ours and two QEMUs, which took these times.
    fn study(ours: &[f64], plain: &[f64], packed: &[f64]) -> Study {
        let mut study = example::small(ours);
        for (name, times) in [("qemu-plain", plain), ("qemu-packed", packed)] {
            let mover = Mover { name: name.to_owned(), engine: Engine::Qemu, ..study.movers[0].clone() };
            let mut others = example::small(times).runs;
            for run in &mut others {
                name.clone_into(&mut run.mover);
            }
            study.runs.extend(others);
            study.movers.push(mover);
        }
        study
    }

    fn worse(study: &Study) -> Vec<String> {
        let found = losses(study, &duels(study));
        found.iter().filter(|loss| loss.quantity == Quantity::Time).map(|loss| loss.words.clone()).collect()
    }

    #[test]
    fn ranges_that_overlap_are_noise_and_a_single_run_has_what_is_usual() {
        let of = |quantity, ours: &[f64], theirs: &[f64]| Judgement::of(quantity, &sample(ours), &sample(theirs));
        let judge = |ours: &[f64], theirs: &[f64]| of(Quantity::Time, ours, theirs);
        assert_eq!(judge(&[1.0, 2.0], &[1.9, 3.0]), Some(Judgement::Level));
        assert_eq!(judge(&[1.0, 1.1], &[1.2, 1.3]), Some(Judgement::Better));
        assert_eq!(judge(&[1.2, 1.3], &[1.0, 1.1]), Some(Judgement::Worse));
        assert_eq!(judge(&[1.19], &[1.0]), Some(Judgement::Level));
        assert_eq!(judge(&[1.21], &[1.0, 1.0]), Some(Judgement::Worse));
        assert_eq!(of(Quantity::Downtime, &[1.4], &[1.0]), Some(Judgement::Level));
        assert_eq!(of(Quantity::Downtime, &[1.0], &[2.1]), Some(Judgement::Better));
        assert_eq!(judge(&[0.0], &[0.0]), Some(Judgement::Level));
        assert_eq!(judge(&[], &[1.0]), None);
    }

    #[test]
    fn the_best_qemu_is_one_that_finished_every_time() {
        let mut study = study(&[5.0], &[6.0, 6.2], &[1.0, 1.0]);
        study.runs.last_mut().unwrap().end = End::Failed("lost".to_owned());
        let duels = duels(&study);
        assert_eq!(duels[0].rows[0].fastest.as_ref().unwrap().mover.name, "qemu-plain");
        assert_eq!((duels[0].qemus, duels[0].finishers.len()), (2, 1));
        let time = duels[0].rows[0].best.as_ref().unwrap();
        assert!((time.ratio - 5.0 / 6.1).abs() < 1e-9 && time.judgement == Judgement::Better);
    }

    #[test]
    fn the_best_of_a_quantity_may_be_another_than_the_fastest() {
        let mut study = study(&[5.0], &[4.0], &[8.0]);
        study.runs[2].wire_bytes = 1;
        let duels = duels(&study);
        let bytes = duels[0].rows.iter().find(|row| row.quantity == Quantity::Bytes).unwrap();
        assert_eq!(bytes.best.as_ref().unwrap().mover.name, "qemu-packed");
        assert_eq!(bytes.fastest.as_ref().unwrap().mover.name, "qemu-plain");
    }

    #[test]
    fn what_few_runs_cannot_tell_is_known() {
        let of = |ours: &[f64], theirs: &[f64]| chance(&duels(&study(ours, theirs, theirs)));
        assert_eq!(of(&[1.0, 2.0, 3.0], &[1.0, 2.0, 3.0]), Some((3, chance_apart(3, 3))));
        assert_eq!(of(&[1.0, 2.0, 3.0], &[1.0]), None);
    }

    #[test]
    fn a_loss_is_named_with_its_remark_or_its_lack() {
        let mut study = study(&[5.0], &[4.0], &[8.0]);
        assert_eq!(worse(&study), ["5.00 s against 4.00 s of qemu-plain, 1.25×"]);
        let remark = |text: &str| Remark {
            link: "100mbit".to_owned(),
            guest: "idle".to_owned(),
            quantity: "time".to_owned(),
            against: Some("qemu-packed".to_owned()),
            text: text.to_owned(),
        };
        assert_eq!(losses(&study, &duels(&study))[0].reason, None);
        study.remarks.push(remark("true of another"));
        assert_eq!(losses(&study, &duels(&study))[0].reason, None);
        study.remarks.push(Remark { against: None, ..remark("a reason") });
        assert_eq!(losses(&study, &duels(&study))[0].reason, Some("a reason"));
    }

    #[test]
    fn not_finishing_is_a_loss_even_if_nobody_finishes() {
        let mut study = study(&[5.0, 5.0], &[6.0], &[6.0]);
        study.runs.iter_mut().for_each(|run| run.end = End::GivenUp);
        assert_eq!(worse(&study), ["does not finish every time: given up"]);
        assert_eq!(tally(&duels(&study)), Tally { unfinished: 1, ..Tally::default() });
        study.runs[0].end = End::Completed;
        study.runs[1].end = End::Completed;
        assert!(worse(&study).is_empty());
        assert_eq!(tally(&duels(&study)), Tally { alone: 1, ..Tally::default() });
        // A QEMU that failed was not beaten.
        study.runs[3].end = End::Failed("no such capability".to_owned());
        assert_eq!(tally(&duels(&study)), Tally::default());
    }

    #[test]
    fn those_of_ours_that_came_to_an_end_do_not_speak_for_the_others() {
        let mut study = study(&[1.0, 1.0], &[6.0], &[6.0]);
        assert!(tally(&duels(&study)).better > 0);
        study.runs[0].end = End::GivenUp;
        assert_eq!(tally(&duels(&study)), Tally { unfinished: 1, ..Tally::default() });
        assert_eq!(worse(&study), ["does not finish every time: 1 of 2 given up"]);
    }

    #[test]
    fn losses_of_one_reason_stand_together_and_those_without_last() {
        let loss = |guest, reason| Loss {
            link: "1gbit",
            guest,
            mover: "ours",
            quantity: Quantity::Time,
            words: String::new(),
            reason,
        };
        let losses = [loss("a", None), loss("b", Some("x")), loss("c", Some("y")), loss("d", Some("x"))];
        let found = by_reason(&losses);
        let names = found.iter().map(|(reason, losses)| (*reason, losses.iter().map(|loss| loss.guest).collect()));
        assert_eq!(
            names.collect::<Vec<(&str, Vec<&str>)>>(),
            [("x", vec!["b", "d"]), ("y", vec!["c"]), (NO_REASON, vec!["a"])]
        );
        assert!(by_reason(&[]).is_empty());
    }
}
