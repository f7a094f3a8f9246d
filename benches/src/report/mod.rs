//! Everything that is made from a study: a page with pictures, a picture for a README, comma-separated values, a table.
//!
//! Numbers first (`group`, `verdict`, `outlook`, `answer`), then how they look (`svg`, `charts`, `page`).

mod answer;
mod charts;
mod csv;
pub(crate) mod difference;
pub(crate) mod efficiency;
#[cfg(test)]
pub(crate) mod example;
pub(crate) mod group;
pub(crate) mod kept;
mod markup;
mod outlook;
mod page;
mod reasons;
mod svg;
mod table;
pub(crate) mod verdict;
pub(crate) mod words;

pub(crate) use csv::csv;
pub(crate) use page::page as html;
pub(crate) use table::table;

use crate::study::Study;

/// The picture for a README, as a file.
pub(crate) fn svg(study: &Study) -> String {
    format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n{}", charts::summary(study))
}

#[cfg(test)]
mod tests {
    use super::markup::balanced;
    use super::*;

    /// The text of a page without its tags, without its style.
    fn words_of(page: &str) -> String {
        let body = page.split_once("</style>").map_or(page, |(_, body)| body);
        body.split('<').map(|part| part.split_once('>').map_or(part, |(_, text)| text)).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn pages_of_all_kinds_are_well_formed_and_hold_only_numbers() {
        for (name, study) in example::all() {
            for text in [html(&study), svg(&study).split_once("?>").unwrap().1.to_owned()] {
                assert_eq!(balanced(&text), Ok(()), "{name}");
                for wrong in ["NaN", "inf ", "inf\"", "-inf", "null"] {
                    assert!(!text.contains(wrong), "{name}: {wrong}");
                }
            }
        }
    }

    #[test]
    fn a_page_asks_for_nothing_from_elsewhere() {
        for (name, study) in example::all() {
            let page = html(&study).replace("http://www.w3.org/2000/svg", "");
            for wrong in ["http:", "https:", "url(", "<script", "<link", "@import", "<img"] {
                assert!(!page.contains(wrong), "{name}: {wrong}");
            }
        }
    }

    #[test]
    fn every_run_has_a_row_and_every_loss_its_line() {
        let study = example::full();
        let page = html(&study);
        let rows = page.split("<details>").nth(1).unwrap().matches("<tr").count();
        assert_eq!(rows, study.runs.len() + 1);
        let duels = verdict::duels(&study);
        let losses = verdict::losses(&study, &duels);
        assert!(!losses.is_empty());
        let text = words_of(&page);
        for loss in losses {
            let place = format!("{} over {}, {}", loss.guest, loss.link, loss.quantity.title());
            assert!(text.contains(&place), "{place}");
        }
        assert!(text.contains(&study.remarks[0].text) && text.contains(verdict::NO_REASON));
    }

    #[test]
    fn names_are_escaped_and_trouble_is_said() {
        let text = html(&example::awkward());
        assert!(text.contains("idle &lt;&amp;&quot;quoted&quot;&gt; guest") && !text.contains("<b>bold"));
        for words in ["interrupted", "not verified", "a relay", "failed: the peer said"] {
            assert!(text.contains(words), "{words}");
        }
        assert!(text.contains(" hollow"));
    }

    #[test]
    fn a_run_that_the_host_disturbed_is_marked() {
        let mut study = example::small(&[3.0, 1.0]);
        for (share, marked) in [(None, false), (Some(0.04), false), (Some(0.4), true)] {
            study.runs[1].stolen_share = share;
            let (page, table) = (words_of(&html(&study)), table(&study));
            assert_eq!(
                page.contains("During 1 of 2 runs the host") && page.contains("up to 40 %"),
                marked,
                "{share:?}"
            );
            assert_eq!(table.contains("ours ~") && table.contains("took more than 5 %"), marked, "{share:?}: {table}");
        }
        assert!(csv(&study).contains(",0.4,"));
    }

    #[test]
    fn tables_hold_medians() {
        let study = example::small(&[30.0, 10.0, 20.0]);
        assert!(words_of(&html(&study)).contains("20.0 s over 100 Mbit/s"));
        assert!(html(&study).contains("No QEMU was run beside ours."));
    }

    #[test]
    #[ignore = "draws the examples for people to look at, into PAGEFERRY_EXAMPLES"]
    fn examples_to_look_at() {
        let Some(folder) = std::env::var_os("PAGEFERRY_EXAMPLES").map(std::path::PathBuf::from) else { return };
        for (name, study) in example::all() {
            std::fs::write(folder.join(format!("{name}.html")), html(&study)).unwrap();
            std::fs::write(folder.join(format!("{name}.svg")), svg(&study)).unwrap();
            std::fs::write(folder.join(format!("{name}.csv")), csv(&study)).unwrap();
            std::fs::write(folder.join(format!("{name}.txt")), table(&study)).unwrap();
            std::fs::write(folder.join(format!("{name}.json")), serde_json::to_string(&study).unwrap()).unwrap();
        }
    }
}
