//! A file that is not what was saved is refused, or what comes out of it is right all the same.

mod common;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use common::Folder;
use pageferry::transport::TransportError;
use pageferry::{Control, Error, Failed};
use pageferry_conformance::saves::{config, restore, save};
use pageferry_conformance::{Guest, Shelf};
use pageferry_file::FileAcceptor;

/// What a source saved, what its memory held, and over how many lanes.
struct Saved {
    bytes: Vec<u8>,
    content: Vec<u8>,
}

fn saved(lanes: u16) -> &'static Saved {
    static NONE: OnceLock<Saved> = OnceLock::new();
    static TWO: OnceLock<Saved> = OnceLock::new();
    let cell = if lanes == 0 { &NONE } else { &TWO };
    cell.get_or_init(|| {
        let folder = Folder::new(true);
        let mut guest = Guest::new(512, Some(Duration::from_micros(300)));
        save(&folder, &mut guest, config(lanes)).expect("it is saved");
        Saved { bytes: fs::read(folder.file()).expect("it is there"), content: guest.content() }
    })
}

/// Restores some bytes; panics if another guest than the one that was saved comes out. Returns what was said.
fn refusal(folder: &Folder, bytes: &[u8], content: &[u8]) -> Option<String> {
    fs::write(folder.file(), bytes).expect("the folder can be written");
    attempt(folder, content)
}

fn attempt(folder: &Folder, content: &[u8]) -> Option<String> {
    match FileAcceptor::open(folder.file(), folder.restore_options()) {
        Err(error) => Some(error.to_string()),
        Ok(acceptor) => match restore(Arc::new(acceptor), Control::new()) {
            (room, Err(failed)) => {
                assert!(!room.runs, "{failed}");
                assert!(matches!(failed, Failed::SourceStillOwns { .. }), "{failed:?}");
                Some(failed.to_string())
            }
            (room, Ok(_)) => {
                assert!(room.content() == content, "another guest came out");
                None
            }
        },
    }
}

#[test]
fn what_was_saved_comes_out_of_a_copy() {
    let folder = Folder::new(true);
    for lanes in [0, 2] {
        assert_eq!(refusal(&folder, &saved(lanes).bytes, &saved(lanes).content), None);
    }
}

#[test]
fn a_file_that_is_cut_anywhere_is_refused_with_both_lengths() {
    let (folder, saved) = (Folder::new(true), saved(2));
    let len = saved.bytes.len();
    let steps = (0..len).step_by(len / 150 + 1).chain([1, 7, 8, 9, 4095, 4096, 4097, len - 4096, len - 1]);
    for cut in steps {
        let said = refusal(&folder, &saved.bytes[..cut], &saved.content).expect("it is refused");
        match cut {
            ..8 => assert!(said.contains("no saved guest"), "{cut}: {said}"),
            8..4096 => assert!(said.contains(&format!("byte {cut} of 4096")), "{cut}: {said}"),
            _ => assert!(said.contains(&format!("truncated: it ends at byte {cut} of {len}")), "{cut}: {said}"),
        }
    }
    let longer = [&saved.bytes[..], &[0]].concat();
    assert!(refusal(&folder, &longer, &saved.content).expect("it is refused").contains("damaged"));
}

#[test]
fn a_turned_bit_anywhere_is_found() {
    for lanes in [0, 2] {
        let (folder, saved) = (Folder::new(true), saved(lanes));
        fs::write(folder.file(), &saved.bytes).unwrap();
        let file = OpenOptions::new().write(true).open(folder.file()).unwrap();
        let len = saved.bytes.len();
        // All over the file, and every part's first and last bytes, the padding of extents and table among them.
        let spread = (0..240).map(|number: usize| number.wrapping_mul(2_654_435_761) % len);
        for at in spread.chain([0, 8, 13, 16, 57, 4079, 4080, 4095, 4096, 4101, 4112, len - 4096, len - 4080, len - 1])
        {
            let turned = saved.bytes[at] ^ (1 << (at % 8));
            file.write_all_at(&[turned], at as u64).unwrap();
            let said = attempt(&folder, &saved.content).unwrap_or_else(|| panic!("bit in byte {at} was not found"));
            assert!(said.contains("damaged") || said.contains("no saved guest"), "byte {at}: {said}");
            assert!(said.contains(&folder.file().display().to_string()), "byte {at}: {said}");
            file.write_all_at(&saved.bytes[at..=at], at as u64).unwrap();
        }
        assert_eq!(attempt(&folder, &saved.content), None);
    }
}

#[test]
fn what_is_no_saved_guest_is_told_from_one_that_is_damaged() {
    let folder = Folder::new(true);
    let open = |folder: &Folder| match FileAcceptor::open(folder.file(), folder.restore_options()) {
        Err(error @ TransportError::Accept { .. }) => error.to_string(),
        other => panic!("{other:?}"),
    };
    assert!(open(&folder).contains("No such file"));
    fs::write(folder.file(), b"\x7fELF and so on").unwrap();
    assert!(open(&folder).contains("no saved guest"));
    fs::write(folder.file(), b"").unwrap();
    assert!(open(&folder).contains("no saved guest"));
    fs::remove_file(folder.file()).unwrap();
    fs::create_dir(folder.file()).unwrap();
    assert!(open(&folder).contains("no saved guest"));
    fs::remove_dir(folder.file()).unwrap();
}

#[test]
fn a_file_that_is_removed_while_it_is_open_is_restored_all_the_same() {
    let (folder, saved) = (Folder::new(true), saved(2));
    fs::write(folder.file(), &saved.bytes).unwrap();
    let acceptor = folder.acceptor();
    fs::remove_file(folder.file()).unwrap();
    let (room, result) = restore(acceptor, Control::new());
    assert!(result.is_ok() && room.content() == saved.content, "{result:?}");
}

#[test]
fn a_file_that_is_cut_while_it_is_open_is_refused() {
    let (folder, saved) = (Folder::new(true), saved(2));
    fs::write(folder.file(), &saved.bytes).unwrap();
    let acceptor = folder.acceptor();
    File::options().write(true).open(folder.file()).unwrap().set_len(8192).unwrap();
    let (room, result) = restore(acceptor, Control::new());
    let failed = result.expect_err("it is not whole");
    assert!(
        !room.runs && matches!(failed.error(), Error::PeerAborted { .. } | Error::NoSource(_) | Error::Transport(_)),
        "{failed:?}"
    );
}
