//! The tables of the page.

use crate::study::model::Expected;
use crate::study::{End, Link, Run, Study, Writes};

use super::super::group::{Quantity, is_disturbed, is_verified, worked};
use super::super::markup::Element;
use super::super::outlook::{RATES, cpu_costs, expected, unshaped_link};
use super::super::verdict::{Against, Duel, Judgement, Row};
use super::super::words;

/// A cell of a table; `words` as its class starts it at the left.
pub(super) fn cell(class: &str) -> Element {
    let cell = Element::new("td");
    if class.is_empty() { cell } else { cell.class(class) }
}

/// A table; an empty caption is none. It scrolls by itself where the page is narrow.
pub(super) fn table(caption: &str, header: &[&str], rows: impl IntoIterator<Item = Vec<Element>>) -> Element {
    ruled(caption, header, rows.into_iter().map(|row| (false, row)))
}

/// The same, where a row may start a new group. Titles stand as the cells of the first row do.
fn ruled(caption: &str, header: &[&str], rows: impl IntoIterator<Item = (bool, Vec<Element>)>) -> Element {
    let rows: Vec<(bool, Vec<Element>)> = rows.into_iter().collect();
    let titles = header.iter().enumerate().map(|(index, title)| {
        let words = rows.first().and_then(|(_, cells)| cells.get(index)).is_some_and(|cell| cell.has_class("words"));
        let title = Element::new("th").with("scope", "col").text(*title);
        if words || index == 0 { title.class("words") } else { title }
    });
    let titles: Vec<Element> = titles.collect();
    let rows = rows.into_iter().map(|(first, cells)| {
        let row = Element::new("tr").extend(cells);
        if first { row.class("first") } else { row }
    });
    let table = Element::new("table")
        .extend((!caption.is_empty()).then(|| Element::new("caption").text(caption)))
        .push(Element::new("thead").push(Element::new("tr").extend(titles)))
        .push(Element::new("tbody").extend(rows));
    Element::new("div").class("wide").push(table)
}

/// Ratios to the best of any QEMU at a glance.
pub(super) fn overview(study: &Study, duels: &[Duel<'_>]) -> Element {
    let header: Vec<&str> =
        ["guest, link"].into_iter().chain(Quantity::ALL.map(Quantity::title)).chain(["finished"]).collect();
    let mut last = String::new();
    let rows = duels.iter().map(|duel| {
        let first = duel.link.name != last;
        last.clone_from(&duel.link.name);
        let mut cells =
            vec![cell("words").text(format!("{}, {}", duel.guest.name, duel.link.name)).extend(mover(study, duel))];
        cells.extend(duel.rows.iter().map(|row| match &row.best {
            Some(best) => {
                cell(class(best.judgement)).text(format!("{} {}", sign(best.judgement), words::ratio(best.ratio)))
            }
            None => cell("").text(words::NOTHING),
        }));
        let ended = match duel.ours.standing.trouble() {
            None if duel.is_alone() => cell("better").text("only ours"),
            None => cell("").text("yes"),
            Some(trouble) => cell("worse").text(trouble),
        };
        cells.push(ended);
        (first, cells)
    });
    let caption =
        "Ours divided by the best value of any QEMU setting. ▼ ours is better, ▲ ours is worse, = no more than noise.";
    ruled(caption, &header, rows.collect::<Vec<_>>())
}

fn mover(study: &Study, duel: &Duel<'_>) -> Option<Element> {
    let several = study.movers.iter().filter(|mover| mover.engine == duel.ours.mover.engine).count() > 1;
    several.then(|| Element::new("small").text(&duel.ours.mover.name))
}

fn class(judgement: Judgement) -> &'static str {
    match judgement {
        Judgement::Level => "",
        other => other.word(),
    }
}

fn sign(judgement: Judgement) -> &'static str {
    match judgement {
        Judgement::Better => "▼",
        Judgement::Level => "=",
        Judgement::Worse => "▲",
    }
}

