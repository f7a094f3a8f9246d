//! Whatever the host refuses, the guest runs on and there is no file, or it is there complete.

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use common::Folder;
use pageferry::transport::{Dialer, TransportError};
use pageferry::vm::{Step, VmResult};
use pageferry::{Compress, Control, Error, Failed, Source, SourceConfig, SourceVm};
use pageferry_conformance::saves::{config, restore, save};
use pageferry_conformance::{Guest, Shelf};
use pageferry_file::{FileDialer, SaveOptions};

fn say(what: &str) {
    // Not captured: a skip is to be seen.
    drop(std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{what}\n")));
}

fn dialer(path: &Path, overwrite: bool) -> Result<FileDialer, String> {
    let mut options = SaveOptions::default();
    options.overwrite = overwrite;
    FileDialer::new(path, options).map_err(|error: TransportError| error.to_string())
}

fn comes_back(folder: &Folder, guest: &Guest) {
    let (room, result) = restore(folder.acceptor(), Control::new());
    assert!(result.is_ok() && room.content() == guest.content(), "{result:?}");
}

fn uncompressed(lanes: u16) -> SourceConfig {
    let mut config = config(lanes);
    (config.encode.compress, config.encode.duplicates) = (Compress::Off, false);
    config
}

#[test]
fn a_saved_guest_is_this_users_alone() {
    let (folder, mut guest) = (Folder::new(true), Guest::new(256, None));
    save(&folder, &mut guest, config(1)).unwrap();
    assert_eq!(fs::metadata(folder.file()).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn a_file_that_exists_is_kept_unless_it_may_be_replaced() {
    let (folder, mut guest) = (Folder::new(true), Guest::new(256, None));
    fs::write(folder.file(), "precious").unwrap();
    assert!(dialer(&folder.file(), false).unwrap_err().contains("exists already"));
    let dialer = dialer(&folder.file(), true).unwrap();
    assert_eq!(fs::read(folder.file()).unwrap(), b"precious");
    Source::new(config(1)).run(&mut guest, Arc::new(dialer), &Control::new()).unwrap();
    comes_back(&folder, &guest);
}

#[test]
fn folders_that_cannot_be_written_are_named_before_anything_is_tried() {
    assert!(dialer(Path::new("/nowhere/at/all"), false).unwrap_err().contains("/nowhere/at"));
    assert!(dialer(Path::new("/"), false).unwrap_err().contains("names no file"));
    let folder = Folder::new(true);
    fs::set_permissions(&folder.path, Permissions::from_mode(0o500)).unwrap();
    let refused = dialer(&folder.file(), false);
    fs::set_permissions(&folder.path, Permissions::from_mode(0o700)).unwrap();
    match refused {
        Err(error) => assert!(error.contains("Permission denied"), "{error}"),
        Ok(_) => say("skipped: this user may write any folder"),
    }
}

/// A guest in whose way something comes at the last moment: when everything but the name stands.
struct Late<'a> {
    guest: Guest,
    trouble: Box<dyn Fn() + 'a>,
}

impl SourceVm for Late<'_> {
    fn memory(&self) -> Arc<dyn pageferry::memory::GuestMemory> {
        self.guest.memory()
    }
    fn dirty(&mut self) -> &mut dyn pageferry::dirty::DirtySource {
        self.guest.dirty()
    }
    fn describe(&mut self, out: &mut dyn std::io::Write) -> VmResult<()> {
        self.guest.describe(out)
    }
    fn pause(&mut self) -> VmResult<()> {
        self.guest.pause()
    }
    fn resume(&mut self) -> VmResult<()> {
        self.guest.resume()
    }
    fn save(&mut self, out: &mut dyn std::io::Write) -> VmResult<()> {
        self.guest.save(out)
    }
    fn step(&mut self, step: Step) -> VmResult<()> {
        if step == Step::BeforeHandover {
            (self.trouble)();
        }
        Ok(())
    }
}

/// Saves with this trouble just before Commit: the guest must run on, and be told why.
fn late_trouble(folder: &Folder, trouble: impl Fn()) -> String {
    let guest = Guest::new(256, Some(Duration::from_micros(300)));
    let mut late = Late { guest, trouble: Box::new(trouble) };
    let dialer = Arc::new(dialer(&folder.file(), false).unwrap()) as Arc<dyn Dialer>;
    let failed = Source::new(config(1)).run(&mut late, dialer, &Control::new()).expect_err("it cannot have its name");
    assert!(matches!(failed, Failed::SourceStillOwns { error: Error::PeerAborted { .. }, .. }), "{failed:?}");
    assert!(late.guest.runs());
    failed.to_string()
}

#[test]
fn a_name_that_somebody_else_takes_at_the_last_moment_gives_the_guest_back() {
    let folder = Folder::new(true);
    let said = late_trouble(&folder, || fs::write(folder.file(), "faster").unwrap());
    assert!(said.contains("exists already"), "{said}");
    assert_eq!(fs::read(folder.file()).unwrap(), b"faster");
    assert!(folder.is_clean(), "{:?}", folder.files());
}

#[test]
fn a_file_that_is_removed_while_it_is_written_gives_the_guest_back() {
    let folder = Folder::new(true);
    let said = late_trouble(&folder, || {
        for name in folder.files() {
            fs::remove_file(folder.path.join(name)).unwrap();
        }
    });
    assert!(said.contains("removed"), "{said}");
    assert!(folder.files().is_empty());
}

#[test]
fn of_two_saves_to_one_name_one_has_it_and_the_other_guest_runs_on() {
    let folder = Folder::new(true);
    let saving = |(seed, dialer): (u64, Arc<FileDialer>)| {
        std::thread::spawn(move || {
            let mut guest = Guest::new(700 + seed, None);
            let mut slow = uncompressed(1);
            slow.bandwidth = Some(4 << 20);
            let result = Source::new(slow).run(&mut guest, dialer, &Control::new());
            (guest, result)
        })
    };
    // Neither finds the file of the other before it begins.
    let dialers = [0, 1].map(|seed| (seed, Arc::new(dialer(&folder.file(), false).unwrap())));
    let outcomes: Vec<_> = dialers.map(saving).into_iter().map(|thread| thread.join().unwrap()).collect();
    let saved: Vec<_> = outcomes.iter().filter(|(_, result)| result.is_ok()).collect();
    let [(guest, _)] = saved[..] else { panic!("{outcomes:?}") };
    assert_eq!(outcomes.iter().filter(|(guest, _)| guest.runs()).count(), 1, "{outcomes:?}");
    comes_back(&folder, guest);
    assert!(folder.is_clean(), "{:?}", folder.files());
}

#[test]
fn a_guest_that_was_paused_stays_paused_in_the_file() {
    struct Paused(Late<'static>);
    impl SourceVm for Paused {
        fn memory(&self) -> Arc<dyn pageferry::memory::GuestMemory> {
            self.0.memory()
        }
        fn dirty(&mut self) -> &mut dyn pageferry::dirty::DirtySource {
            self.0.dirty()
        }
        fn describe(&mut self, out: &mut dyn std::io::Write) -> VmResult<()> {
            self.0.describe(out)
        }
        fn is_running(&self) -> bool {
            false
        }
        fn pause(&mut self) -> VmResult<()> {
            self.0.pause()
        }
        fn resume(&mut self) -> VmResult<()> {
            panic!("it was paused before")
        }
        fn save(&mut self, out: &mut dyn std::io::Write) -> VmResult<()> {
            self.0.save(out)
        }
    }
    let folder = Folder::new(true);
    let mut guest = Paused(Late { guest: Guest::new(256, None), trouble: Box::new(|| ()) });
    guest.pause().unwrap();
    Source::new(config(1)).run(&mut guest, folder.dialer(), &Control::new()).unwrap();
    let (room, result) = restore(folder.acceptor(), Control::new());
    assert!(result.is_ok() && !room.runs && room.content() == guest.0.guest.content(), "{result:?}");
}

#[test]
fn a_full_disk_leaves_the_guest_running_and_no_file() {
    let folder = Folder::new(true);
    let mount =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=3m", "ferry-file-test"]).arg(&folder.path).status();
    if !mount.is_ok_and(|status| status.success()) {
        return say("skipped: this user may not mount a small filesystem");
    }
    let mut outcomes = Vec::new();
    for lanes in [0, 1, 3] {
        let mut guest = Guest::new(4096, Some(Duration::from_micros(300)));
        let result = save(&folder, &mut guest, uncompressed(lanes));
        outcomes.push((guest.runs(), folder.files(), result.expect_err("16 MiB do not fit into 3").to_string()));
    }
    // And there is room again for one that fits.
    let mut small = Guest::new(256, None);
    let result = save(&folder, &mut small, uncompressed(1));
    let unmounted = Command::new("umount").arg(&folder.path).status();
    assert!(unmounted.is_ok_and(|status| status.success()));
    for (runs, files, said) in outcomes {
        assert!(runs && files.is_empty() && said.contains("No space left"), "{runs} {files:?} {said}");
    }
    assert!(result.is_ok() && !small.runs(), "{result:?}");
}

/// The child: a limit on the length of files counts for its whole process.
#[test]
fn a_file_that_may_not_grow_leaves_the_guest_running_and_no_file() {
    const CHILD: &str = "FERRY_FILE_LIMITED";
    if std::env::var_os(CHILD).is_none() {
        let this = std::env::current_exe().unwrap();
        let name = "a_file_that_may_not_grow_leaves_the_guest_running_and_no_file";
        // Into pipes: this process's own output may be a file that is longer than the limit.
        let child = Command::new(this).args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
        assert!(child.status.success(), "{}", String::from_utf8_lossy(&[child.stdout, child.stderr].concat()));
        return;
    }
    let limit = libc::rlimit { rlim_cur: 2 << 20, rlim_max: 2 << 20 };
    // SAFETY: sets a limit and ignores a signal of this process, which runs this test alone.
    unsafe {
        assert_eq!(libc::setrlimit(libc::RLIMIT_FSIZE, &raw const limit), 0);
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
    for direct in [true, false] {
        let folder = Folder::new(direct);
        let mut guest = Guest::new(4096, Some(Duration::from_micros(300)));
        let failed = save(&folder, &mut guest, uncompressed(1)).expect_err("it does not fit");
        assert!(failed.to_string().contains("File too large"), "{failed}");
        assert!(guest.runs() && folder.files().is_empty(), "{:?}", folder.files());
    }
}
