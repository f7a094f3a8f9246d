//! Total time and downtime by how fast the guest writes, with the model's line and the region in which it has no end.

use crate::study::model::{DOWNTIME_SECONDS, Expected, expect};
use crate::study::{Guest, Link, Study, Writes};

use super::super::group::{Group, Quantity, cell};
use super::super::markup::Element;
use super::super::svg::frame::{Axis, Frame};
use super::super::svg::look::Look;
use super::super::svg::scale::{Kind, Scale, round_step, spread};
use super::super::svg::{LETTERS, hint, label, line, path, rectangle, width_of};
use super::super::words;
use super::{axis_rate, axis_seconds, width};

const MIB: f64 = (1 << 20) as f64;
/// Up to about this many MiB/s the axis is as good as linear, so that an idle guest has a place.
const KNEE: f64 = 5.0;
const HEIGHT: f64 = 320.0;
/// Room for names at the right.
const NAMES: f64 = 128.0;
const LETTERS_OF_NAMES: usize = 16;
const STEPS: u32 = 240;

/// The kinds of writes that were measured, other than none.
pub(crate) fn kinds(study: &Study) -> Vec<Writes> {
    let measured = |kind: &Writes| study.guests.iter().any(|guest| guest.writes == *kind);
    [Writes::FewBytes, Writes::WholePages].into_iter().filter(measured).collect()
}

/// One picture; nothing if nothing was measured there.
pub(crate) fn by_dirty_rate(study: &Study, link: &Link, writes: Writes, quantity: Quantity) -> Option<Element> {
    let picture = Picture::new(study, link, writes, quantity)?;
    Some(picture.draw())
}

/// A mover's points, from idle to the fastest writer.
struct Track<'a> {
    look: Look,
    groups: Vec<Group<'a>>,
}

struct Picture<'a> {
    link: &'a Link,
    writes: Writes,
    quantity: Quantity,
    /// Whom the lines join: guests that differ in nothing but how they write.
    joined: Vec<&'a Guest>,
    tracks: Vec<Track<'a>>,
    /// What has no value because no run came to its end.
    lost: Vec<(Look, Group<'a>)>,
    frame: Frame,
    x: Scale,
    y: Scale,
}

impl<'a> Picture<'a> {
    fn new(study: &'a Study, link: &'a Link, writes: Writes, quantity: Quantity) -> Option<Self> {
        let mut guests: Vec<&Guest> =
            study.guests.iter().filter(|guest| guest.writes == writes || guest.writes == Writes::Idle).collect();
        guests.sort_by_key(|guest| guest.dirty_bytes_per_second);
        let writers: Vec<&Guest> = guests.iter().copied().filter(|guest| guest.writes == writes).collect();
        let model = *writers.first()?;
        let same = |guest: &&Guest| guest.content == model.content && guest.bytes == model.bytes;
        let joined: Vec<&Guest> = guests.iter().copied().filter(same).collect();
        let groups: Vec<Group<'a>> = guests.iter().flat_map(|guest| cell(study, link, guest)).collect();
        let tracks: Vec<Track<'_>> = study
            .movers
            .iter()
            .rev()
            .filter_map(|mover| {
                let groups: Vec<Group<'_>> = groups
                    .iter()
                    .filter(|group| group.mover.name == mover.name && !group.sample(quantity).is_empty())
                    .cloned()
                    .collect();
                (!groups.is_empty()).then(|| Track { look: Look::of(study, &mover.name), groups })
            })
            .collect();
        if tracks.iter().all(|track| track.groups.iter().all(|group| group.guest.writes == Writes::Idle)) {
            return None;
        }
        let lost = groups.iter().filter(|group| group.sample(quantity).is_empty());
        let lost = lost.map(|group| (Look::of(study, &group.mover.name), group.clone())).collect();
        let width = width(study);
        let frame = Frame { width, height: HEIGHT, left: 56.0, right: width - NAMES, top: 42.0, bottom: HEIGHT - 42.0 };
        let fastest = writers.iter().map(|guest| guest.dirty_bytes_per_second).max()? as f64 / MIB;
        let x = Scale::new(Kind::FromZero(KNEE), (0.0, fastest * 1.25), frame.across());
        let measured = groups.iter().flat_map(|group| {
            let sample = group.sample(quantity);
            [sample.least(), sample.most()]
        });
        let modelled = guests.iter().filter(|_| quantity != Quantity::Stall);
        let modelled = modelled.filter_map(|guest| value(guest, link, quantity).0);
        let y = Scale::around(measured.chain(modelled.filter(|value| *value > 1e-3)), 1.0, frame.upwards());
        Some(Self { link, writes, quantity, joined, tracks, lost, frame, x, y })
    }

