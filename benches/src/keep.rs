//! Files that are there as a whole or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::BenchError;

/// Writes a file by way of another beside it, so that a full disk leaves what was there before. What is no regular file,
/// such as a pipe, is written to as it is.
pub(crate) fn write(path: &Path, text: &str) -> Result<(), BenchError> {
    let written =
        if path.metadata().is_ok_and(|found| !found.is_file()) { fs::write(path, text) } else { replace(path, text) };
    written.map_err(|source| BenchError::Write { path: path.to_owned(), source })
}

fn replace(path: &Path, text: &str) -> io::Result<()> {
    let beside = beside(path);
    let done = fs::write(&beside, text).and_then(|()| fs::rename(&beside, path));
    if done.is_err() {
        // It may not be there, and the first error is the one to tell.
        let _ = fs::remove_file(&beside);
    }
    done
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".unfinished-{}", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_a_full_disk_is_told() {
        let folder = std::env::temp_dir().join(format!("pageferry-keep-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let path = folder.join("report.html");
        write(&path, "old").unwrap();
        write(&path, "new").unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "new");
        assert_eq!(fs::read_dir(&folder).unwrap().count(), 1);
        let lost = write(&folder.join("no/such/folder"), "x").unwrap_err().to_string();
        assert!(lost.starts_with("cannot write ") && lost.contains("no/such/folder"), "{lost}");
        fs::remove_dir_all(&folder).unwrap();
        let full = write(Path::new("/dev/full"), "x").unwrap_err().to_string();
        assert!(full.starts_with("cannot write /dev/full: "), "{full}");
    }
}
