//! `migrate export`: what the built-in guest is made of, as files, so that other machines can run the very same guest.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::cli::{ExitStatus, ExportOptions, ExportWhat, units::show_bytes};
use crate::payload;
use crate::workload::content::{Content, Kind};
use crate::workload::page::PAGE_BYTES;

/// Pages written at a time: neighbours that share a kind, so that zero pages become holes.
const CHUNK_PAGES: u64 = 16;

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
enum ExportError {
    /// The host did not take it.
    #[error("cannot write {}: {source}", path.display())]
    Unwritable { path: PathBuf, source: io::Error },
    /// Part of a page.
    #[error("--memory {}: a guest has whole pages of 4 KiB", show_bytes(*.0))]
    PartialPage(u64),
}

/// Runs the command.
pub(super) fn export(options: &ExportOptions) -> ExitStatus {
    match try_export(options) {
        Ok(told) => {
            println!("{told}");
            ExitStatus::Completed
        }
        Err(error) => {
            eprintln!("migrate: {error}");
            ExitStatus::SetUp
        }
    }
}

fn try_export(options: &ExportOptions) -> Result<String, ExportError> {
    let (path, params, memory) = (&options.file, options.guest.params(), options.guest.memory());
    if !memory.is_multiple_of(PAGE_BYTES as u64) {
        return Err(ExportError::PartialPage(memory));
    }
    let written = match options.what {
        ExportWhat::Program => std::fs::write(path, payload::IMAGE).map(|()| params.to_string()),
        ExportWhat::Memory => {
            let pages = memory / PAGE_BYTES as u64;
            write_memory(path, &params.content(), pages).map(|()| format!("{}, {params}", show_bytes(memory)))
        }
    };
    written.map_err(|source| ExportError::Unwritable { path: path.clone(), source })
}

/// Every page as it is when a guest has just been filled; zero pages are holes.
fn write_memory(path: &Path, content: &Content, pages: u64) -> io::Result<()> {
    let file = File::create(path)?;
    file.set_len(pages * PAGE_BYTES as u64)?;
    let mut bytes = Vec::with_capacity(CHUNK_PAGES as usize * PAGE_BYTES);
    for first in (0..pages).step_by(CHUNK_PAGES as usize) {
        let chunk = first..pages.min(first + CHUNK_PAGES);
        if chunk.clone().all(|page| content.kind(page) == Kind::Zero) {
            continue;
        }
        bytes.clear();
        for page in chunk {
            bytes.extend(content.expected(page, 0).0.iter().flat_map(|word| word.to_le_bytes()));
        }
        file.write_all_at(&bytes, first * PAGE_BYTES as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::params::Params;

    #[test]
    fn the_file_holds_every_page_of_a_fresh_guest() {
        let path = std::env::temp_dir().join(format!("migrate-export-{}", std::process::id()));
        let (content, pages) = (Params::default().content(), 1000);
        write_memory(&path, &content, pages).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(bytes.len(), pages as usize * PAGE_BYTES);
        for (page, found) in (0..).zip(bytes.chunks_exact(PAGE_BYTES)) {
            let expected: Vec<u8> = content.expected(page, 0).0.iter().flat_map(|word| word.to_le_bytes()).collect();
            assert!(found == expected, "page {page} differs");
        }
    }
}
