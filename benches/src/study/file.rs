//! Studies as files.

use std::path::Path;

use serde_json::Value;

use super::{FORMAT, Remark, Study};
use crate::BenchError;

/// What replaces `json` in the name of a study's remarks.
const REMARKS: &str = "remarks.json";

/// Reads a study, and refuses what is none, or one of another form. Why ours is behind stands in a file beside it, if
/// somebody has looked into it: `harness-paper.remarks.json` for `harness-paper.json`, a list of objects with `link`, `guest`,
/// `quantity`, `text`, and `against` if it is true of one opponent alone.
pub(crate) fn read(path: &Path) -> Result<Study, BenchError> {
    let mut study = parse(&value(path)?).map_err(|reason| refused(path, &reason))?;
    let beside = path.with_extension(REMARKS);
    if beside.exists() {
        let remarks: Vec<Remark> = serde_json::from_value(value(&beside)?)
            .map_err(|error| BenchError::Tool(format!("{} holds no remarks: {error}", beside.display())))?;
        study.remarks.extend(remarks);
    }
    Ok(study)
}

/// Whether a file is named as remarks beside a study are.
pub(crate) fn holds_remarks(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().ends_with(&format!(".{REMARKS}")))
}

/// Reads a file of JSON.
pub(crate) fn value(path: &Path) -> Result<Value, BenchError> {
    let text = std::fs::read(path).map_err(|source| BenchError::File { path: path.to_owned(), source })?;
    serde_json::from_slice(&text).map_err(|error| refused(path, &format!("no JSON: {error}")))
}

/// Takes what was read from this file for a study.
pub(crate) fn from_value(path: &Path, value: &Value) -> Result<Study, BenchError> {
    parse(value).map_err(|reason| refused(path, &reason))
}

fn refused(path: &Path, reason: &str) -> BenchError {
    BenchError::Tool(format!("{} is no study that can be read: {reason}", path.display()))
}

fn parse(value: &Value) -> Result<Study, String> {
    match value.get("format").and_then(Value::as_u64) {
        None if value.get("series").is_some() => {
            return Err("it is a record of single benchmarks; `compare` reads those".to_owned());
        }
        None => return Err("it does not say which form it has".to_owned()),
        Some(format) if format != u64::from(FORMAT) => {
            return Err(format!("it has form {format}, and this program reads form {FORMAT}"));
        }
        Some(_) => {}
    }
    let study: Study = serde::Deserialize::deserialize(value).map_err(|error: serde_json::Error| error.to_string())?;
    check(&study)?;
    Ok(study)
}

/// Every run must be of something that is described, or its numbers would be lost from tables.
fn check(study: &Study) -> Result<(), String> {
    for run in &study.runs {
        let lacks = |what: &str, name: &str, known: bool| {
            if known { Ok(()) } else { Err(format!("a run is of the {what} {name:?}, which is not described")) }
        };
        lacks("link", &run.link, study.links.iter().any(|link| link.name == run.link))?;
        lacks("guest", &run.guest, study.guests.iter().any(|guest| guest.name == run.guest))?;
        lacks("mover", &run.mover, study.movers.iter().any(|mover| mover.name == run.mover))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::report::example;

    #[test]
    fn what_was_kept_is_read_back() {
        for (name, study) in example::all() {
            let value = serde_json::to_value(&study).unwrap();
            let read = parse(&value).unwrap_or_else(|reason| panic!("{name}: {reason}"));
            assert_eq!(serde_json::to_value(read).unwrap(), value, "{name}");
        }
    }

    #[test]
    fn a_load_that_nobody_knows_is_read_back() {
        let mut study = example::alone();
        study.machine.load_before = f64::NAN;
        assert!(parse(&serde_json::to_value(&study).unwrap()).unwrap().machine.load_before.is_nan());
    }

    #[test]
    fn remarks_stand_in_a_file_beside_a_study() {
        let scratch = crate::scratch::Scratch::new().unwrap();
        let (study, remarks) = (scratch.file("harness-x.json"), scratch.file("harness-x.remarks.json"));
        std::fs::write(&study, serde_json::to_string(&example::alone()).unwrap()).unwrap();
        let before = read(&study).unwrap().remarks.len();
        let text = r#"[{"link": "1gbit", "guest": "idle", "quantity": "cpu", "text": "it packs"}]"#;
        std::fs::write(&remarks, text).unwrap();
        assert_eq!(read(&study).unwrap().remarks[before].text, "it packs");
        std::fs::write(&remarks, "[1]").unwrap();
        let said = read(&study).unwrap_err().to_string();
        assert!(said.contains("harness-x.remarks.json holds no remarks"), "{said}");
    }

    #[test]
    fn other_files_are_refused_in_words() {
        let mut other = serde_json::to_value(example::alone()).unwrap();
        other["format"] = json!(FORMAT + 1);
        assert!(parse(&other).unwrap_err().contains("reads form"));
        assert!(parse(&json!({"series": []})).unwrap_err().contains("compare"));
        assert!(parse(&json!([1, 2])).unwrap_err().contains("which form"));
        assert!(parse(&json!({ "format": FORMAT })).unwrap_err().contains("missing field"));
        let mut study = example::alone();
        study.runs[0].mover = "nobody".to_owned();
        assert!(parse(&serde_json::to_value(study).unwrap()).unwrap_err().contains("\"nobody\""));
    }
}
