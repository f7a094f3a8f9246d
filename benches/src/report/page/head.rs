//! The top of the page: what was measured where, and the short answer.

use crate::study::{Engine, Link, Shaper, Study};

use super::super::answer::{Part, answers, standing};
use super::super::group::is_verified;
use super::super::markup::Element;
use super::super::verdict::duels;
use super::super::words;
use super::tables::{cell, table};
use super::{paragraph, soft};

pub(super) fn head(study: &Study) -> Element {
    let machine = &study.machine;
    let engines: Vec<String> = [(Engine::Pageferry, "Pageferry"), (Engine::Qemu, "QEMU")]
        .into_iter()
        .filter_map(|(engine, name)| {
            let count = study.movers.iter().filter(|mover| mover.engine == engine).count();
            (count > 0).then(|| format!("{name} in {count} setting{}", if count == 1 { "" } else { "s" }))
        })
        .collect();
    let what = format!(
        "{} guests over {} links, moved by {}: {} migrations.",
        study.guests.len(),
        study.links.len(),
        engines.join(" and "),
        study.runs.len()
    );
    let mut facts = format!(
        "{}. {} x {}, {} GiB of memory, Linux {}, TCP {}, transparent huge pages {}",
        machine.date,
        machine.cpus,
        machine.cpu,
        machine.memory_gib,
        machine.kernel,
        machine.tcp_congestion_control,
        machine.transparent_huge_pages
    );
    if machine.load_before.is_finite() {
        facts += &format!(", load {:.2} before", machine.load_before);
    }
    let repeat = Element::new("p").text("Repeat it with ").push(Element::new("code").text(&study.command));
    Element::new("section")
        .push(Element::new("h1").text("How long a virtual machine takes to move"))
        .push(paragraph(what))
        .push(soft(facts + "."))
        .push(repeat)
        .extend(warnings(study))
        .push(short_answer(study))
        .push(links(study))
        .extend(notes(study))
}

fn warnings(study: &Study) -> Vec<Element> {
    let mut all = Vec::new();
    let mut warn = |words: String| all.push(paragraph(words).class("warn"));
    if study.interrupted {
        warn("This measurement was interrupted: the matrix is not complete.".to_owned());
    }
    if !study.machine.optimised_build {
        warn("This was a debug build: believe no time and no CPU time.".to_owned());
    }
    if study.links.iter().any(|link| link.shaper == Shaper::Relay) {
        warn(
            "Links marked as a relay are shaped by a program between two sockets of loopback, not by the kernel. It takes CPU time from the migration, and CPU-bound \
             numbers over it are worse than over a real link."
                .to_owned(),
        );
    }
    let count = |what: &dyn Fn(&crate::study::Run) -> bool| study.runs.iter().filter(|run| what(run)).count();
    let failed = count(&|run| matches!(run.end, crate::study::End::Failed(_)));
    let given_up = count(&|run| run.end == crate::study::End::GivenUp);
    let unverified = count(&|run| run.end == crate::study::End::Completed && !is_verified(run));
    if failed + given_up + unverified > 0 {
        warn(format!(
            "Of {} runs {failed} failed, {given_up} were given up at the limit, and {unverified} completed without proof that memory arrived as it was. \
             Their marks are hollow.",
            study.runs.len()
        ));
    }
    all
}

fn short_answer(study: &Study) -> Element {
    let answers = answers(study);
    let drawn = Element::new("div").class("answer");
    if answers.is_empty() {
        return drawn.push(paragraph("Nothing was measured yet."));
    }
    let items = answers.iter().map(|answer| {
        let parts = answer.parts.iter().map(in_words).enumerate().map(|(index, words)| {
            Element::new("span").text(if index == 0 { ": " } else { "; " }).text(words)
        });
        let name = format!("{} ({})", words::guest(answer.guest), answer.guest.name);
        Element::new("li").push(Element::new("b").text(name)).extend(parts)
    });
    drawn.push(Element::new("ul").extend(items)).extend(standing(&duels(study)).map(paragraph))
}

fn in_words(part: &Part) -> String {
    let mut besides = part.besides.clone();
    besides.extend(part.theirs.clone());
    if besides.is_empty() { part.ours.clone() } else { format!("{} ({})", part.ours, besides.join(", ")) }
}

fn links(study: &Study) -> Element {
    let header = ["link", "rate", "round trip", "a plain copy gets", "of the rate", "shaped by"];
    let rows = study.links.iter().map(|link| {
        vec![
            cell("words").text(&link.name),
            cell("").text(link.bits_per_second.map_or_else(|| "unshaped".to_owned(), |bits| words::bits(bits as f64))),
            cell("").text(round_trip(link)),
            copy(link),
            cell("").text(efficiency(link)),
            cell("words").text(words::shaper(link.shaper)),
        ]
    });
    table("", &header, rows)
}

fn round_trip(link: &Link) -> String {
    if link.rtt_ms > 0.0 { format!("+{} ms", words::digits(link.rtt_ms)) } else { "as it is".to_owned() }
}

fn copy(link: &Link) -> Element {
    let median = crate::outcome::median(&link.goodputs);
    if !median.is_finite() {
        return cell("").text("not measured");
    }
    let turns = format!("median of {}", link.goodputs.len());
    cell("").text(words::bits(median * 8.0)).push(Element::new("small").text(turns))
}

fn efficiency(link: &Link) -> String {
    let share = link.bits_per_second.map(|bits| crate::outcome::median(&link.goodputs) * 8.0 / bits as f64);
    share.map_or_else(|| words::NOTHING.to_owned(), words::percent)
}

fn notes(study: &Study) -> Option<Element> {
    let items = study.notes.iter().map(|note| Element::new("li").text(note));
    (!study.notes.is_empty()).then(|| Element::new("ul").class("soft").extend(items))
}
