//! The top of the page: what was measured where, and the short answer.

use crate::steal::DISTURBING;
use crate::study::model::floor_seconds;
use crate::study::{Engine, Link, Shaper, Study};

use super::super::answer::{Answer, Part, answers, standing};
use super::super::group::{Sample, is_disturbed, is_verified};
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
            (count > 0).then(|| format!("{name} in {}", words::plural(count, "setting")))
        })
        .collect();
    let what = format!(
        "{} over {}, moved by {}: {}.",
        words::plural(study.guests.len(), "guest"),
        words::plural(study.links.len(), "link"),
        engines.join(" and "),
        words::plural(study.runs.len(), "migration")
    );
    let facts = format!(
        "{}. {} x {}, {} GiB of memory, Linux {}, TCP {}, transparent huge pages {}{}.",
        machine.date,
        machine.cpus,
        machine.cpu,
        machine.memory_gib,
        machine.kernel,
        machine.tcp_congestion_control,
        machine.transparent_huge_pages,
        if machine.load_before.is_finite() {
            format!(", load {:.2} before", machine.load_before)
        } else {
            String::new()
        }
    );
    let repeat = Element::new("p").text("Repeat it with ").push(Element::new("code").text(&study.command));
    Element::new("section")
        .push(Element::new("h1").text("How long a virtual machine takes to move"))
        .push(paragraph(what))
        .push(soft(facts))
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
    let disturbed = study.runs.iter().filter(|run| is_disturbed(run));
    let shares = Sample::new(disturbed.filter_map(|run| run.stolen_share));
    if !shares.is_empty() {
        warn(format!(
            "During {} of {} runs the host of this machine gave more than {} of the CPU time that it asked for to others, up to {} (from the \
             start of the guest to its last check): those may have taken longer than they would have, or not have come to an end. The list of \
             all runs says which.",
            shares.len(),
            study.runs.len(),
            words::percent(DISTURBING),
            words::percent(shares.most())
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
        let parts: Vec<String> = answer.parts.iter().map(Part::in_words).collect();
        let name = Element::new("b").text(words::guest(answer.guest));
        Element::new("li").push(name).text(format!(": {}.", parts.join(", ")))
    });
    drawn
        .push(Element::new("ul").extend(items))
        .extend(standing(&duels(study)).map(paragraph))
        .push(details(study, &answers))
}

/// The same as a table, with downtime and the fastest of the others.
fn details(study: &Study, answers: &[Answer<'_>]) -> Element {
    let links: Vec<&Link> =
        study.links.iter().filter(|link| study.runs.iter().any(|run| run.link == link.name)).collect();
    let header: Vec<&str> = ["guest"].into_iter().chain(links.iter().map(|link| link.name.as_str())).collect();
    let rows = answers.iter().map(|answer| {
        let name = Element::new("small").text(words::guest(answer.guest));
        let mut cells = vec![cell("words").push(Element::new("b").text(&answer.guest.name)).push(name)];
        cells.extend(links.iter().map(|link| {
            let part = answer.parts.iter().find(|part| part.link.name == link.name);
            part.map_or_else(|| cell("").text(words::NOTHING), outcome)
        }));
        cells
    });
    table("", &header, rows.collect::<Vec<_>>())
}

fn outcome(part: &Part<'_>) -> Element {
    let small = |words: String| Element::new("small").text(words);
    cell("")
        .push(Element::new("b").text(&part.time))
        .extend(part.downtime.iter().map(|downtime| small(format!("downtime {downtime}"))))
        .extend(part.besides.iter().map(|words| small(words.clone())))
        .extend(part.theirs.iter().map(|theirs| small(format!("QEMU: {theirs}"))))
}

fn links(study: &Study) -> Element {
    let most = study.guests.iter().map(|guest| guest.bytes).max().unwrap_or(1 << 30);
    let least = format!("least for {}", words::bytes(most as f64));
    let header = ["link", "rate", "round trip", "a plain copy gets", "of the rate", &least, "shaped by"];
    let rows = study.links.iter().map(|link| {
        vec![
            cell("words").text(&link.name),
            cell("").text(link.bits_per_second.map_or_else(|| "unshaped".to_owned(), |bits| words::bits(bits as f64))),
            cell("").text(round_trip(link)),
            copy(link),
            cell("").text(efficiency(link)),
            cell("").text(
                link.bits_per_second
                    .map_or_else(|| words::NOTHING.to_owned(), |bits| words::seconds(floor_seconds(most, bits))),
            ),
            cell("words").text(words::shaper(link.shaper)),
        ]
    });
    table("", &header, rows.collect::<Vec<_>>())
}

fn round_trip(link: &Link) -> String {
    if link.rtt_ms > 0.0 { format!("+{} ms", words::count(link.rtt_ms)) } else { "as it is".to_owned() }
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
