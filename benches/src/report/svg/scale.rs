//! From numbers to places on paper, with round numbers to mark the way.

/// How far apart numbers are.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) enum Kind {
    Linear,
    /// Equal quotients are equally far apart.
    Logarithmic,
    /// The same far above this number, linear far below it: there is a place for 0.
    FromZero(f64),
}

/// A line of numbers.
#[derive(Clone, Copy, PartialEq, Debug)]
pub(crate) struct Scale {
    kind: Kind,
    least: f64,
    most: f64,
    /// Where the least and the most are.
    start: f64,
    end: f64,
}

impl Scale {
    /// Bounds that no line can be made of are moved apart.
    pub(crate) fn new(kind: Kind, (least, most): (f64, f64), (start, end): (f64, f64)) -> Self {
        let least = if least.is_finite() { least } else { 0.0 };
        let least = if kind == Kind::Logarithmic { least.max(f64::MIN_POSITIVE.sqrt()) } else { least };
        let apart = if kind == Kind::Logarithmic { least * 10.0 } else { least + 1.0 };
        let most = if most.is_finite() && most > least { most } else { apart };
        Self { kind, least, most, start, end }
    }

    /// From 0 to the largest of these, or a little further to a round number.
    pub(crate) fn from_zero(most: f64, places: (f64, f64), ticks: fn(f64) -> f64) -> Self {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let step = ticks(most);
        Self::new(Kind::Linear, (0.0, (most / step - 1e-9).ceil() * step), places)
    }

    /// Whole steps of 1, 2 and 5 around all of these; at least `decades` long. Numbers that have no logarithm do not count.
    pub(crate) fn around(values: impl IntoIterator<Item = f64>, decades: f64, places: (f64, f64)) -> Self {
        let ends = values.into_iter().filter(|value| value.is_finite() && *value > 0.0);
        let (least, most) = ends.fold((f64::NAN, f64::NAN), |(a, b), value| (value.min(a), value.max(b)));
        let (least, most) = if least.is_finite() { (least, most) } else { (0.1, 1.0) };
        let lacking = (decades - (most / least).log10()).max(0.0) / 2.0;
        let (least, most) = (least * 10_f64.powf(-lacking), most * 10_f64.powf(lacking));
        Self::new(Kind::Logarithmic, (below(least), above(most)), places)
    }

    /// The place of a number; of one that is out of bounds, the bound.
    pub(crate) fn at(&self, value: f64) -> f64 {
        let value = if value.is_nan() { self.least } else { value.clamp(self.least, self.most) };
        let (from, to) = (self.bent(self.least), self.bent(self.most));
        self.start + (self.bent(value) - from) / (to - from) * (self.end - self.start)
    }

    /// The number at a share of the way.
    pub(crate) fn along(&self, share: f64) -> f64 {
        let (from, to) = (self.bent(self.least), self.bent(self.most));
        let bent = from + (to - from) * share;
        match self.kind {
            Kind::Linear => bent,
            Kind::Logarithmic => 10_f64.powf(bent),
            Kind::FromZero(knee) => (10_f64.powf(bent) - 1.0) * knee,
        }
    }

    pub(crate) fn bounds(&self) -> (f64, f64) {
        (self.least, self.most)
    }

    pub(crate) fn places(&self) -> (f64, f64) {
        (self.start, self.end)
    }

    fn bent(&self, value: f64) -> f64 {
        match self.kind {
            Kind::Linear => value,
            Kind::Logarithmic => value.log10(),
            Kind::FromZero(knee) => (1.0 + value / knee).log10(),
        }
    }

    /// Round numbers within the bounds: whole steps, or powers of ten with 2 and 5 between them if those are few.
    pub(crate) fn ticks(&self, step: fn(f64) -> f64) -> Vec<f64> {
        match self.kind {
            Kind::Linear => {
                let step = step(self.most - self.least);
                let (first, last) =
                    ((self.least / step - 1e-9).ceil() as i64, (self.most / step + 1e-9).floor() as i64);
                (first..=last).map(|count| count as f64 * step).collect()
            }
            Kind::Logarithmic => decades(self.least, self.most),
            Kind::FromZero(knee) => [0.0].into_iter().chain(decades(knee, self.most)).collect(),
        }
    }
}