/// Every quantity of every cell of a link; nothing if ours was not run on it.
pub(super) fn duels(link: &Link, duels: &[Duel<'_>]) -> Option<Element> {
    let here: Vec<&Duel<'_>> = duels.iter().filter(|duel| duel.link.name == link.name).collect();
    let header = ["guest", "quantity", "ours", "fastest QEMU", "ratio", "best of any QEMU", "ratio", ""];
    let rows = here.iter().flat_map(|duel| {
        duel.rows.iter().enumerate().map(move |(index, row)| (index == 0, quantity(duel, row, index == 0)))
    });
    let rows: Vec<(bool, Vec<Element>)> = rows.collect();
    (!here.is_empty()).then(|| ruled(&format!("Over {}", words::link(link)), &header, rows))
}

fn quantity(duel: &Duel<'_>, row: &Row<'_>, first: bool) -> Vec<Element> {
    let name = if first { format!("{} ({})", duel.guest.name, duel.ours.mover.name) } else { String::new() };
    let trouble = duel
        .ours
        .standing
        .trouble()
        .filter(|_| first)
        .map(|trouble| Element::new("small").class("worse").text(trouble));
    let ours = match (row.quantity, row.ours.is_empty()) {
        (_, false) => shown(row.quantity, &row.ours),
        (Quantity::Time, true) => cell("worse").text(duel.ours.time_in_words()),
        (_, true) => cell("").text(words::NOTHING),
    };
    let lacking = || if duel.qemus == 0 { "not run" } else { "none finished" };
    let theirs = |against: &Option<Against<'_>>| match against {
        Some(against) => {
            let verified = duel.finishers.iter().find(|group| group.mover.name == against.mover.name);
            let trouble = verified.and_then(|group| group.standing.trouble());
            let name = trouble
                .map_or_else(|| against.mover.name.clone(), |trouble| format!("{}, {trouble}", against.mover.name));
            (shown(row.quantity, &against.sample).push(Element::new("small").text(name)), words::ratio(against.ratio))
        }
        None if row.quantity == Quantity::Time => (cell("").text(lacking()), words::NOTHING.to_owned()),
        None => (cell("").text(words::NOTHING), words::NOTHING.to_owned()),
    };
    let ((fastest, by), (best, beside)) = (theirs(&row.fastest), theirs(&row.best));
    // Nothing is gained by the same number twice.
    let is_same = row
        .best
        .as_ref()
        .zip(row.fastest.as_ref())
        .is_some_and(|(best, fastest)| best.mover.name == fastest.mover.name);
    let best = if is_same { cell("").push(Element::new("small").text("the same")) } else { best };
    let judgement = row.best.as_ref().map(|best| best.judgement);
    vec![
        cell("words").text(name).extend(trouble),
        cell("words").text(row.quantity.title()),
        ours,
        fastest,
        cell("").text(by),
        best,
        cell(judgement.map_or("", class)).text(beside),
        cell(judgement.map_or("words", class)).text(judgement.map_or("", Judgement::word)),
    ]
}

/// The median, and the range below it.
fn shown(quantity: Quantity, sample: &super::super::group::Sample) -> Element {
    let range = sample.range(quantity).map(|range| Element::new("small").text(range));
    cell("").text(quantity.shown(sample.median())).extend(range)
}

/// What the model expects of every guest over links of a hundred megabits to a hundred gigabits.
pub(super) fn outlook(study: &Study) -> Element {
    let rates = RATES.map(words::bits);
    let header: Vec<&str> = ["guest"].into_iter().chain(rates.iter().map(String::as_str)).collect();
    let rows = study.guests.iter().map(|guest| {
        let kind = if guest.writes == Writes::FewBytes { ", as if whole pages were sent" } else { "" };
        let name = Element::new("small").text(format!("{}{kind}", words::guest(guest)));
        let mut cells = vec![cell("words").text(&guest.name).push(name)];
        cells.extend(RATES.map(|rate| match expected(guest, rate) {
            Expected::Ends { seconds, downtime_seconds, rounds, .. } => {
                let besides = format!("{} of downtime, {rounds} passes", words::seconds(downtime_seconds));
                cell("").text(words::seconds(seconds)).push(Element::new("small").text(besides))
            }
            Expected::Never { downtime_seconds } => {
                let besides = format!("{} of downtime if forced", words::seconds(downtime_seconds));
                cell("worse").text("never ends").push(Element::new("small").text(besides))
            }
        }));
        cells
    });
    table("What the model expects: total time", &header, rows.collect::<Vec<_>>())
}

