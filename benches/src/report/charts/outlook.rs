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
const HEIGHT: f64 = 470.0;
/// Room above the lines for the name of each.
const ROW: f64 = 14.0;

/// The picture; nothing for a study without guests.
pub(crate) fn outlook(study: &Study) -> Option<Element> {
    let guests = modelled(study);
    let frame =
        Frame { width: WIDTH, height: HEIGHT, left: 60.0, right: WIDTH - 20.0, top: 42.0, bottom: HEIGHT - 42.0 };
    let slowest = study.links.iter().filter_map(|link| link.bits_per_second).min().map_or(RATES[0], |bits| bits as f64);
    let x = Scale::new(Kind::Logarithmic, (slowest.min(RATES[0]) * 0.35, RATES[3] * 1.25), frame.across());
    let curves: Vec<(&Guest, Vec<(f64, f64)>)> = guests.iter().map(|guest| (*guest, curve(guest, x))).collect();
    let ours: Vec<Group<'_>> = study.movers.iter().find(|mover| mover.engine == Engine::Pageferry).map(|mover| {
        let links = study.links.iter().filter(|link| link.bits_per_second.is_some());
        links
            .flat_map(|link| study.guests.iter().filter_map(move |guest| Group::of(study, link, guest, mover)))
            .collect()
    })?;
    let values = curves.iter().flat_map(|(_, points)| points.iter().map(|(_, seconds)| *seconds));
    let measured = ours.iter().map(|group| group.sample(Quantity::Time).median());
    let y = Scale::around(
        values.chain(measured).filter(|seconds| *seconds < 1e5),
        1.0,
        (frame.bottom, frame.top + ROW * curves.len() as f64),
    );
    let across = Axis { scale: x, title: "rate of the link", step: round_step, words: words::bits };
    let upwards = Axis { scale: y, title: "total time", step: round_step, words: axis_seconds };
    let dashed = if cpu_costs(study).is_empty() { "" } else { ". Dashed: what one core allows" };
    let title = format!("Lines: the model, whole pages. Circles: ours, measured{dashed}");
    let drawn = frame.draw(&title, &across, &upwards);
    let (lines, floors) = (names(&frame, x, y, &curves), floors(study, &frame, y));
    let measured = study.links.iter().map(|link| {
        let here: Vec<&Group<'_>> = ours.iter().filter(|group| group.link.name == link.name).collect();
        points(study, &here, &frame, x, y)
    });
    Some(drawn.push(floors).push(lines).extend(measured))
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

/// The lines, with the names of their guests where they begin: below that rate there is no end.
fn names(frame: &Frame, x: Scale, y: Scale, curves: &[(&Guest, Vec<(f64, f64)>)]) -> Element {
    // The further right a line begins, the lower its name: no leader crosses the name of another.
    let starts: Vec<f64> = curves.iter().filter_map(|(_, points)| Some(points.first()?.0)).collect();
    let drawn = curves.iter().filter_map(|(guest, points)| {
        let shown = path(points.iter().map(|(rate, seconds)| (x.at(*rate), y.at(*seconds)))).class("line model");
        let (rate, seconds) = *points.first()?;
        let place = (x.at(rate), y.at(seconds));
        if rate <= x.bounds().0 * 1.01 {
            let words = label(place.0 + 10.0, place.1, "start", &guest.name).class("name");
            return Some(Element::new("g").push(shown).push(words));
        }
        let words = format!("{}: no end below {}", guest.name, words::bits(rate));
        let at = frame.top + ROW * (starts.iter().filter(|start| **start < rate).count() as f64 + 0.7);
        let mark = Element::new("circle").class("cliff").at("cx", place.0).at("cy", place.1).at("r", 3.0);
        let leader = line((place.0, place.1 - 3.0), (place.0, at - 8.0)).class("leader");
        let words = label(place.0 + 4.0, at, "start", &words).class("name");
        Some(Element::new("g").push(shown).push(leader).push(mark).push(words))
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
    let floors: Vec<_> = [Engine::Pageferry, Engine::Qemu]
        .into_iter()
        .filter_map(cheapest)
        .map(|cost| {
            let seconds = cost.dearer() * cost.group.guest.bytes as f64 / (1_u64 << 30) as f64;
            (cost, seconds, y.at(seconds))
        })
        .collect();
    let highest = floors.iter().map(|(_, _, at)| *at).fold(f64::NAN, f64::min);
    let drawn = floors.iter().enumerate().map(|(index, (cost, seconds, at))| {
        let is_above = *at <= highest && floors.iter().skip(index + 1).all(|(_, _, other)| other > at);
        let place = if is_above { at - 5.0 } else { at + 13.0 };
        let look = Look::of(study, &cost.group.mover.name);
        let words = format!(
            "{}: {} of CPU time",
            words::cut(words::short(&cost.group.mover.name), 22),
            words::seconds(*seconds)
        );
        look.group()
            .push(line((frame.left, *at), (frame.right, *at)).class("floor"))
            .push(label(frame.right - 4.0, place, "end", &words).class("name"))
    });
    Element::new("g").extend(drawn)
}

/// What was measured over a link, with the names of the guests beside it.
fn points(study: &Study, groups: &[&Group<'_>], frame: &Frame, x: Scale, y: Scale) -> Element {
    let places: Vec<(f64, f64)> = groups
        .iter()
        .map(|group| {
            let bits = group.link.bits_per_second.unwrap_or(0) as f64;
            (x.at(bits), y.at(group.sample(Quantity::Time).median()))
        })
        .collect();
    let wanted: Vec<f64> = places.iter().map(|(_, y)| *y).collect();
    let names = spread(&wanted, LETTERS + 2.0, (frame.top, frame.bottom - 4.0));
    let drawn = groups.iter().zip(places.iter().zip(names)).map(|(group, (place, at))| {
        let look = Look::of(study, &group.mover.name);
        let says = format!("{} over {}: {}", group.guest.name, words::link(group.link), group.time_in_words());
        look.group()
            .push(line((place.0 - 5.0, place.1), (place.0 - 13.0, at)).class("leader"))
            .push(look.mark(*place, group.standing.trouble().is_none()))
            .push(label(place.0 - 15.0, at + 4.0, "end", &words::cut(&group.guest.name, 14)).class("name"))
            .push(hint(says))
    });
    Element::new("g").extend(drawn)
}