fn decades(least: f64, most: f64) -> Vec<f64> {
    let (from, to) = (least.log10().floor() as i32, most.log10().ceil() as i32);
    let span = (most / least).log10();
    let marks: &[f64] = match span {
        _ if span <= 2.05 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let every = if span > 7.0 { 2 } else { 1 };
    let powers = (from..=to).filter(|power| power.rem_euclid(every) == 0);
    let all = powers.flat_map(|power| marks.iter().map(move |mark| mark * 10_f64.powi(power)));
    all.filter(|value| *value >= least * (1.0 - 1e-9) && *value <= most * (1.0 + 1e-9)).collect()
}

/// About five steps of 1, 2 or 5 times a power of ten.
pub(crate) fn round_step(span: f64) -> f64 {
    below((span / 3.0).max(f64::MIN_POSITIVE.sqrt()))
}

/// About five steps of a power of two.
pub(crate) fn binary_step(span: f64) -> f64 {
    2_f64.powf((span / 5.0).max(1.0).log2().ceil())
}

/// The largest of 1, 2 and 5 times a power of ten that is not more.
fn below(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let mark = [5.0, 2.0].into_iter().find(|mark| mark * power <= value * (1.0 + 1e-9)).unwrap_or(1.0);
    mark * power
}

/// The least of them that is not less.
fn above(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    let mark = [1.0, 2.0, 5.0].into_iter().find(|mark| mark * power >= value * (1.0 - 1e-9)).unwrap_or(10.0);
    mark * power
}

/// Moves places apart until none is nearer to the next than `gap`, as little as may be, and keeps them within bounds.
/// Gives the place of each in the order in which they came.
pub(crate) fn spread(wanted: &[f64], gap: f64, (least, most): (f64, f64)) -> Vec<f64> {
    let mut order: Vec<usize> = (0..wanted.len()).collect();
    order.sort_by(|a, b| wanted[*a].total_cmp(&wanted[*b]));
    let gap = gap.min((most - least) / wanted.len().max(2).saturating_sub(1) as f64);
    // Blocks of neighbours that touch: how many, and where their middle wants to be.
    let mut blocks: Vec<(usize, f64)> = Vec::new();
    for index in &order {
        blocks.push((1, wanted[*index].clamp(least, most)));
        while let [.., (before, upper), (after, lower)] = blocks[..] {
            let room = (before + after) as f64 / 2.0 * gap;
            if lower - upper >= room {
                break;
            }
            let count = before + after;
            let half = (count - 1) as f64 / 2.0 * gap;
            let middle = (upper * before as f64 + lower * after as f64) / count as f64;
            blocks.truncate(blocks.len() - 2);
            blocks.push((count, middle.clamp(least + half, (most - half).max(least + half))));
        }
    }
    let places = blocks.iter().flat_map(|(count, middle)| {
        let first = middle - (count - 1) as f64 / 2.0 * gap;
        (0..*count).map(move |step| first + step as f64 * gap)
    });
    let mut found = vec![0.0; wanted.len()];
    for (index, place) in order.into_iter().zip(places) {
        found[index] = place;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round() {
        let scale = Scale::from_zero(93.0, (0.0, 100.0), round_step);
        assert_eq!(scale.ticks(round_step), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        let bytes = Scale::from_zero(1_073_741_824.0, (0.0, 1.0), binary_step);
        assert_eq!(bytes.ticks(binary_step).last(), Some(&1_073_741_824.0));
        assert_eq!(Scale::around([3.0, 150.0], 1.0, (0.0, 1.0)).bounds(), (2.0, 200.0));
        assert_eq!(Scale::around([0.001, 150.0], 1.0, (0.0, 1.0)).ticks(round_step).len(), 6);
    }

    #[test]
    fn places_go_there_and_back() {
        for kind in [Kind::Linear, Kind::Logarithmic, Kind::FromZero(5.0)] {
            let scale = Scale::new(kind, (1.0, 500.0), (300.0, 20.0));
            for value in [1.0, 7.0, 123.0, 500.0] {
                let share = (scale.at(value) - 300.0) / (20.0 - 300.0);
                assert!((scale.along(share) / value - 1.0).abs() < 1e-9, "{kind:?} {value}");
            }
            assert!((scale.at(f64::NAN) - 300.0).abs() < 1e-9 && (scale.at(f64::INFINITY) - 20.0).abs() < 1e-9);
        }
    }

    #[test]
    fn scales_without_values_or_extent_are_still_scales() {
        for scale in [
            Scale::around([], 1.0, (0.0, 10.0)),
            Scale::around([0.0, f64::NAN, -1.0], 1.0, (0.0, 10.0)),
            Scale::around([5.0], 0.0, (0.0, 10.0)),
            Scale::from_zero(f64::NAN, (0.0, 10.0), round_step),
            Scale::new(Kind::FromZero(5.0), (0.0, 0.0), (0.0, 10.0)),
        ] {
            assert!(scale.at(5.0).is_finite() && !scale.ticks(round_step).is_empty(), "{scale:?}");
        }
    }

    #[test]
    fn labels_that_collide_move_apart_and_stay_within() {
        let found = spread(&[50.0, 51.0, 10.0, 99.0, 100.0], 12.0, (0.0, 100.0));
        let mut sorted = found.clone();
        sorted.sort_by(f64::total_cmp);
        assert!(sorted.windows(2).all(|pair| pair[1] - pair[0] >= 12.0 - 1e-9), "{found:?}");
        assert!(found.iter().all(|place| (0.0..=100.0).contains(place)) && (found[2] - 10.0).abs() < 1e-9);
        assert!(found[0] < found[1] && found[3] < found[4]);
        assert_eq!(spread(&[], 12.0, (0.0, 100.0)).len(), 0);
        assert_eq!(spread(&[1.0; 30], 12.0, (0.0, 100.0)).len(), 30);
    }
}
