//! What was kept of measurements, whichever kind: studies, records of single benchmarks, folders of both.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::BenchError;
use crate::study::{Study, file};

use super::difference::{Measurement, Series};
use super::group::{Group, Quantity, Sample, cell, cells, is_disturbed};
use super::words;

/// Facts that differ between any two measurements and explain nothing.
const EPHEMERAL: [&str; 2] = ["date", "load_before"];

/// Reads a file, or every file of a folder whose name ends in `.json`; remarks belong to the study that they stand beside.
pub(crate) fn measurement(path: &Path) -> Result<Measurement, BenchError> {
    let mut found = gather(path)?;
    tell_apart(&mut found.series);
    Ok(found)
}

/// Numbers what has the name of something before it, as the series of guests of several sizes have in one record: the first of
/// them would be compared with all otherwise.
fn tell_apart(series: &mut [Series]) {
    let mut seen = BTreeMap::<(String, String), usize>::new();
    for series in series {
        let times = seen.entry((series.name.clone(), series.unit.clone())).or_default();
        *times += 1;
        if *times > 1 {
            series.name = format!("{} ({times})", series.name);
        }
    }
}

fn gather(path: &Path) -> Result<Measurement, BenchError> {
    if !path.is_dir() {
        let value = file::value(path)?;
        return read(path, &value, "");
    }
    let mut all = Measurement::default();
    let mut parts: Vec<(PathBuf, Value)> = Vec::new();
    for part in files(path)? {
        match file::value(&part) {
            Ok(value) if value["interrupted"] == true => {
                all.skipped.push(format!("{} was interrupted: name it to have it read", part.display()));
            }
            Ok(value) => parts.push((part, value)),
            Err(error) => all.skipped.push(error.to_string()),
        }
    }
    let several = parts.iter().filter(|(_, value)| is_study(value)).count() > 1;
    for (part, value) in &parts {
        let preset = value.get("preset").and_then(Value::as_str).filter(|_| several);
        let prefix = preset.map_or_else(String::new, |preset| format!("{preset}: "));
        match read(part, value, &prefix) {
            Ok(found) => all.add(found),
            Err(error) => all.skipped.push(error.to_string()),
        }
    }
    if all.series.is_empty() {
        return Err(BenchError::Tool(format!("{} holds no measurement", path.display())));
    }
    Ok(all)
}

fn files(folder: &Path) -> Result<Vec<PathBuf>, BenchError> {
    let entries = std::fs::read_dir(folder).map_err(|source| BenchError::File { path: folder.to_owned(), source })?;
    let paths = entries.flatten().map(|entry| entry.path());
    let measured = |path: &PathBuf| path.extension().is_some_and(|end| end == "json") && !file::holds_remarks(path);
    let mut found: Vec<PathBuf> = paths.filter(measured).collect();
    found.sort();
    Ok(found)
}

fn is_study(value: &Value) -> bool {
    value.get("runs").is_some() || value.get("format").is_some()
}

fn read(path: &Path, value: &Value, prefix: &str) -> Result<Measurement, BenchError> {
    if is_study(value) {
        return Ok(of_study(&file::from_value(path, value)?, value, prefix));
    }
    of_record(value).ok_or_else(|| BenchError::Tool(format!("{} is neither a study nor a record", path.display())))
}

impl Measurement {
    fn add(&mut self, other: Self) {
        for (name, value) in other.facts {
            if self.facts.iter().all(|(found, _)| *found != name) {
                self.facts.push((name, value));
            }
        }
        self.series.extend(other.series);
        self.standings.extend(other.standings);
    }
}

