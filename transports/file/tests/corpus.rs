//! The fuzzer's corpus, run as an ordinary test: nothing in it panics, on any toolchain.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::Folder;
use pageferry::wire::{HEADER_LEN, Header};
use pageferry_conformance::Guest;
use pageferry_conformance::saves::{config, save};

#[path = "../fuzz/src/restore.rs"]
mod restore;

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/saved")
}

#[test]
fn files_of_the_corpus_are_restored_or_refused() {
    let files: Vec<_> = fs::read_dir(corpus()).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(files.len() >= 10, "{} files in {}", files.len(), corpus().display());
    for file in files {
        let whole = file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("whole"));
        // Those that are restored need no time, but a busy machine may.
        let patience = if whole { Duration::from_secs(20) } else { restore::SHORT };
        let restored = restore::saved(&fs::read(&file).unwrap(), patience);
        assert_eq!(restored, whole, "{}", file.display());
    }
}

/// Writes inputs for the fuzzer to start from: `cargo test -p pageferry-file --test corpus -- --ignored`.
#[test]
#[ignore = "writes files"]
fn write_seeds() {
    fs::create_dir_all(corpus()).unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(corpus().join(name), bytes).unwrap();
    for lanes in 0..3u8 {
        let folder = Folder::new(false);
        save(&folder, &mut Guest::new(4, None), config(lanes.into())).unwrap();
        let file = fs::read(folder.file()).unwrap();
        let pieces = pieces_of(&file);
        write(&format!("whole-{lanes}"), &[&[lanes], &pieces.concat()[..]].concat());
        if lanes == 1 {
            write("whole-file", &[&[restore::WHOLE_FILE], &file[..]].concat());
            write("cut-file", &[&[restore::WHOLE_FILE], &file[..file.len() - 5000]].concat());
        }
        write(&format!("late-{lanes}"), &[&[lanes], &pieces[1..].concat()[..]].concat());
        write(&format!("short-{lanes}"), &[&[lanes], &pieces[..pieces.len() - 1].concat()[..]].concat());
        let twice = [&pieces[..2], &pieces[..]].concat();
        write(&format!("twice-{lanes}"), &[&[lanes], &twice.concat()[..]].concat());
    }
    // Bodies that the target seals itself: an offer of nothing, and the end at once.
    write("sealed", &[0, 0, 0, 0, 40, 0].iter().copied().chain([0; 40]).collect::<Vec<_>>());
}

/// The frames of a file, as the target takes them.
fn pieces_of(file: &[u8]) -> Vec<Vec<u8>> {
    let number = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let (table, count, mut at) = (number(24), number(32), 4096);
    let mut pieces = Vec::new();
    for entry in file[table..].chunks(24).take(count) {
        let len = u32::from_le_bytes(entry[..4].try_into().unwrap()) as usize;
        let mut left = &file[at..at + len];
        at += len.next_multiple_of(4096);
        while let Some(header) = left.get(..HEADER_LEN) {
            let frame_len = HEADER_LEN + Header::decode(header).unwrap().body_len as usize;
            let size = u16::try_from(frame_len).unwrap().to_le_bytes();
            let head = [entry[4], restore::AS_IT_IS, 0, size[0], size[1]];
            pieces.push([&head, &left[..frame_len]].concat());
            left = &left[frame_len..];
        }
    }
    pieces
}
