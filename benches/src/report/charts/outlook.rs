//! The model's time by the rate of the link, up to links that were not measured, with what was.

use crate::study::model::Expected;
use crate::study::{Engine, Guest, Study, Writes};

use super::super::group::{Group, Quantity};
use super::super::markup::Element;
use super::super::outlook::{RATES, cpu_costs, expected};
use super::super::svg::frame::{Axis, Frame};
use super::super::svg::look::Look;
use super::super::svg::scale::{Kind, Scale, round_step, spread};
use super::super::svg::{LETTERS, hint, label, line, path};
use super::super::words;
use super::axis_seconds;

const STEPS: u32 = 160;
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 380.0;

/// The picture; nothing for a study without guests.
pub(crate) fn outlook(study: &Study) -> Option<Element> {
    let guests = modelled(study);
    let frame = Frame { width: WIDTH, height: HEIGHT, left: 60.0, right: WIDTH - 230.0, top: 42.0, bottom: HEIGHT - 42.0 };
    let slowest = study.links.iter().filter_map(|link| link.bits_per_second).min().map_or(RATES[0], |bits| bits as f64);
    let x = Scale::new(Kind::Logarithmic, (slowest.min(RATES[0]) * 0.8, RATES[3] * 1.25), frame.across());
    let curves: Vec<(&Guest, Vec<(f64, f64)>)> = guests.iter().map(|guest| (*guest, curve(guest, x))).collect();
    let ours: Vec<Group<'_>> = study.movers.iter().find(|mover| mover.engine == Engine::Pageferry).map(|mover| {
        let links = study.links.iter().filter(|link| link.bits_per_second.is_some());
        links.flat_map(|link| study.guests.iter().filter_map(move |guest| Group::of(study, link, guest, mover))).collect()
    })?;
    let values = curves.iter().flat_map(|(_, points)| points.iter().map(|(_, seconds)| *seconds));
    let measured = ours.iter().map(|group| group.sample(Quantity::Time).median());
    let y = Scale::around(values.chain(measured).filter(|seconds| *seconds < 1e5), 1.0, frame.upwards());
    let across = Axis { scale: x, title: "rate of the link", step: round_step, words: words::bits };
    let upwards = Axis { scale: y, title: "total time", step: round_step, words: axis_seconds };
    let title = "Lines: the model, whole pages. Circles: ours, measured. Dashed: what one core allows";
    let drawn = frame.draw(title, &across, &upwards);
    let (lines, floors) = (names(&frame, x, y, &curves), floors(study, &frame, y));
    Some(drawn.push(floors).push(lines).extend(ours.iter().map(|group| point(study, group, x, y))))
}

/// One of each size and way of writing: the model makes no difference between a few bytes and whole pages.
fn modelled(study: &Study) -> Vec<&Guest> {
    let mut found: Vec<&Guest> = Vec::new();
    let alike = |a: &Guest, b: &Guest| {
        (a.bytes, a.dirty_bytes_per_second, a.working_set) == (b.bytes, b.dirty_bytes_per_second, b.working_set)
    };
    for guest in study.guests.iter().filter(|guest| guest.writes != Writes::FewBytes) {
        if found.iter().all(|other| !alike(other, guest)) {
            found.push(guest);
        }
    }
    found
}

/// Rates and times, as far as there is an end.
fn curve(guest: &Guest, x: Scale) -> Vec<(f64, f64)> {
    let rates = (0..=STEPS).map(|step| x.along(f64::from(step) / f64::from(STEPS)));
    let ends = rates.filter_map(|rate| match expected(guest, rate) {
        Expected::Ends { seconds, .. } => Some((rate, seconds)),
        Expected::Never { .. } => None,
    });
    ends.collect()
}

/// The lines, with the names of their guests where they begin to have an end.
fn names(frame: &Frame, x: Scale, y: Scale, curves: &[(&Guest, Vec<(f64, f64)>)]) -> Element {
    let lasts: Vec<f64> =
        curves.iter().map(|(_, points)| points.last().map_or(frame.bottom, |(_, seconds)| y.at(*seconds))).collect();
    let places = spread(&lasts, LETTERS + 4.0, (frame.top, frame.bottom + 12.0));
    let drawn = curves.iter().zip(lasts.iter().zip(places)).map(|((guest, points), (last, at))| {
        let shown = path(points.iter().map(|(rate, seconds)| (x.at(*rate), y.at(*seconds)))).class("line model");
        let begins = points.first().filter(|(rate, _)| *rate > x.bounds().0 * 1.01);
        let words = match begins {
            None => guest.name.clone(),
            Some((rate, _)) => format!("{}, from {} on", guest.name, words::bits(*rate)),
        };
        let from = frame.right + 4.0;
        let cliff = begins.map(|(rate, seconds)| {
            let place = (x.at(*rate), y.at(*seconds));
            Element::new("circle").class("cliff").at("cx", place.0).at("cy", place.1).at("r", 3.0).push(hint(format!(
                "{}: on slower links the model has no end",
                guest.name
            )))
        });
        Element::new("g")
            .push(shown)
            .extend(cliff)
            .push(line((frame.right - 2.0, *last), (from + 8.0, at)).class("leader"))
            .push(label(from + 11.0, at + 4.0, "start", &super::words::cut(&words, 34)).class("name"))
    });
    Element::new("g").extend(drawn)
}

/// What the CPU time of the dearer side takes on one core, however fast the link is: of ours and of the cheapest QEMU.
fn floors(study: &Study, frame: &Frame, y: Scale) -> Element {
    let costs = cpu_costs(study);
    let cheapest = |engine| {
        let of = costs.iter().filter(move |cost| cost.group.mover.engine == engine);
        of.min_by(|a, b| a.dearer().total_cmp(&b.dearer()))
    };
    let drawn = [Engine::Pageferry, Engine::Qemu].into_iter().filter_map(cheapest).map(|cost| {
        let seconds = cost.dearer() * cost.group.guest.bytes as f64 / (1_u64 << 30) as f64;
        let (at, look) = (y.at(seconds), Look::of(study, &cost.group.mover.name));
        let words = format!("{}: {} of CPU time", words::short(&cost.group.mover.name), words::seconds(seconds));
        look.group()
            .push(line((frame.left, at), (frame.right, at)).class("floor"))
            .push(label(frame.left + 6.0, at - 4.0, "start", &words).class("name"))
    });
    Element::new("g").extend(drawn)
}

fn point(study: &Study, group: &Group<'_>, x: Scale, y: Scale) -> Element {
    let seconds = group.sample(Quantity::Time).median();
    let look = Look::of(study, &group.mover.name);
    let place = (x.at(group.link.bits_per_second.unwrap_or(0) as f64), y.at(seconds));
    let words = format!("{} over {}: {}", group.guest.name, words::link(group.link), group.time_in_words());
    look.group().push(look.mark(place, group.standing.trouble().is_none())).push(hint(words))
}
