//! The ground that a picture is drawn on: axes with round numbers, a title, and room for labels.

use super::super::markup::Element;
use super::scale::Scale;
use super::{LETTERS, label, line, picture, width_of};

/// The size of a picture, and the rectangle in it that holds the marks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) width: f64,
    pub(crate) height: f64,
    pub(crate) left: f64,
    pub(crate) right: f64,
    pub(crate) top: f64,
    pub(crate) bottom: f64,
}

/// An axis: a scale, what it shows, and how its numbers are written.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Axis<'a> {
    pub(crate) scale: Scale,
    pub(crate) title: &'a str,
    pub(crate) step: fn(f64) -> f64,
    pub(crate) words: fn(f64) -> String,
}

impl Frame {
    pub(crate) fn across(&self) -> (f64, f64) {
        (self.left, self.right)
    }

    /// Upwards, as numbers grow.
    pub(crate) fn upwards(&self) -> (f64, f64) {
        (self.bottom, self.top)
    }

    /// The picture with its title, the grid and both axes.
    pub(crate) fn draw(&self, title: &str, x: &Axis<'_>, y: &Axis<'_>) -> Element {
        let grid = Element::new("g").class("axis").extend(self.upright(y)).extend(self.level(x));
        let ends = line((self.left, self.bottom), (self.right, self.bottom)).class("base");
        picture(self.width, self.height, title)
            .push(label(self.left, 16.0, "start", title).class("title"))
            .push(grid.push(ends))
    }

    fn upright(&self, axis: &Axis<'_>) -> Vec<Element> {
        let ticks = axis.scale.ticks(axis.step);
        let mut drawn: Vec<Element> = ticks
            .iter()
            .map(|tick| {
                let at = axis.scale.at(*tick);
                line((self.left, at), (self.right, at)).class("grid")
            })
            .collect();
        drawn.extend(
            ticks.iter().map(|tick| label(self.left - 6.0, axis.scale.at(*tick) + 4.0, "end", &(axis.words)(*tick))),
        );
        drawn.push(label(self.left, self.top - 8.0, "start", axis.title).class("what"));
        drawn
    }

    fn level(&self, axis: &Axis<'_>) -> Vec<Element> {
        let mut drawn = Vec::new();
        let mut free = f64::MIN;
        for tick in axis.scale.ticks(axis.step) {
            let (at, words) = (axis.scale.at(tick), (axis.words)(tick));
            drawn.push(line((at, self.bottom), (at, self.bottom + 4.0)).class("tick"));
            // A number that would touch the one before it is left out: its mark stays.
            let half = width_of(&words, LETTERS) / 2.0;
            if at - half >= free {
                drawn.push(label(at, self.bottom + 16.0, "middle", &words));
                free = at + half + 6.0;
            }
        }
        drawn.push(label(self.right, self.bottom + 31.0, "end", axis.title).class("what"));
        drawn
    }
}