fn machine(value: &Value) -> Vec<(String, String)> {
    let facts = value.get("machine").and_then(Value::as_object).into_iter().flatten();
    let lasting = facts.filter(|(name, _)| !EPHEMERAL.contains(&name.as_str()));
    lasting.map(|(name, value)| (name.replace('_', " "), plain(value))).collect()
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn of_study(study: &Study, value: &Value, prefix: &str) -> Measurement {
    let mut facts = machine(value);
    for mover in &study.movers {
        facts.push((format!("version of {}", mover.name), mover.version.clone()));
        facts.push((format!("settings of {}", mover.name), mover.settings.clone()));
    }
    let disturbed = study.runs.iter().filter(|run| is_disturbed(run)).count();
    facts.push(("runs that the host disturbed".to_owned(), format!("{disturbed} of {}", study.runs.len())));
    for link in &study.links {
        facts.push((format!("{}: shaped by", link.name), words::shaper(link.shaper).to_owned()));
    }
    for guest in &study.guests {
        facts.push((format!("{}: guest", guest.name), format!("{}; {}", words::guest(guest), guest.content)));
    }
    let copies = study.links.iter().map(|link| Series {
        name: format!("{prefix}{}: a plain copy", link.name),
        unit: "B/s".to_owned(),
        sample: Sample::new(link.goodputs.iter().copied()),
        less_is_better: Some(false),
        disturbed: 0,
    });
    let groups: Vec<Group<'_>> = cells(study).flat_map(|(link, guest)| cell(study, link, guest)).collect();
    let name = |group: &Group<'_>| format!("{prefix}{} {} {}", group.link.name, group.guest.name, group.mover.name);
    let values = groups.iter().filter(|group| group.standing.completed > 0).flat_map(|group| {
        Quantity::ALL.map(|quantity| Series {
            name: format!("{}: {}", name(group), quantity.title()),
            unit: quantity.unit().to_owned(),
            sample: group.sample(quantity),
            less_is_better: Some(true),
            disturbed: group.disturbed(),
        })
    });
    let series = copies.chain(values).filter(|series| !series.sample.is_empty()).collect();
    let standings = groups.iter().map(|group| (name(group), group.standing)).collect();
    Measurement { facts, series, standings, skipped: Vec::new() }
}

/// A record as `--record` writes it; nothing if it is none.
fn of_record(value: &Value) -> Option<Measurement> {
    let benchmark = value.get("benchmark")?.as_str()?;
    let series = value.get("series")?.as_array()?.iter().filter_map(|series| {
        let values = series.get("values")?.as_array()?.iter().filter_map(Value::as_f64);
        Some(Series {
            name: format!("{benchmark}: {}", series.get("name")?.as_str()?),
            unit: series.get("unit").and_then(Value::as_str).unwrap_or_default().to_owned(),
            sample: Sample::new(values),
            less_is_better: None,
            disturbed: 0,
        })
    });
    Some(Measurement { facts: machine(value), series: series.collect(), ..Measurement::default() })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::difference::{Difference, Noise};
    use super::super::example;
    use super::*;
    use crate::study::End;

    fn measured(study: &Study) -> Measurement {
        of_study(study, &serde_json::to_value(study).unwrap(), "")
    }

    #[test]
    fn a_study_that_got_slower_is_told_from_one_that_did_not() {
        let before = example::full();
        let mut after = before.clone();
        let slower = |run: &crate::study::Run| (run.link.as_str(), run.mover.as_str()) == ("1gbit", "ours");
        after.runs.iter_mut().filter(|run| slower(run)).for_each(|run| run.seconds *= 2.0);
        after.machine.kernel = "7.0.0".to_owned();
        let (before, after) = (measured(&before), measured(&after));
        let difference = Difference::new(&before, &after);
        assert_eq!(difference.facts, [("kernel", "6.18.0", "7.0.0")]);
        let beyond: Vec<_> = difference.changes.iter().filter(|change| change.noise == Noise::Beyond).collect();
        assert_eq!(beyond.len(), example::full().guests.len());
        for change in beyond {
            assert!(change.name.starts_with("1gbit ") && change.name.ends_with(" ours: total time"), "{}", change.name);
            assert!((change.ratio - 2.0).abs() < 1e-9 && change.better == Some(false));
        }
    }

    #[test]
    fn what_never_finished_has_no_values_but_a_standing() {
        let mut study = example::alone();
        study.runs[0].end = End::GivenUp;
        let found = measured(&study);
        assert_eq!((found.series.len(), found.standings.len()), (1, 1));
    }

    #[test]
    fn what_the_host_disturbed_is_told_of_the_changes_that_it_concerns() {
        let (mut before, mut after) = (example::full(), example::full());
        let slow = |study: &mut Study| {
            let run = study.runs.iter_mut().find(|run| (run.link.as_str(), run.mover.as_str()) == ("1gbit", "ours"));
            run.unwrap().stolen_share = Some(0.4);
        };
        slow(&mut after);
        before.machine.kvm = Some(true);
        after.machine.kvm = Some(false);
        let (before, after) = (measured(&before), measured(&after));
        let difference = Difference::new(&before, &after);
        assert!(difference.facts.contains(&("kvm", "true", "false")), "{:?}", difference.facts);
        let concerned: Vec<_> = difference.changes.iter().filter(|change| change.disturbed != [0, 0]).collect();
        assert!(!concerned.is_empty() && concerned.len() < difference.changes.len());
        for change in concerned {
            assert!(change.name.starts_with("1gbit ") && change.name.contains(" ours: "), "{}", change.name);
            assert_eq!(change.disturbed, [0, 1]);
        }
    }

    #[test]
    fn records_of_benchmarks_are_read() {
        let record = json!({
            "benchmark": "zero",
            "machine": {"cpu": "a", "date": "2026-01-01", "cpus": 2},
            "series": [{"name": "time", "unit": "s", "median": 2.0, "values": [1.0, 2.0, null]}],
        });
        let found = of_record(&record).unwrap();
        assert_eq!((found.series[0].name.as_str(), found.series[0].sample.len()), ("zero: time", 2));
        assert_eq!(found.facts.len(), 2);
        assert!(of_record(&json!({"series": []})).is_none());
    }

    #[test]
    fn remarks_in_a_folder_are_no_measurement_that_was_skipped() {
        let scratch = crate::scratch::Scratch::new().unwrap();
        let study = scratch.file("harness-x.json");
        std::fs::write(&study, serde_json::to_string(&example::alone()).unwrap()).unwrap();
        std::fs::write(scratch.file("harness-x.remarks.json"), "[]").unwrap();
        std::fs::write(scratch.file("other.json"), "[]").unwrap();
        let found = measurement(study.parent().unwrap()).unwrap();
        assert_eq!(found.series.len(), measurement(&study).unwrap().series.len());
        assert!(found.skipped.len() == 1 && found.skipped[0].contains("other.json"), "{:?}", found.skipped);
        let interrupted = Study { interrupted: true, ..example::alone() };
        std::fs::write(scratch.file("harness-y.json"), serde_json::to_string(&interrupted).unwrap()).unwrap();
        let again = measurement(study.parent().unwrap()).unwrap();
        assert!(again.series.len() == found.series.len() && again.skipped[0].contains("harness-y.json"));
    }

    #[test]
    fn a_folder_of_records_is_one_measurement() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("results/2026-11-22-2cpu-xeon");
        let found = measurement(&folder).unwrap();
        assert!(found.series.len() > 50 && found.skipped.is_empty(), "{:?}", found.skipped);
        let with_itself = Difference::new(&found, &found);
        assert!(with_itself.changes.len() == found.series.len() && with_itself.count(Noise::Beyond) == 0);
        for change in with_itself.changes {
            assert!((change.ratio - 1.0).abs() < 1e-9, "{}: {}", change.name, change.ratio);
        }
        assert!(measurement(&folder.join("no-such-file.json")).is_err());
        assert!(measurement(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src")).is_err());
    }
}
