//! Pictures as SVG, by hand: scales, axes, marks and labels that do not collide.

pub(crate) mod frame;
pub(crate) mod look;
pub(crate) mod scale;

use super::markup::{Element, number};

/// The size of letters of labels.
pub(crate) const LETTERS: f64 = 11.0;

/// A picture that scales with the page.
pub(crate) fn picture(width: f64, height: f64, says: &str) -> Element {
    Element::new("svg")
        .with("xmlns", "http://www.w3.org/2000/svg")
        .with("viewBox", format_args!("0 0 {} {}", number(width), number(height)))
        .with("role", "img")
        .with("aria-label", says)
}

/// Words that start at a place; `anchor` is `start`, `middle` or `end`.
pub(crate) fn label(x: f64, y: f64, anchor: &'static str, words: &str) -> Element {
    Element::new("text").at("x", x).at("y", y).with("text-anchor", anchor).text(words)
}

pub(crate) fn line(from: (f64, f64), to: (f64, f64)) -> Element {
    Element::new("line").at("x1", from.0).at("y1", from.1).at("x2", to.0).at("y2", to.1)
}

pub(crate) fn rectangle(x: f64, y: f64, width: f64, height: f64) -> Element {
    Element::new("rect").at("x", x).at("y", y).at("width", width.max(0.0)).at("height", height.max(0.0))
}

/// A line through all points.
pub(crate) fn path(points: impl IntoIterator<Item = (f64, f64)>) -> Element {
    let steps = points
        .into_iter()
        .enumerate()
        .map(|(index, (x, y))| format!("{}{} {}", if index == 0 { "M" } else { "L" }, number(x), number(y)));
    Element::new("path").class("line").with("d", steps.collect::<String>())
}

/// What a pointer that rests on it is told.
pub(crate) fn hint(words: impl Into<String>) -> Element {
    Element::new("title").text(words)
}

/// About how wide words are.
pub(crate) fn width_of(words: &str, letters: f64) -> f64 {
    words.chars().count() as f64 * letters * 0.62
}
