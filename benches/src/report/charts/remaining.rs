//! What was still to be sent, over time: one picture for each guest and link.

use crate::study::{End, Guest, Link, Remaining, Run, Study};

use super::super::group::{Group, cell, is_verified};
use super::super::markup::Element;
use super::super::svg::frame::{Axis, Frame};
use super::super::svg::look::Look;
use super::super::svg::scale::{Kind, Scale, binary_step, round_step};
use super::super::svg::{LETTERS, hint, label, line, path, width_of};
use super::super::words;
use super::{axis_bytes, axis_seconds, width};

const PLOT: f64 = 170.0;
const TOP: f64 = 42.0;
/// Height of a line below the plot that says when a mover was done.
const ROW: f64 = 19.0;
/// Points that are nearer to each other are one.
const APART: f64 = 0.8;
/// An axis is not longer than so many times what the slowest took that finished.
const BEYOND: f64 = 1.5;
/// Rounds are marked one by one up to so many.
const MOST_ROUNDS_MARKED: u64 = 40;

/// The picture of a cell; nothing if nothing was measured there.
pub(crate) fn remaining(study: &Study, link: &Link, guest: &Guest) -> Option<Element> {
    let groups = cell(study, link, guest);
    let typical: Vec<(&Group<'_>, &Run)> = groups.iter().filter_map(|group| Some((group, group.typical()?))).collect();
    if typical.is_empty() {
        return None;
    }
    let latest = latest(typical.iter().map(|(_, run)| *run));
    let most = typical.iter().flat_map(|(_, run)| run.remaining.iter()).map(|left| left.bytes).max();
    let most = most.unwrap_or(0).max(guest.bytes) as f64;
    let (width, rows) = (width(study), TOP + PLOT + 8.0);
    let bottom = rows + ROW * typical.len() as f64 + 4.0;
    let frame = Frame { width, height: bottom + 38.0, left: 66.0, right: width - 24.0, top: TOP, bottom };
    let x = Scale::from_zero(latest, frame.across(), round_step);
    let y = Scale::new(Kind::Linear, (0.0, most * 1.02), (TOP + PLOT, TOP));
    let across = Axis { scale: x, title: "since the order to migrate", step: round_step, words: axis_seconds };
    let upwards = Axis { scale: y, title: "memory still to be sent", step: binary_step, words: axis_bytes };
    let mut drawn = frame.draw(&format!("{} over {}", guest.name, words::link(link)), &across, &upwards);
    // Ours last: on top.
    let order = typical.iter().enumerate().rev();
    for (row, (group, run)) in order {
        let look = Look::of(study, &group.mover.name);
        drawn = drawn.push(curve(&look, run, x, y));
        drawn = drawn.push(ending(&look, group, run, x, rows + ROW * (row as f64 + 0.5)));
    }
    Some(drawn)
}

/// Where the axis ends: what was given up long after all others had finished goes on beyond it.
fn latest<'a>(runs: impl Iterator<Item = &'a Run> + Clone) -> f64 {
    let all = runs.clone().map(|run| run.seconds).fold(f64::NAN, f64::max);
    let finished = runs.filter(|run| run.end == End::Completed).map(|run| run.seconds).fold(f64::NAN, f64::max);
    if finished * BEYOND < all { finished * BEYOND } else { all }
}

fn curve(look: &Look, run: &Run, x: Scale, y: Scale) -> Element {
    let (mut points, until) = (Vec::new(), x.bounds().1);
    let mut before: Option<&Remaining> = None;
    for (index, left) in run.remaining.iter().enumerate() {
        if left.seconds > until {
            let bytes = before.map(|before| between(before, left, until));
            points.extend(bytes.map(|bytes| (x.at(until), y.at(bytes))));
            break;
        }
        let place = (x.at(left.seconds), y.at(left.bytes as f64));
        let far = points.last().is_none_or(|last: &(f64, f64)| (place.0 - last.0).hypot(place.1 - last.1) >= APART);
        if far || index + 1 == run.remaining.len() {
            points.push(place);
        }
        before = Some(left);
    }
    let is_marked = look.is_ours && run.rounds <= MOST_ROUNDS_MARKED;
    let starts = run.remaining.windows(2).filter(|pair| pair[0].round != pair[1].round && pair[1].bytes > 0);
    let marks = starts.filter(|pair| is_marked && pair[1].seconds <= until).map(|pair| {
        let place = (x.at(pair[1].seconds), y.at(pair[1].bytes as f64));
        let words = format!("pass {}: {} left", pair[1].round, words::bytes(pair[1].bytes as f64));
        Element::new("circle").class("pass").at("cx", place.0).at("cy", place.1).at("r", 2.4).push(hint(words))
    });
    look.group().push(look.drawn(path(points))).extend(marks.collect::<Vec<_>>())
}

/// What was left at a time between these two.
fn between(before: &Remaining, after: &Remaining, seconds: f64) -> f64 {
    let share = (seconds - before.seconds) / (after.seconds - before.seconds);
    before.bytes as f64 + (after.bytes as f64 - before.bytes as f64) * share
}

/// A line below the plot, as long as it took, with the name at its end.
fn ending(look: &Look, group: &Group<'_>, run: &Run, x: Scale, at: f64) -> Element {
    let (start, right) = x.places();
    let (end, is_beyond) = (x.at(run.seconds), run.seconds > x.bounds().1);
    let arrow = if is_beyond { " →" } else { "" };
    let says = format!("{} {}{arrow}", words::short(&group.mover.name), says(run));
    let wide = width_of(&says, LETTERS);
    let fits = end + 10.0 + wide < right + 18.0;
    let (place, anchor, until) = if fits { (end + 9.0, "start", end) } else { (end - 9.0, "end", end - 12.0 - wide) };
    let sound = run.end == End::Completed && is_verified(run);
    look.group()
        .push(line((start, at), (until.max(start), at)).class("thin"))
        .push(look.mark((end, at), sound))
        .push(label(place, at + 4.0, anchor, &says).class("name"))
        .push(hint(format!("{}: {}, {}", group.mover.name, words::end(run), words::proof(run))))
}

fn says(run: &Run) -> String {
    let time = words::seconds(run.seconds);
    match run.end {
        End::Completed if is_verified(run) => time,
        End::Completed => format!("{time}, not verified"),
        End::GivenUp => format!("given up after {time}"),
        End::Failed(_) => format!("failed after {time}"),
    }
}
