//! One picture for a README: total time and downtime over two links, ours and the best of QEMU. It has a ground of its own,
//! so that it can be read on any page.

use crate::study::{Engine, Guest, Link, Study, Writes};

use super::super::group::{Group, Quantity};
use super::super::markup::Element;
use super::super::svg::{label, line, picture, rectangle};
use super::super::verdict::{Duel, duels};
use super::super::words;

const WIDTH: f64 = 800.0;
const LEFT: f64 = 158.0;
const TOP: f64 = 92.0;
const ROW: f64 = 46.0;
const BAR: f64 = 13.0;
/// The links that are shown if they were measured.
const WANTED: [u64; 2] = [100_000_000, 1_000_000_000];
/// Room in a column behind the longest bar, for its number.
const NUMBER: f64 = 66.0;

const STYLE: &str = "text{font:12px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif;fill:#24292f}\
.ground{fill:#fff;stroke:#d0d7de}.head{font-size:15px;font-weight:600}.link{font-size:13px;font-weight:600}.soft{fill:#57606a;font-size:11px}\
.ours{fill:#b84a00}.theirs{fill:#7d8791}.rule{stroke:#d0d7de}.bold{font-weight:600}";

/// The picture.
pub(crate) fn summary(study: &Study) -> Element {
    let (duels, links) = (first_of_ours(study), chosen(study));
    let guests: Vec<&Guest> = study
        .guests
        .iter()
        .filter(|guest| duels.iter().any(|duel| duel.guest.name == guest.name && shows(&links, duel)))
        .collect();
    let height = TOP + ROW * guests.len() as f64 + 34.0;
    let says = "Total time and downtime of a migration, ours and the best of QEMU";
    let ground = rectangle(0.5, 0.5, WIDTH - 1.0, height - 1.0).with("rx", 6).class("ground");
    let mut drawn = picture(WIDTH, height, says)
        .at("width", WIDTH)
        .at("height", height)
        .push(Element::new("style").text(STYLE))
        .push(ground)
        .push(label(16.0, 27.0, "start", &title(&guests)).class("head"))
        .extend(key());
    let column = (WIDTH - LEFT - 16.0) / (links.len().max(1) * 2) as f64;
    for (index, link) in links.iter().enumerate() {
        let left = LEFT + column * 2.0 * index as f64;
        drawn = drawn.push(label(left, 58.0, "start", &format!("over {}", words::link(link))).class("link"));
        for (side, quantity) in [Quantity::Time, Quantity::Downtime].into_iter().enumerate() {
            let left = left + column * side as f64;
            drawn = drawn.push(label(left, 76.0, "start", quantity.title()).class("soft"));
            drawn = drawn.push(bars(&duels, link, &guests, quantity, left, column));
        }
    }
    for (row, guest) in guests.iter().enumerate() {
        drawn = drawn.extend(named(guest, TOP + ROW * row as f64));
    }
    let foot = format!(
        "Medians on {} x {}. QEMU: for each number the best of {} settings that finished.",
        study.machine.cpus,
        words::cut(&study.machine.cpu, 46),
        study.movers.iter().filter(|mover| mover.engine == Engine::Qemu).count()
    );
    drawn.push(label(16.0, height - 13.0, "start", &foot).class("soft"))
}

fn title(guests: &[&Guest]) -> String {
    let same = guests.first().filter(|first| guests.iter().all(|guest| guest.bytes == first.bytes));
    let size = same.map_or_else(String::new, |guest| format!(" of {}", words::bytes(guest.bytes as f64)));
    format!("Time to move a virtual machine{size}")
}

fn first_of_ours(study: &Study) -> Vec<Duel<'_>> {
    let all = duels(study);
    let first = all.first().map(|duel| duel.ours.mover.name.clone());
    all.into_iter().filter(|duel| Some(&duel.ours.mover.name) == first.as_ref()).collect()
}

