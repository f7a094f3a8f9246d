//! Where a study is kept: after every run, so that no hour of measuring is lost.

use std::path::{Path, PathBuf};

use crate::machine::Machine;
use crate::report::{csv, html, svg};
use crate::study::Study;
use crate::{BenchError, keep};

/// A folder, and what its files are called.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    name: String,
}

impl Folder {
    /// The folder of this machine's class and of today among the project's records, or else the one that was named. Made
    /// if it is not there.
    pub(super) fn new(out: &Path, record: Option<&str>, preset: &str) -> Result<Self, BenchError> {
        let path = match record {
            Some(class) => {
                let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
                results.join(format!("{}-{class}", Machine::here().date))
            }
            None => out.to_owned(),
        };
        std::fs::create_dir_all(&path).map_err(|source| BenchError::Write { path: path.clone(), source })?;
        Ok(Self { path, name: format!("harness-{preset}") })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn files(&self) -> [PathBuf; 4] {
        ["json", "csv", "html", "svg"].map(|extension| self.file(extension))
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.path.join(format!("{}.{extension}", self.name))
    }

    /// Keeps the numbers alone.
    pub(super) fn keep(&self, study: &Study) -> Result<(), BenchError> {
        keep::write(&self.file("json"), &(json(study)? + "\n"))
    }

    /// Keeps the numbers and everything that is drawn from them.
    pub(super) fn keep_all(&self, study: &Study) -> Result<(), BenchError> {
        self.keep(study)?;
        keep::write(&self.file("csv"), &csv(study))?;
        keep::write(&self.file("html"), &html(study))?;
        keep::write(&self.file("svg"), &svg(study))
    }
}

fn json(study: &Study) -> Result<String, BenchError> {
    serde_json::to_string(study).map_err(|error| BenchError::Tool(format!("the study cannot be written: {error}")))
}