    fn draw(&self) -> Element {
        let kind = if self.writes == Writes::FewBytes { "a few bytes of each page" } else { "whole pages" };
        let title = format!("{kind}, over {}", words::link(self.link));
        let what = format!("{}, median and range", self.quantity.title());
        let across =
            Axis { scale: self.x, title: "MiB of pages written per second", step: round_step, words: axis_rate };
        let upwards = Axis { scale: self.y, title: &what, step: round_step, words: axis_seconds };
        let drawn = self.frame.draw(&title, &across, &upwards).extend(self.model());
        let drawn = drawn.extend(self.lost.iter().map(|(look, group)| self.nothing(look, group)));
        drawn.extend(self.tracks.iter().map(|track| self.track(track))).push(self.names())
    }

    /// The model's line for every working set, and where it has no end.
    fn model(&self) -> Vec<Element> {
        if self.quantity == Quantity::Stall {
            return Vec::new();
        }
        let mut sets: Vec<&Guest> = Vec::new();
        for guest in self.joined.iter().filter(|guest| guest.writes == self.writes) {
            if sets.iter().all(|other| other.working_set != guest.working_set) {
                sets.push(guest);
            }
        }
        sets.iter().enumerate().flat_map(|(index, guest)| self.model_of(guest, index)).collect()
    }

    fn model_of(&self, guest: &Guest, index: usize) -> Vec<Element> {
        let at = |step: u32| {
            let rate = self.x.along(f64::from(step) / f64::from(STEPS));
            let guest = Guest { dirty_bytes_per_second: (rate * MIB) as u64, ..guest.clone() };
            (self.x.at(rate), value(&guest, self.link, self.quantity))
        };
        let points: Vec<(f64, (Option<f64>, bool))> = (0..=STEPS).map(at).collect();
        let mut drawn = Vec::new();
        if let Some((from, _)) = points.iter().find(|(_, (_, ends))| !ends) {
            let (top, bottom) = (self.frame.top, self.frame.bottom);
            drawn.push(
                rectangle(*from, top, self.frame.right - from, bottom - top)
                    .class("never")
                    .push(hint("the model has no end here: more is written in a round than the round before carried")),
            );
            if index == 0 {
                let words = "model: never ends";
                let place = (from + 5.0).min(self.frame.right - width_of(words, 10.0)).max(self.frame.left + 2.0);
                drawn.push(label(place, bottom - 5.0, "start", words).class("small"));
            }
        }
        let (least, most) = self.y.bounds();
        for ends in [true, false] {
            let shown = points.iter().filter_map(|(x, (value, found))| {
                let value = (*value).filter(|value| *found == ends && (least..=most).contains(value))?;
                Some((*x, self.y.at(value)))
            });
            let shown: Vec<(f64, f64)> = shown.collect();
            if shown.len() > 1 {
                drawn.push(path(shown).class(if ends { "line model" } else { "line model forced" }));
            }
        }
        vec![Element::new("g").extend(drawn)]
    }

    fn track(&self, track: &Track<'_>) -> Element {
        let joins = |group: &&Group<'_>| self.joined.iter().any(|guest| guest.name == group.guest.name);
        let line_points = path(track.groups.iter().filter(joins).map(|group| self.place(group)));
        let marks = track.groups.iter().map(|group| self.mark(&track.look, group));
        track.look.group().push(track.look.drawn(line_points)).extend(marks)
    }

