//! Bars that lie side by side, in groups with a heading; each carries its name on the left and its number on the right.

use super::super::markup::Element;
use super::super::svg::look::Look;
use super::super::svg::scale::{Scale, round_step};
use super::super::svg::{LETTERS, hint, label, line, picture, rectangle, width_of};

const HEADING: f64 = 24.0;
const BAR: f64 = 17.0;
const TOP: f64 = 26.0;
/// How much longer than the longest sound bar another may be.
const BEYOND: f64 = 1.3;

/// One bar, made of parts from the left.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) name: String,
    pub(super) look: Look,
    pub(super) parts: Vec<Part>,
    /// The number, in words.
    pub(super) says: String,
    /// Whether all runs came to their end and were verified.
    pub(super) sound: bool,
}

/// A part of a bar: a class of the style sheet, its value, and its name.
#[derive(Clone, Debug)]
pub(super) struct Part {
    pub(super) class: String,
    pub(super) value: f64,
    pub(super) name: String,
    pub(super) words: String,
    /// Whether its name is written into it, if there is room.
    pub(super) is_named: bool,
}

/// How the picture is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) width: f64,
    pub(super) left: f64,
    /// Room for the number behind the longest bar.
    pub(super) right: f64,
    pub(super) step: fn(f64) -> f64,
    pub(super) words: fn(f64) -> String,
}

impl Default for Layout {
    fn default() -> Self {
        Self { width: 560.0, left: 124.0, right: 124.0, step: round_step, words: super::axis_seconds }
    }
}

/// The picture: for each group a heading and its bars.
pub(super) fn draw(layout: Layout, title: &str, what: &str, groups: &[(String, Vec<Bar>)]) -> Element {
    let count: usize = groups.iter().map(|(_, bars)| bars.len()).sum();
    let bottom = TOP + HEADING * groups.len() as f64 + BAR * count as f64 + 6.0;
    let x = Scale::from_zero(longest(groups), (layout.left, layout.width - layout.right), layout.step);
    let mut drawn = picture(layout.width, bottom + 38.0, title)
        .push(label(4.0, 16.0, "start", title).class("title"))
        .push(axis(layout, x, bottom, what));
    let mut at = TOP;
    for (heading, bars) in groups {
        drawn = drawn.push(label(4.0, at + 16.0, "start", heading).class("heading"));
        at += HEADING;
        for bar in bars {
            drawn = drawn.push(bar.draw(layout, x, at));
            at += BAR;
        }
    }
    drawn
}

/// The longest bar that is drawn as it is: one of a run that did not end well is broken off beyond the others.
fn longest(groups: &[(String, Vec<Bar>)]) -> f64 {
    let bars = || groups.iter().flat_map(|(_, bars)| bars);
    let all = bars().map(Bar::length).fold(f64::NAN, f64::max);
    let sound = bars().filter(|bar| bar.sound).map(Bar::length).fold(f64::NAN, f64::max);
    if sound * BEYOND < all { sound * BEYOND } else { all }
}

fn axis(layout: Layout, x: Scale, bottom: f64, what: &str) -> Element {
    let ticks = x.ticks(layout.step).into_iter().flat_map(|tick| {
        let at = x.at(tick);
        [line((at, TOP), (at, bottom)).class("grid"), label(at, bottom + 14.0, "middle", &(layout.words)(tick))]
    });
    Element::new("g").class("axis").extend(ticks).push(label(layout.left, bottom + 30.0, "start", what).class("what"))
}

impl Bar {
    fn length(&self) -> f64 {
        self.parts.iter().map(|part| part.value).filter(|value| value.is_finite()).sum()
    }

    fn draw(&self, layout: Layout, x: Scale, at: f64) -> Element {
        let (name, middle) = (super::words::cut(&self.name, 15), at + BAR / 2.0);
        let hollow = if self.sound { "" } else { " hollow" };
        let mut drawn = self
            .look
            .group()
            .push(self.look.mark((layout.left - 8.0, middle), self.sound))
            .push(label(layout.left - 17.0, middle + 4.0, "end", &name).class("name"));
        let mut from = 0.0;
        for part in self.parts.iter().filter(|part| part.value.is_finite() && part.value > 0.0) {
            let (start, end) = (x.at(from), x.at(from + part.value));
            if start >= x.places().1 {
                from += part.value;
                continue;
            }
            let class = format!("part {}{hollow}", part.class);
            let shape = rectangle(start, at + 2.0, (end - start).max(0.6), BAR - 4.0).class(class);
            drawn = drawn.push(shape.push(hint(format!("{}: {}", part.name, part.words))));
            if part.is_named && width_of(&part.name, LETTERS - 1.5) + 4.0 < end - start {
                let class = format!("in {}{hollow}", part.class);
                drawn = drawn.push(label(f64::midpoint(start, end), middle + 3.5, "middle", &part.name).class(class));
            }
            from += part.value;
        }
        if from > x.bounds().1 {
            let (at, end) = (at + 1.0, x.places().1);
            let broken =
                [10.0, 5.0].map(|back| line((end - back, at + BAR - 2.0), (end - back + 6.0, at)).class("broken"));
            drawn = drawn.extend(broken);
        }
        drawn.push(label(x.at(from) + 5.0, middle + 4.0, "start", &self.says).class("number"))
    }
}