/// 100 Mbit/s and 1 Gbit/s, or else the first two links.
fn chosen(study: &Study) -> Vec<&Link> {
    let wanted = WANTED
        .into_iter()
        .filter_map(|bits| study.links.iter().find(|link| link.bits_per_second == Some(bits) && link.rtt_ms == 0.0));
    let found: Vec<&Link> = wanted.collect();
    if found.is_empty() { study.links.iter().take(2).collect() } else { found }
}

fn shows(links: &[&Link], duel: &Duel<'_>) -> bool {
    links.iter().any(|link| link.name == duel.link.name)
}

fn key() -> Vec<Element> {
    let entry = |x: f64, class: &'static str, words: &str| {
        [rectangle(x, 17.0, 12.0, 12.0).class(class), label(x + 17.0, 27.0, "start", words)]
    };
    entry(WIDTH - 250.0, "ours", "Pageferry")
        .into_iter()
        .chain(entry(WIDTH - 150.0, "theirs", "QEMU at its best"))
        .collect()
}

fn named(guest: &Guest, at: f64) -> Vec<Element> {
    let rate = words::bytes(guest.dirty_bytes_per_second as f64);
    let (what, besides) = match guest.writes {
        Writes::Idle => (guest.name.clone(), "nothing is written".to_owned()),
        Writes::FewBytes => (format!("{rate}/s of pages"), "a few bytes of each".to_owned()),
        Writes::WholePages => (format!("{rate}/s of pages"), "written as a whole".to_owned()),
    };
    vec![
        line((16.0, at), (WIDTH - 16.0, at)).class("rule"),
        label(16.0, at + 19.0, "start", &words::cut(&what, 20)).class("bold"),
        label(16.0, at + 35.0, "start", &besides).class("soft"),
    ]
}

/// One column: two bars for each guest.
fn bars(duels: &[Duel<'_>], link: &Link, guests: &[&Guest], quantity: Quantity, left: f64, column: f64) -> Element {
    let of = |guest: &Guest| duels.iter().find(|duel| duel.guest.name == guest.name && duel.link.name == link.name);
    let values = |duel: &Duel<'_>| {
        let row = duel.rows.iter().find(|row| row.quantity == quantity);
        let ours = row.map_or(f64::NAN, |row| row.ours.median());
        let theirs = duel.finishers.iter().map(|group| group.sample(quantity).median());
        (ours, theirs.filter(|value| value.is_finite()).fold(f64::NAN, f64::min))
    };
    let most = guests.iter().filter_map(|guest| of(guest)).map(|duel| {
        let (ours, theirs) = values(duel);
        ours.max(theirs)
    });
    let most = most.fold(f64::NAN, f64::max);
    let long = |value: f64| if most > 0.0 { value / most * (column - NUMBER) } else { 0.0 };
    let mut drawn = Element::new("g");
    for (row, guest) in guests.iter().enumerate() {
        let at = TOP + ROW * row as f64 + 8.0;
        let Some(duel) = of(guest) else { continue };
        let (ours, theirs) = values(duel);
        let bar = |value: f64, at: f64, class: &str, lacking: String| {
            let says = if value.is_finite() { quantity.shown(value) } else { lacking };
            let length = if value.is_finite() { long(value).max(1.5) } else { 0.0 };
            let bold = if class == "ours" { "bold" } else { "soft" };
            [
                rectangle(left, at, length, BAR).class(class),
                label(left + length + 5.0, at + BAR - 2.0, "start", &says).class(bold),
            ]
        };
        let missing =
            |group: &Group<'_>| if quantity == Quantity::Time { group.time_in_words() } else { String::new() };
        let nobody = match (duel.qemus, quantity) {
            (0, _) => "not run",
            (_, Quantity::Time) => "none finished",
            _ => words::NOTHING,
        };
        drawn = drawn.extend(bar(ours, at, "ours", missing(&duel.ours)));
        drawn = drawn.extend(bar(theirs, at + BAR + 3.0, "theirs", nobody.to_owned()));
    }
    drawn
}
