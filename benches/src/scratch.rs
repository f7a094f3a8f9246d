//! A folder for the time of a run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{BenchError, host};

/// Every folder's name starts with this, followed by the number of the process that made it and by something that nobody
/// else has.
const PREFIX: &str = "pageferry-bench-";

/// The folder. Dropping it removes it with all that is in it.
#[derive(Debug)]
pub(crate) struct Scratch(TempDir);

impl Scratch {
    /// A new one, where temporary files belong, for this user alone: certificates' keys may lie in it. Folders of processes that
    /// were killed are removed first.
    pub(crate) fn new() -> Result<Self, BenchError> {
        remove_orphans();
        let (prefix, ours_alone) = (format!("{PREFIX}{}-", std::process::id()), fs::Permissions::from_mode(0o700));
        let folder = tempfile::Builder::new().prefix(&prefix).permissions(ours_alone).tempdir();
        folder.map(Self).map_err(host("cannot make a folder for temporary files"))
    }

    /// A file in it, which need not exist.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file in it that does not exist.
    pub(crate) fn fresh(&self, name: &str) -> PathBuf {
        let path = self.file(name);
        // It may not have been there.
        let _ = fs::remove_file(&path);
        path
    }

    /// A file in it that is made once: by `make`, if there is none of this name.
    pub(crate) fn once(
        &self,
        name: &str,
        make: impl FnOnce(&Path) -> Result<(), BenchError>,
    ) -> Result<PathBuf, BenchError> {
        let (path, unfinished) = (self.file(name), self.fresh("unfinished"));
        if !path.exists() {
            make(&unfinished)?;
            fs::rename(&unfinished, &path).map_err(host("cannot rename a temporary file"))?;
        }
        Ok(path)
    }
}

fn remove_orphans() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let maker = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        if maker.is_some_and(|maker| !Path::new(&format!("/proc/{maker}")).exists()) {
            // Another user's stay.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_of_one_process_have_nothing_to_do_with_each_other() {
        let (first, second) = (Scratch::new().unwrap(), Scratch::new().unwrap());
        fs::write(first.file("a"), "first").unwrap();
        assert!(!second.file("a").exists());
        drop(second);
        assert_eq!(fs::read_to_string(first.file("a")).unwrap(), "first");
    }

    #[test]
    fn folders_of_processes_that_are_gone_are_removed_and_no_others() {
        let mut gone = std::process::Command::new("true").spawn().unwrap();
        gone.wait().unwrap();
        let orphan = tempfile::Builder::new().prefix(&format!("{PREFIX}{}-", gone.id())).tempdir().unwrap();
        let strange = tempfile::Builder::new().prefix(&format!("{PREFIX}of-")).tempdir().unwrap();
        let mine = Scratch::new().unwrap();
        assert!(!orphan.path().exists() && strange.path().exists() && mine.file("").exists());
    }

    #[test]
    fn files_are_made_once_and_only_whole() {
        let scratch = Scratch::new().unwrap();
        let half = |path: &Path| {
            fs::write(path, "half").unwrap();
            Err(BenchError::Interrupted)
        };
        assert!(scratch.once("a", half).is_err());
        let whole = scratch.once("a", |path| fs::write(path, "whole").map_err(host("cannot write"))).unwrap();
        assert_eq!(fs::read_to_string(scratch.once("a", |_| unreachable!()).unwrap()).unwrap(), "whole");
        drop(scratch);
        assert!(!whole.exists());
    }
}