    fn mark(&self, look: &Look, group: &Group<'_>) -> Element {
        let sample = group.sample(self.quantity);
        let (x, y) = self.place(group);
        let shown = self.quantity.shown(sample.median());
        let trouble = group.standing.trouble().map_or_else(String::new, |trouble| format!(", {trouble}"));
        let words = format!("{}, {}: {shown}{trouble}", group.mover.name, group.guest.name);
        let range = line((x, self.y.at(sample.least())), (x, self.y.at(sample.most()))).class("range");
        Element::new("g").push(hint(words)).push(range).push(look.mark((x, y), group.standing.trouble().is_none()))
    }

    /// A mark at the upper edge, beside those of others at the same rate.
    fn nothing(&self, look: &Look, group: &Group<'_>) -> Element {
        let same = || self.lost.iter().filter(|(_, other)| other.guest.name == group.guest.name);
        let index = same().position(|(_, other)| other.mover.name == group.mover.name).unwrap_or(0) as f64;
        let middle = (same().count() as f64 - 1.0) / 2.0;
        let last = self.frame.right - 6.0 - middle * 11.0;
        let at = self.x.at(group.guest.dirty_bytes_per_second as f64 / MIB).min(last) + (index - middle) * 11.0;
        let words = format!("{}, {}: {}", group.mover.name, group.guest.name, group.time_in_words());
        let mark = look.mark((at, self.frame.top + 9.0), false);
        look.group().push(hint(words)).push(mark)
    }

    fn place(&self, group: &Group<'_>) -> (f64, f64) {
        let rate = group.guest.dirty_bytes_per_second as f64 / MIB;
        (self.x.at(rate), self.y.at(group.sample(self.quantity).median()))
    }

    /// Names at the right, each joined to the last point of its line.
    fn names(&self) -> Element {
        let lasts: Vec<(&Track<'_>, &Group<'_>)> =
            self.tracks.iter().filter_map(|track| Some((track, track.groups.last()?))).collect();
        let wanted: Vec<f64> = lasts.iter().map(|(_, group)| self.place(group).1).collect();
        let places = spread(&wanted, LETTERS + 4.0, (self.frame.top + 4.0, self.frame.bottom - 2.0));
        let names = lasts.iter().zip(places).map(|((track, group), at)| {
            let trouble = group.standing.trouble().is_some();
            let is_last = self.joined.last().is_none_or(|last| last.name == group.guest.name);
            let only = if is_last { String::new() } else { format!(" ({})", words::cut(&group.guest.name, 9)) };
            let room = LETTERS_OF_NAMES - only.chars().count();
            let name = words::cut(words::short(&group.mover.name), room) + &only;
            let (x, y) = self.place(group);
            let from = self.frame.right + 4.0;
            // A leader across the whole picture would say less than the name of the guest.
            let leader = line((x + 6.0, y), (from, at)).class("leader");
            track
                .look
                .group()
                .extend(is_last.then_some(leader))
                .push(track.look.mark((from + 4.0, at), !trouble))
                .push(label(from + 13.0, at + 4.0, "start", &name).class("name"))
        });
        Element::new("g").extend(names)
    }
}

/// What the model expects of this guest, in seconds, and whether it ends.
fn value(guest: &Guest, link: &Link, quantity: Quantity) -> (Option<f64>, bool) {
    let rate = link.payload_rate();
    if !rate.is_finite() || rate <= 0.0 {
        return (None, true);
    }
    match expect(guest, rate, DOWNTIME_SECONDS) {
        Expected::Ends { seconds, .. } if quantity == Quantity::Time => (Some(seconds), true),
        Expected::Ends { downtime_seconds, .. } => (Some(downtime_seconds), true),
        Expected::Never { .. } if quantity == Quantity::Time => (None, false),
        Expected::Never { downtime_seconds } => (Some(downtime_seconds), false),
    }
}
