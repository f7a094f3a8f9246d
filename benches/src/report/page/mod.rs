//! The report as one page that needs nothing but itself: no network, no script.

mod head;
mod tables;

use crate::study::{Engine, Link, Study};

use super::charts;
use super::efficiency::{MOST_MORE_SECONDS, MOST_RATIO, beside};
use super::group::Quantity;
use super::markup::Element;
use super::svg::look::Look;
use super::svg::picture;
use super::verdict::{Loss, by_reason, chance, duels, losses, single_run_noise};
use super::{answer, words};

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub(crate) fn page(study: &Study) -> String {
    let title = format!("Pageferry: {} on {}", study.preset, study.machine.date);
    let meta = |name: &'static str, content: &str| Element::new("meta").with("name", name).with("content", content);
    let head = Element::new("head")
        .push(Element::new("meta").with("charset", "utf-8"))
        .push(meta("viewport", "width=device-width, initial-scale=1"))
        .push(meta("color-scheme", "light dark"))
        .push(Element::new("title").text(title))
        .push(Element::new("style").text(STYLE));
    let sections = [
        head::head(study),
        remaining(study),
        rates(study),
        bytes(study),
        cpu(study),
        efficiency(study),
        outlook(study),
        verdict(study),
        lost(study),
        runs(study),
    ];
    let body = Element::new("body").extend(sections);
    format!("<!doctype html>\n{}\n", Element::new("html").with("lang", "en").push(head).push(body))
}

fn section(title: &str) -> Element {
    Element::new("section").push(Element::new("h2").text(title))
}

fn paragraph(words: impl Into<String>) -> Element {
    Element::new("p").text(words)
}

fn soft(words: impl Into<String>) -> Element {
    paragraph(words).class("soft")
}

fn figure(picture: Element) -> Element {
    Element::new("figure").push(picture)
}

fn grid(columns: usize, pictures: impl IntoIterator<Item = Element>) -> Element {
    let class = if columns > 2 { "grid3" } else { "grid2" };
    Element::new("div").class(class).extend(pictures.into_iter().map(figure))
}

fn each_link(study: &Study, picture: fn(&Study, &Link) -> Option<Element>) -> Vec<Element> {
    study.links.iter().filter_map(|link| picture(study, link)).collect()
}

/// Who is who, for a reader who comes from elsewhere; every picture names its lines too.
fn key(study: &Study) -> Element {
    let entries = study.movers.iter().map(|mover| {
        let look = Look::of(study, &mover.name);
        let mark = look.group().push(look.mark((13.0, 7.0), true));
        Element::new("li").push(picture(26.0, 14.0, "mark").push(mark)).push(Element::new("span").text(&mover.name))
    });
    Element::new("ul").class("key").extend(entries)
}

fn remaining(study: &Study) -> Element {
    let mut drawn = section("What was still to be sent, over time").push(soft(
        "Of each mover the run of median time. A rise is the start of another pass: what the guest wrote meanwhile. Below each picture, how long \
         each took. A hollow mark is a run that failed, was given up or was not verified.",
    ));
    for guest in &study.guests {
        let pictures: Vec<Element> =
            study.links.iter().filter_map(|link| charts::remaining(study, link, guest)).collect();
        if !pictures.is_empty() {
            drawn = drawn
                .push(Element::new("h3").text(format!("{}: {}", guest.name, words::guest(guest))))
                .push(soft(&guest.content))
                .push(grid(study.links.len(), pictures));
        }
    }
    drawn
}

fn rates(study: &Study) -> Element {
    let mut drawn = section("Time and downtime, by how fast the guest writes");
    if charts::kinds(study).is_empty() {
        return drawn.push(soft("Only guests that do not write were measured."));
    }
    drawn = drawn
        .push(soft(
            "Grey: the model, which sends whole pages as they are at the rate that a plain copy got. In the shaded region it has no end, because \
             more is written in a pass than the pass before carried; the dotted line is the standstill if the guest were stopped there \
             by force. Whoever is below the line sends less than whole pages.",
        ))
        .push(key(study));
    for quantity in [Quantity::Time, Quantity::Downtime, Quantity::Stall] {
        for writes in charts::kinds(study) {
            let pictures = study.links.iter().filter_map(|link| charts::by_dirty_rate(study, link, writes, quantity));
            let pictures: Vec<Element> = pictures.collect();
            if !pictures.is_empty() {
                let kind =
                    if writes == crate::study::Writes::FewBytes { "a few bytes of each page" } else { "whole pages" };
                drawn = drawn
                    .push(Element::new("h3").text(format!("{}, guests that write {kind}", capital(quantity.title()))))
                    .push(grid(study.links.len(), pictures));
            }
        }
    }
    drawn
}

