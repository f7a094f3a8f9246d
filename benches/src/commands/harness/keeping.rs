//! Where a study is kept: after every run, so that no hour of measuring is lost.

use std::path::{Path, PathBuf};

use crate::machine::Machine;
use crate::report::{csv, html, svg};
use crate::study::Study;
use crate::{BenchError, keep};

/// What is added to the name of a study that is not whole, so that it never takes the place of one that is.
const UNFINISHED: &str = "-interrupted";

/// The kinds of files.
const EXTENSIONS: [&str; 4] = ["json", "csv", "html", "svg"];

/// A folder, and what its files are called.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    name: String,
}

impl Folder {
    /// The folder of this machine's class and of today among the project's records, or else the one that was named. Made
    /// if it is not there; an error if nothing can be written to it.
    pub(super) fn new(out: &Path, record: Option<&str>, preset: &str) -> Result<Self, BenchError> {
        let path = match record {
            Some(class) => {
                let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("results");
                results.join(format!("{}-{class}", Machine::here().date))
            }
            None => out.to_owned(),
        };
        let folder = Self { path, name: format!("harness-{preset}") };
        folder.try_out().map_err(|source| BenchError::Write { path: folder.path.clone(), source })?;
        Ok(folder)
    }

    /// Better now than in two hours.
    fn try_out(&self) -> std::io::Result<()> {
        std::fs::create_dir_all(&self.path)?;
        let trial = self.path.join(format!("{}.trial-{}", self.name, std::process::id()));
        std::fs::File::create(&trial)?;
        std::fs::remove_file(&trial)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Where a whole study is kept.
    pub(super) fn files(&self) -> [PathBuf; 4] {
        EXTENSIONS.map(|extension| self.file(extension, false))
    }

    fn file(&self, extension: &str, interrupted: bool) -> PathBuf {
        let besides = if interrupted { UNFINISHED } else { "" };
        self.path.join(format!("{}{besides}.{extension}", self.name))
    }

    /// Keeps the numbers alone.
    pub(super) fn keep(&self, study: &Study) -> Result<(), BenchError> {
        keep::write(&self.file("json", study.interrupted), &(json(study)? + "\n"))
    }

    /// Keeps the numbers and everything that is drawn from them, as much as can be; the first error is the one to tell. A
    /// whole study replaces what was kept of it while it ran.
    pub(super) fn keep_all(&self, study: &Study) -> Result<(), BenchError> {
        let write = |extension: &str, text: &str| keep::write(&self.file(extension, study.interrupted), text);
        let written =
            [self.keep(study), write("csv", &csv(study)), write("html", &html(study)), write("svg", &svg(study))];
        written.into_iter().collect::<Result<(), _>>()?;
        if !study.interrupted {
            for extension in EXTENSIONS {
                // It may not be there.
                let _ = std::fs::remove_file(self.file(extension, true));
            }
        }
        Ok(())
    }
}

fn json(study: &Study) -> Result<String, BenchError> {
    serde_json::to_string(study).map_err(|error| BenchError::Tool(format!("the study cannot be written: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::example;
    use crate::scratch::Scratch;

    #[test]
    fn what_was_interrupted_never_takes_the_place_of_what_was_not() {
        let scratch = Scratch::new().unwrap();
        let folder = Folder::new(&scratch.file("kept"), None, "quick").unwrap();
        let names = || {
            let entries = std::fs::read_dir(folder.path()).unwrap().flatten();
            let mut names: Vec<String> =
                entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
            names.sort();
            names
        };
        let whole = ["harness-quick.csv", "harness-quick.html", "harness-quick.json", "harness-quick.svg"];
        let mut study = example::small(&[1.0]);
        folder.keep_all(&study).unwrap();
        let kept = std::fs::read(&folder.files()[0]).unwrap();
        study.interrupted = true;
        folder.keep(&study).unwrap();
        assert_eq!((names().len(), std::fs::read(&folder.files()[0]).unwrap()), (5, kept));
        folder.keep_all(&study).unwrap();
        assert_eq!(names().len(), 8);
        study.interrupted = false;
        folder.keep_all(&study).unwrap();
        assert_eq!(names(), whole);
    }

    #[test]
    fn a_folder_that_takes_no_file_is_refused_at_once() {
        let said = Folder::new(Path::new("/proc"), None, "quick").unwrap_err().to_string();
        assert!(said.starts_with("cannot write /proc: "), "{said}");
    }
}
