//! Where the bytes of a guest went: by stage of our encoder, beside what others put on the wire.

use crate::study::{Link, Run, Study};

use super::super::group::{Group, Quantity, cell};
use super::super::markup::Element;
use super::super::svg::look::Look;
use super::super::svg::scale::binary_step;
use super::super::svg::{picture, rectangle};
use super::super::words;
use super::axis_bytes;
use super::bars::{Bar, Layout, Part, draw};

/// From what is sent to what cost least to keep off the wire.
const ORDER: [&str; 7] = ["sent", "packing", "duplicate", "delta", "pattern", "unchanged", "zero"];

/// One picture for a link; nothing if nothing was measured on it.
pub(crate) fn bytes(study: &Study, link: &Link) -> Option<Element> {
    let groups: Vec<(String, Vec<Bar>)> = study
        .guests
        .iter()
        .map(|guest| {
            let bars = cell(study, link, guest).iter().map(|group| bar(study, group)).collect();
            (format!("{}: {}", guest.name, words::guest(guest)), bars)
        })
        .filter(|(_, bars): &(_, Vec<Bar>)| !bars.is_empty())
        .collect();
    let layout = Layout { step: binary_step, words: axis_bytes, right: 150.0, ..Layout::default() };
    let title = format!("Bytes over {}", words::link(link));
    let what = "ours: pages taken up, by what became of them; others: bytes on the wire";
    (!groups.is_empty()).then(|| draw(layout, &title, what, &groups))
}

/// The stages with their looks, from what is sent to what cost least.
pub(crate) fn stage_key() -> Element {
    let entries = ORDER.iter().enumerate().map(|(rank, name)| {
        let shape = rectangle(6.0, 1.0, 20.0, 12.0).class(format!("part s{rank}"));
        Element::new("li").push(picture(26.0, 14.0, "mark").push(shape)).push(Element::new("span").text(*name))
    });
    Element::new("ul").class("key").extend(entries)
}

fn bar(study: &Study, group: &Group<'_>) -> Bar {
    let wire = group.sample(Quantity::Bytes).median();
    let parts = group.typical().filter(|run| !run.stages.is_empty()).map(stages);
    let says = group.standing.trouble().map_or_else(String::new, |trouble| format!(", {trouble}"));
    let on = if parts.is_some() && says.is_empty() { " on the wire" } else { "" };
    Bar {
        name: words::short(&group.mover.name).to_owned(),
        look: Look::of(study, &group.mover.name),
        says: format!("{}{on}{says}", words::bytes(wire)),
        parts: parts.unwrap_or_else(|| {
            let words = words::bytes(wire);
            vec![Part { class: "wire".to_owned(), value: wire, name: "wire".to_owned(), words, is_named: false }]
        }),
        sound: group.standing.trouble().is_none(),
    }
}

fn stages(run: &Run) -> Vec<Part> {
    let rank = |name: &str| ORDER.iter().position(|known| *known == name).unwrap_or(ORDER.len());
    let all: u64 = run.stages.iter().map(|stage| stage.bytes).sum();
    let mut stages: Vec<_> = run.stages.iter().collect();
    stages.sort_by_key(|stage| rank(&stage.name));
    let part = |stage: &&crate::study::Stage| {
        let (value, share) = (stage.bytes as f64, stage.bytes as f64 / all.max(1) as f64);
        let words = format!("{}, {}", words::bytes(value), words::percent(share));
        Part { class: format!("s{}", rank(&stage.name)), value, name: stage.name.clone(), words, is_named: true }
    };
    stages.iter().map(part).collect()
}