fn capital(words: &str) -> String {
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

fn bytes(study: &Study) -> Element {
    section("Where the bytes went")
        .push(soft(
            "Ours: all bytes of pages that were taken up, again and again if need be, by what became of them: sent, or kept off the link by a stage of the \
             encoder. Others: what their source put on the wire. What was given up is pale, and broken off where it is much longer.",
        ))
        .push(charts::stage_key())
        .push(grid(2, each_link(study, charts::bytes)))
}

fn efficiency(study: &Study) -> Element {
    let found = beside(study);
    if found.is_empty() {
        return Element::new("section");
    }
    let lines = found.iter().map(|one| {
        let (took, copy) = (words::seconds(one.seconds), words::seconds(one.copy_seconds));
        let word = if one.met() { "met" } else { "NOT MET" };
        let text = format!(
            "{} of {} over {}: {took}, a plain copy {copy}, {:.3}×. At most {MOST_RATIO}× and {:.0} ms: {word}.",
            one.mover.name,
            one.guest.name,
            words::link(one.link),
            one.ratio(),
            MOST_MORE_SECONDS * 1e3,
        );
        Element::new("li").text(text)
    });
    section("How much of the link is used")
        .push(soft(
            "A guest whose memory nobody can pack, beside a plain copy of as many bytes over one TCP connection, each in its turn.",
        ))
        .push(Element::new("ul").extend(lines))
}

fn cpu(study: &Study) -> Element {
    section("What it costs in CPU time")
        .push(soft("Of the processes of both sides, user and system, without virtual CPUs: the source's first, the destination's paler beside it."))
        .push(grid(2, each_link(study, charts::cpu)))
}

fn outlook(study: &Study) -> Element {
    section("Faster links, by the model")
        .push(soft(format!(
            "Nothing here was measured but the circles. The model sends whole pages as they are, with neither compression nor deltas; {} of the link's \
             rate is payload; the guest may stand still for {}; and CPU time is no limit, which on such links it is: {}.",
            words::percent(super::outlook::PAYLOAD_SHARE),
            words::seconds(crate::study::model::DOWNTIME_SECONDS),
            if super::outlook::cpu_costs(study).is_empty() {
                "how soon, only an unshaped link in the matrix would show (--link unshaped)"
            } else {
                "see the dashed lines and the table of cores"
            }
        )))
        .extend(charts::outlook(study).map(|picture| figure(picture).class("broad")))
        .push(tables::outlook(study))
        .extend(tables::cores(study))
}

fn verdict(study: &Study) -> Element {
    let duels = duels(study);
    let drawn = section("Ours against the best of QEMU");
    if duels.iter().all(|duel| duel.qemus == 0) {
        return drawn.push(soft("No QEMU was run beside ours."));
    }
    drawn
        .push(soft(format!(
            "Medians; ratios are ours divided by theirs, so less than 1 is better. The fastest QEMU of a cell is the setting with the least median of total time \
             among those that finished every time. Beside it stands the best value that any setting that finished reached, which may be \
             another one for each quantity. Runs whose ranges overlap are level; of a single run, what differs by less than a factor that is \
             usual between runs: {}.",
            single_runs()
        )))
        .extend(chance(&duels).map(|(runs, chance)| {
            soft(format!(
                "With {runs} runs of each, {} of comparisons between equals look like a difference by chance alone.",
                words::percent(chance)
            ))
        }))
        .extend(answer::standing(&duels).map(paragraph))
        .push(tables::overview(study, &duels))
        .extend(study.links.iter().filter_map(|link| tables::duels(link, &duels)))
}

fn single_runs() -> String {
    let factors = Quantity::ALL.map(|quantity| format!("{} {}", single_run_noise(quantity), quantity.title()));
    factors.join(", ")
}

fn lost(study: &Study) -> Element {
    let duels = duels(study);
    let losses = losses(study, &duels);
    let drawn = section("Where ours is behind, or does not finish");
    if losses.is_empty() {
        let words = if duels.is_empty() { "None of ours was run." } else { "Nowhere in this study." };
        return drawn.push(paragraph(words));
    }
    let several = study.movers.iter().filter(|mover| mover.engine == Engine::Pageferry).count() > 1;
    let item = |loss: &Loss<'_>| {
        let mover = if several { format!(" ({})", loss.mover) } else { String::new() };
        let place = format!("{} over {}{mover}, {}", loss.guest, loss.link, loss.quantity.title());
        Element::new("li").push(Element::new("b").text(place)).text(format!(": {}.", loss.words))
    };
    drawn.extend(by_reason(&losses).into_iter().flat_map(|(reason, losses)| {
        let items = losses.into_iter().map(item);
        [paragraph(reason), Element::new("ul").class("losses").extend(items)]
    }))
}

fn runs(study: &Study) -> Element {
    let all = Element::new("details")
        .push(
            Element::new("summary")
                .text(format!("All {} runs, in the order in which they were made", study.runs.len())),
        )
        .push(tables::runs(study));
    section("Runs").push(tables::movers(study)).push(all)
}
