//! CPU time per GiB of guest memory, of both sides.

use crate::study::{Link, Study};

use super::super::group::{Group, cell};
use super::super::markup::Element;
use super::super::svg::look::Look;
use super::super::words;
use super::bars::{Bar, Layout, Part, draw};

const GIB: f64 = (1_u64 << 30) as f64;

/// One picture for a link; nothing if nothing was measured on it.
pub(crate) fn cpu(study: &Study, link: &Link) -> Option<Element> {
    let groups: Vec<(String, Vec<Bar>)> = study
        .guests
        .iter()
        .map(|guest| {
            let bars = cell(study, link, guest).iter().map(|group| bar(study, group)).collect();
            (format!("{}: {}", guest.name, words::guest(guest)), bars)
        })
        .filter(|(_, bars): &(_, Vec<Bar>)| !bars.is_empty())
        .collect();
    let title = format!("CPU time over {}", words::link(link));
    let layout = Layout { right: 92.0, ..Layout::default() };
    let what = "seconds of CPU time per GiB of guest memory";
    (!groups.is_empty()).then(|| draw(layout, &title, what, &groups))
}

fn bar(study: &Study, group: &Group<'_>) -> Bar {
    let gibs = (group.guest.bytes as f64 / GIB).max(f64::MIN_POSITIVE);
    let source = group.median_of(|run| run.source.cpu_seconds) / gibs;
    let destination = group.median_of(|run| run.destination.cpu_seconds) / gibs;
    let part = |class: &str, name: &str, value: f64| Part {
        class: class.to_owned(),
        value,
        name: name.to_owned(),
        words: format!("{} per GiB", words::seconds(value)),
        is_named: group.is_ours(),
    };
    let trouble = group.standing.trouble();
    let says = trouble.as_ref().map_or_else(String::new, |trouble| format!(", {trouble}"));
    Bar {
        name: words::short(&group.mover.name).to_owned(),
        look: Look::of(study, &group.mover.name),
        says: format!("{}{says}", words::seconds(source + destination)),
        parts: vec![part("cpu-source", "source", source), part("cpu-destination", "destination", destination)],
        sound: trouble.is_none(),
    }
}