/// How many cores it takes so that the link is the limit; nothing without a run that says what a GiB costs.
pub(super) fn cores(study: &Study) -> Option<Element> {
    let costs = cpu_costs(study);
    let link = unshaped_link(study).filter(|_| !costs.is_empty())?;
    let header =
        ["mover, guest", "source", "destination", "one core moves", "cores at 10 Gbit/s", "cores at 100 Gbit/s"];
    let rows = costs.iter().map(|cost| {
        vec![
            cell("words").text(&cost.group.mover.name).push(Element::new("small").text(&cost.group.guest.name)),
            cell("").text(format!("{}/GiB", words::seconds(cost.source))),
            cell("").text(format!("{}/GiB", words::seconds(cost.destination))),
            cell("").text(words::bits(cost.bits_per_core())),
            cell("").text(words::digits(cost.cores_for(RATES[2]))),
            cell("").text(words::digits(cost.cores_for(RATES[3]))),
        ]
    });
    let caption = format!(
        "What CPU time allows: per GiB of guest memory, measured over {}. Cores are those of the side that costs more, if all of its work could \
         be spread evenly, to take up memory of this mix as fast as such a link could carry it as it is.",
        words::link(link)
    );
    Some(table(&caption, &header, rows.collect::<Vec<_>>()))
}

pub(super) fn movers(study: &Study) -> Element {
    let header = ["mover", "version", "settings"];
    let rows = study.movers.iter().map(|mover| {
        vec![cell("words").text(&mover.name), cell("words").text(&mover.version), cell("words").text(&mover.settings)]
    });
    table("", &header, rows.collect::<Vec<_>>())
}

/// Every run.
pub(super) fn runs(study: &Study) -> Element {
    let header = [
        "link, guest, mover",
        "turn",
        "end",
        "verified by",
        "time",
        "downtime",
        "stall before",
        "during",
        "after",
        "passes",
        "wire MiB",
        "CPU source",
        "CPU dest.",
        "peak source",
        "peak dest.",
        "slowed",
        "worked",
        "host took",
    ];
    let row = |run: &Run| {
        let guest = study.guests.iter().find(|guest| guest.name == run.guest);
        let worked = guest.map_or(f64::NAN, |guest| worked(guest, run));
        let mut cells = self::run(run);
        cells.push(cell("").text(words::percent(worked)));
        let flag = if is_disturbed(run) { "worse" } else { "" };
        cells.push(cell(flag).text(words::percent(run.stolen_share.unwrap_or(f64::NAN))));
        cells
    };
    let caption = "Slowed: the strongest throttle. Worked: how much of what it was to write the guest wrote while it was moved; a throttle, \
                   standing still, waiting for pages that are not there yet and a lack of CPU time all take from it. Host took: of the \
                   CPU time that this machine asked for, what its own host gave to others.";
    table(caption, &header, study.runs.iter().map(row).collect::<Vec<_>>())
}

fn run(run: &Run) -> Vec<Element> {
    let milliseconds = |ms: Option<f64>| ms.map_or_else(|| words::NOTHING.to_owned(), |ms| words::seconds(ms / 1e3));
    let sound = run.end == End::Completed;
    let flag = |sound: bool| if sound { "words" } else { "words worse" };
    vec![
        cell("words").text(format!("{}, {}", run.link, run.guest)).push(Element::new("small").text(&run.mover)),
        cell("").text(run.turn.to_string()),
        cell(flag(sound)).text(words::end(run)),
        cell(flag(is_verified(run))).text(words::proof(run)),
        cell("").text(words::seconds(run.seconds)),
        cell("").text(milliseconds(run.downtime_ms)),
        cell("").text(milliseconds(run.stalls.before_ms)),
        cell("").text(milliseconds(run.stalls.during_ms)),
        cell("").text(milliseconds(run.stalls.after_ms)),
        cell("").text(run.rounds.to_string()),
        cell("").text(words::digits(run.wire_bytes as f64 / f64::from(1 << 20))),
        cell("").text(words::seconds(run.source.cpu_seconds)),
        cell("").text(words::seconds(run.destination.cpu_seconds)),
        cell("").text(words::bytes(run.source.peak_rss_bytes as f64)),
        cell("").text(words::bytes(run.destination.peak_rss_bytes as f64)),
        cell("").text(format!("{} %", words::digits(run.throttle_percent))),
    ]
}
