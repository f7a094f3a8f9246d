//! Ours beside QEMU, cell by cell: by how much, and whether that is more than noise.

use crate::study::{Engine, Guest, Link, Mover, Study};

use super::group::{Group, Quantity, Sample, cell, cells, chance_apart};

/// With a single run there is no noise to be seen; less than this share of a difference is taken for it.
const SINGLE_RUN_NOISE: f64 = 0.02;

/// What stands beside a loss that nobody has looked into.
pub(crate) const NO_REASON: &str = "no reason has been written down yet";

/// How ours compares.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Judgement {
    Better,
    /// No further apart than the runs of either.
    Level,
    Worse,
}

impl Judgement {
    /// Less is better. Ranges that do not overlap are a difference; of a single run, 2 %.
    pub(crate) fn of(ours: &Sample, theirs: &Sample) -> Option<Self> {
        if ours.is_empty() || theirs.is_empty() {
            return None;
        }
        let worse = |a: &Sample, b: &Sample| match (a.len(), b.len()) {
            (1, _) | (_, 1) => a.median() > b.median() * (1.0 + SINGLE_RUN_NOISE),
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
        let judgement = Judgement::of(ours, &sample)?;
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
    pub(crate) remark: Option<&'a str>,
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
            // What was given up has no total, and its other numbers are of half a migration.
            let values = if ours.standing.completed > 0 { ours.sample(quantity) } else { Sample::default() };
            let against = |group: Option<&Group<'a>>| group.and_then(|group| Against::new(&values, group, quantity));
            let (fastest, best) = (against(fastest), against(least(&finishers, quantity)));
            Row { quantity, fastest, best, ours: values }
        });
        let qemus = others().count();
        Self { link: ours.link, guest: ours.guest, rows: rows.into(), qemus, finishers, ours }
    }

    pub(crate) fn is_alone(&self) -> bool {
        self.ours.finished() && self.qemus > 0 && self.finishers.is_empty()
    }

    fn losses<'b>(&'b self, study: &'a Study) -> impl Iterator<Item = Loss<'a>> + use<'a, 'b> {
        let (link, guest, mover) = (self.link.name.as_str(), self.guest.name.as_str(), self.ours.mover.name.as_str());
        let loss = move |quantity: Quantity, words: String| {
            let remark = study.remarks.iter().find(|remark| {
                (remark.link.as_str(), remark.guest.as_str(), remark.quantity.as_str())
                    == (link, guest, quantity.name())
            });
            Loss { link, guest, mover, quantity, words, remark: remark.map(|remark| remark.text.as_str()) }
        };
        let trouble = self.ours.standing.trouble().unwrap_or_default();
        let unfinished =
            (!self.ours.finished()).then(|| loss(Quantity::Time, format!("does not finish every time: {trouble}")));
        let behind = self.rows.iter().filter_map(move |row| {
            let best = row.best.as_ref().filter(|best| best.judgement == Judgement::Worse)?;
            let shown = |sample: &Sample| row.quantity.shown(sample.median());
            let words = format!("{} against {} of {}", shown(&row.ours), shown(&best.sample), best.mover.name);
            Some(loss(row.quantity, format!("{words}, {}", super::words::ratio(best.ratio))))
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

/// How likely two equals look different here, by the least number of runs that any two have; nothing if that is one.
pub(crate) fn chance(duels: &[Duel<'_>]) -> Option<(usize, f64)> {
    let compared = duels.iter().flat_map(|duel| &duel.rows);
    let runs = compared.filter_map(|row| Some(row.ours.len().min(row.best.as_ref()?.sample.len()))).min()?;
    (runs > 1).then(|| (runs, chance_apart(runs, runs)))
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
    fn ranges_that_overlap_are_noise_and_a_single_run_has_two_percent() {
        let judge = |ours: &[f64], theirs: &[f64]| Judgement::of(&sample(ours), &sample(theirs));
        assert_eq!(judge(&[1.0, 2.0], &[1.9, 3.0]), Some(Judgement::Level));
        assert_eq!(judge(&[1.0, 1.1], &[1.2, 1.3]), Some(Judgement::Better));
        assert_eq!(judge(&[1.2, 1.3], &[1.0, 1.1]), Some(Judgement::Worse));
        assert_eq!(judge(&[1.019], &[1.0]), Some(Judgement::Level));
        assert_eq!(judge(&[1.03], &[1.0, 1.0]), Some(Judgement::Worse));
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
            text: text.to_owned(),
        };
        assert_eq!(losses(&study, &duels(&study))[0].remark, None);
        study.remarks.push(remark("a reason"));
        assert_eq!(losses(&study, &duels(&study))[0].remark, Some("a reason"));
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
    }
}
