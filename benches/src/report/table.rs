//! The medians as a table for a terminal, a block for each link.

use std::fmt::Write;

use crate::steal::DISTURBING;
use crate::study::Study;

use super::answer::standing;
use super::efficiency::{Beside, MOST_RATIO, beside};
use super::group::{Group, Quantity, cell, is_disturbed};
use super::verdict::{by_reason, duels, losses};
use super::words;

const TITLES: [&str; 10] = ["guest", "mover", "time", "downtime", "stall", "wire", "CPU", "passes", "slowed", "worked"];

/// Behind the name of a mover: not every run came to its end; memory of one was not verified; the host disturbed one.
const UNFINISHED: char = '!';
const UNVERIFIED: char = '?';
const DISTURBED: char = '~';

/// The table, what the marks in it mean, and where ours is behind.
pub(crate) fn table(study: &Study) -> String {
    let mut text = String::new();
    let mut rows: Vec<(usize, [String; 10])> = Vec::new();
    for (index, link) in study.links.iter().enumerate() {
        for guest in &study.guests {
            let groups = cell(study, link, guest);
            rows.extend(groups.iter().enumerate().map(|(place, group)| (index, row(group, place == 0))));
        }
    }
    let widths: [usize; 10] = std::array::from_fn(|column| {
        let cells = rows.iter().map(|(_, row)| row[column].chars().count());
        cells.chain([TITLES[column].len()]).max().unwrap_or(0)
    });
    for (index, link) in study.links.iter().enumerate() {
        let here: Vec<&[String; 10]> = rows.iter().filter(|(of, _)| *of == index).map(|(_, row)| row).collect();
        if here.is_empty() {
            continue;
        }
        let rate = words::bits(link.payload_rate() * 8.0);
        put(
            &mut text,
            format_args!(
                "{} ({}; a plain copy gets {rate}; {})\n",
                link.name,
                words::link(link),
                words::shaper(link.shaper)
            ),
        );
        put(&mut text, format_args!("{}", aligned(&TITLES.map(str::to_owned), &widths)));
        text.extend(here.iter().map(|row| aligned(row, &widths)));
        text.push('\n');
    }
    if rows.is_empty() {
        text += "nothing was measured\n";
    }
    text + &key(&rows) + &efficiency(study) + &behind(study)
}

/// How much of the link is used, where that was measured.
fn efficiency(study: &Study) -> String {
    let line = |one: &Beside<'_>| {
        let word = if one.met() { "met" } else { "NOT MET" };
        let (took, copy) = (words::seconds(one.seconds), words::seconds(one.copy_seconds));
        let (mover, guest, link) = (&one.mover.name, &one.guest.name, &one.link.name);
        let ratio = one.ratio();
        format!(
            "{mover} of {guest} over {link}: {took}, a plain copy of as much {copy}: {ratio:.3} (at most {MOST_RATIO} and 50 ms: {word})\n"
        )
    };
    beside(study).iter().map(line).collect()
}

fn put(text: &mut String, words: std::fmt::Arguments<'_>) {
    // A string takes all that it is given.
    let _ = text.write_fmt(words);
}

fn row(group: &Group<'_>, first: bool) -> [String; 10] {
    let shown = |quantity: Quantity| {
        let median = group.sample(quantity).median();
        if median.is_finite() { quantity.shown(median) } else { words::NOTHING.to_owned() }
    };
    let marks = [
        (!group.standing.finished(), UNFINISHED),
        (group.standing.unverified > 0, UNVERIFIED),
        (group.runs.iter().any(|run| is_disturbed(run)), DISTURBED),
    ];
    let marks: String = marks.into_iter().filter_map(|(holds, mark)| holds.then_some(mark)).collect();
    let gap = if marks.is_empty() { "" } else { " " };
    let throttle = group.median_of(|run| run.throttle_percent);
    [
        if first { group.guest.name.clone() } else { String::new() },
        format!("{}{gap}{marks}", group.mover.name),
        shown(Quantity::Time),
        shown(Quantity::Downtime),
        shown(Quantity::Stall),
        shown(Quantity::Bytes),
        shown(Quantity::Cpu),
        words::count(group.median_of(|run| run.rounds as f64)),
        if throttle > 0.0 { format!("{throttle:.0} %") } else { words::NOTHING.to_owned() },
        words::percent(group.worked()),
    ]
}

fn aligned(cells: &[String; 10], widths: &[usize; 10]) -> String {
    let mut line = String::from(" ");
    for (index, (cell, width)) in cells.iter().zip(widths).enumerate() {
        match index {
            0 | 1 => put(&mut line, format_args!(" {cell:<width$}")),
            _ => put(&mut line, format_args!("  {cell:>width$}")),
        }
    }
    line.trim_end().to_owned() + "\n"
}

fn key(rows: &[(usize, [String; 10])]) -> String {
    // Behind a gap: no mark is part of a name.
    let has =
        |mark: char| rows.iter().any(|(_, row)| row[1].rsplit_once(' ').is_some_and(|(_, marks)| marks.contains(mark)));
    let mut text = String::new();
    if has(UNFINISHED) {
        text += "! not every run came to its end; the numbers are of those that did, or of when they were given up\n";
    }
    if has(UNVERIFIED) {
        text += "? nothing proves that memory arrived as it was\n";
    }
    if has(DISTURBED) {
        put(
            &mut text,
            format_args!(
                "~ during a run the host of this machine took more than {} of its CPU time\n",
                words::percent(DISTURBING)
            ),
        );
    }
    text
}

fn behind(study: &Study) -> String {
    let duels = duels(study);
    let mut text = String::new();
    if study.interrupted {
        text += "the measurement was interrupted: the matrix is not complete\n";
    }
    if let Some(words) = standing(&duels) {
        put(&mut text, format_args!("{words}\n"));
    }
    for (reason, losses) in by_reason(&losses(study, &duels)) {
        for loss in losses {
            let (guest, link, quantity) = (loss.guest, loss.link, loss.quantity.title());
            put(&mut text, format_args!("  behind: {guest} over {link}, {} {quantity}: {}\n", loss.mover, loss.words));
        }
        put(&mut text, format_args!("    why: {reason}\n"));
    }
    for note in &study.notes {
        put(&mut text, format_args!("  note: {note}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn medians_stand_in_a_block_for_each_link() {
        let text = table(&example::small(&[3.0, 1.0, 2.0]));
        assert!(text.starts_with("100mbit (100 Mbit/s; a plain copy gets 94 Mbit/s; "), "{text}");
        let ours = text.lines().find(|line| line.contains("ours")).unwrap();
        assert!(ours.contains("idle") && ours.contains(" 2.00 s "), "{text}");
    }

    #[test]
    fn marks_and_their_meaning_show_only_where_they_are_needed() {
        let sound = table(&example::small(&[1.0]));
        assert!(!sound.contains('!') && !sound.contains('?'), "{sound}");
        let text = table(&example::awkward());
        assert!(text.contains("ours !") && text.contains("ours-one-lane ?"), "{text}");
        assert!(text.contains("interrupted") && text.contains("\n! not every run"), "{text}");
        assert!(table(&example::nothing()).contains("nothing was measured"));
        for (_, study) in example::all() {
            assert!(!table(&study).contains("NaN"));
        }
    }
}
