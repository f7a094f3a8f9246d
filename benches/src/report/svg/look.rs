//! How a mover looks, the same in every picture: a colour, a shape and a kind of line, so that no colour is needed to tell
//! two apart. Colours stand in the style sheet, after Okabe and Ito, "Color Universal Design" (2008).

use crate::study::{Engine, Study};

use super::super::markup::{Element, number};

/// The shapes, and the dashes of lines with them.
const SHAPES: [(Shape, &str); 6] = [
    (Shape::Square, ""),
    (Shape::Triangle, "6 3"),
    (Shape::Diamond, "2 2"),
    (Shape::Pointing, "8 2 2 2"),
    (Shape::Pentagon, "4 4"),
    (Shape::Bar, "1 3"),
];

/// How many colours the style sheet has for QEMU's settings.
const COLOURS: usize = 6;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Shape {
    Circle,
    Square,
    Triangle,
    Diamond,
    Pointing,
    Pentagon,
    Bar,
}

/// A mover's look.
#[derive(Clone, Debug)]
pub(crate) struct Look {
    /// A class of the style sheet.
    pub(crate) class: String,
    shape: Shape,
    dash: &'static str,
    pub(crate) is_ours: bool,
}

impl Look {
    pub(crate) fn of(study: &Study, mover: &str) -> Self {
        let engine = |engine| study.movers.iter().filter(move |found| found.engine == engine);
        let index = |of| engine(of).position(|found| found.name == mover);
        if let Some(index) = index(Engine::Pageferry) {
            let (shape, dash) = if index == 0 { (Shape::Circle, "") } else { SHAPES[(index + 2) % SHAPES.len()] };
            return Self { class: format!("o{}", index % 3), shape, dash, is_ours: true };
        }
        let index = index(Engine::Qemu).unwrap_or(0);
        let (shape, dash) = SHAPES[index % SHAPES.len()];
        Self { class: format!("q{}", index % COLOURS), shape, dash, is_ours: false }
    }

    /// A mark at a place; hollow for what did not end as it should.
    pub(crate) fn mark(&self, (x, y): (f64, f64), is_sound: bool) -> Element {
        let size = if self.is_ours { 5.0 } else { 4.0 };
        let corners: &[(f64, f64)] = match self.shape {
            Shape::Circle => {
                return self.filled(Element::new("circle").at("cx", x).at("cy", y).at("r", size), is_sound);
            }
            Shape::Square => &[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
            Shape::Triangle => &[(0.0, -1.1), (1.1, 0.9), (-1.1, 0.9)],
            Shape::Diamond => &[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
            Shape::Pointing => &[(0.0, 1.1), (1.1, -0.9), (-1.1, -0.9)],
            Shape::Pentagon => &[(0.0, -1.2), (1.15, -0.35), (0.7, 1.0), (-0.7, 1.0), (-1.15, -0.35)],
            Shape::Bar => &[(-1.2, -0.6), (1.2, -0.6), (1.2, 0.6), (-1.2, 0.6)],
        };
        let places =
            corners.iter().map(|(right, down)| format!("{},{} ", number(x + right * size), number(y + down * size)));
        self.filled(Element::new("polygon").with("points", places.collect::<String>().trim_end()), is_sound)
    }

    fn filled(&self, element: Element, is_sound: bool) -> Element {
        element.class(format_args!("mark {}{}", self.class, if is_sound { "" } else { " hollow" }))
    }

    /// Draws a path as this mover's.
    pub(crate) fn drawn(&self, path: Element) -> Element {
        let path = path.with("stroke-width", if self.is_ours { "2.6" } else { "1.4" });
        if self.dash.is_empty() { path } else { path.with("stroke-dasharray", self.dash) }
    }

    /// The class of lines and words.
    pub(crate) fn group(&self) -> Element {
        Element::new("g").class(&self.class)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::example;
    use super::*;

    #[test]
    fn movers_differ_in_more_than_colour() {
        let study = example::full();
        let marks: Vec<String> =
            study.movers.iter().map(|mover| format!("{:?}", Look::of(&study, &mover.name).shape)).collect();
        let mut unique = marks.clone();
        unique.sort();
        unique.dedup();
        assert_eq!(unique.len(), marks.len(), "{marks:?}");
    }

    #[test]
    fn what_did_not_end_well_is_hollow() {
        let study = example::full();
        for mover in &study.movers {
            let look = Look::of(&study, &mover.name);
            assert!(look.mark((1.0, 2.0), false).to_string().contains(" hollow"));
            assert!(!look.mark((1.0, 2.0), true).to_string().contains(" hollow"));
        }
    }
}
