//! The file while it is being written: under a name of its own, in the folder of the final one.
//!
//! Its writer holds a lock on it. One that nobody holds was left behind by a process that was killed, and the next to save
//! under the same name removes it.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use rustix::io::Errno;

use crate::error::FileFailure;

/// How the names of unfinished files end.
const SUFFIX: &str = ".saving";

/// Bytes of the final name that the other begins with: leaves room for the rest in a name of 255.
const MAX_STEM: usize = 200;

/// Where a guest is to be saved.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    pub(crate) path: PathBuf,
    pub(crate) overwrite: bool,
    folder: PathBuf,
    name: OsString,
}

impl Target {
    /// Takes a path apart.
    pub(crate) fn new(path: PathBuf, overwrite: bool) -> Result<Self, FileFailure> {
        let ends_in_slash = path.as_os_str().as_bytes().ends_with(b"/");
        let Some(name) = path.file_name().filter(|_| !ends_in_slash).map(OsStr::to_owned) else {
            return Err(FileFailure::NoName { path });
        };
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        Ok(Self { path, overwrite, folder, name })
    }

    /// Whether the guest could be saved here, as far as one can tell without writing.
    pub(crate) fn check(&self) -> Result<(), FileFailure> {
        match fs::symlink_metadata(&self.path) {
            Ok(found) if !self.overwrite || found.is_dir() => Err(FileFailure::Exists { path: self.path.clone() }),
            _ => {
                use rustix::fs::{Access, access};
                let allowed = fs::read_dir(&self.folder)
                    .and_then(|_| Ok(access(&self.folder, Access::WRITE_OK | Access::EXEC_OK)?));
                allowed.map_err(|source| FileFailure::Folder { folder: self.folder.clone(), source })
            }
        }
    }

    /// Makes an empty file under a name of its own, for this user only.
    pub(crate) fn begin(&self) -> Result<(Partial, File), FileFailure> {
        self.check()?;
        self.remove_stale();
        let failed = |source| FileFailure::Folder { folder: self.folder.clone(), source };
        loop {
            let mut random = [0; 8];
            getrandom::fill(&mut random).map_err(|error| failed(io::Error::other(error)))?;
            let mut name = self.stem();
            name.push(format!("{:016x}{SUFFIX}", u64::from_le_bytes(random)));
            let path = self.folder.join(name);
            let made = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path);
            let file = match made {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed(error)),
            };
            // Somebody who looks for files left behind may have been faster: then it is gone.
            if flock(&file, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
                continue;
            }
            let identity = identity(&file.metadata().map_err(failed)?);
            let partial = Partial { target: self.clone(), path, identity, there: true };
            if partial.is_ours(&partial.path) {
                return Ok((partial, file));
            }
        }
    }

    fn stem(&self) -> OsString {
        let name = self.name.as_bytes();
        let mut stem = OsString::from(".");
        stem.push(OsStr::from_bytes(&name[..name.len().min(MAX_STEM)]));
        stem.push(".");
        stem
    }

    /// Removes what killed processes have left under this name. What cannot be removed disturbs nobody.
    fn remove_stale(&self) {
        let (stem, Ok(entries)) = (self.stem(), fs::read_dir(&self.folder)) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let middle = name.as_bytes().strip_prefix(stem.as_bytes());
            let middle = middle.and_then(|rest| rest.strip_suffix(SUFFIX.as_bytes()));
            let ours = middle.is_some_and(|random| random.len() == 16 && random.iter().all(u8::is_ascii_hexdigit));
            if !ours || !entry.file_type().is_ok_and(|kind| kind.is_file()) {
                continue;
            }
            let path = entry.path();
            let Ok(file) = File::open(&path) else { continue };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = fs::remove_file(&path);
            }
        }
    }
}

/// Device and inode: what is under a name later may be another file.
type Identity = (u64, u64);

fn identity(found: &fs::Metadata) -> Identity {
    (found.dev(), found.ino())
}

/// A file that is being written; gone when this is dropped, unless it was published.
#[derive(Debug)]
pub(crate) struct Partial {
    target: Target,
    path: PathBuf,
    identity: Identity,
    there: bool,
}

impl Partial {
    /// The name it has meanwhile.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is still there and the final name still to be had.
    pub(crate) fn check(&self) -> Result<(), FileFailure> {
        self.target.check()?;
        if self.there && self.is_ours(&self.path) {
            return Ok(());
        }
        Err(FileFailure::Removed { path: self.path.clone() })
    }

    /// Gives it its final name, for good. After an error there is no file under that name, unless one was there before (which is
    /// lost only if it was to be replaced, and the folder could not be written to the disk afterwards).
    pub(crate) fn publish(&mut self) -> Result<(), FileFailure> {
        self.check()?;
        let failed = |source| FileFailure::Write { path: self.target.path.clone(), source };
        // Before the name can change: afterwards it is too late to find out that this cannot be had.
        let folder = File::open(&self.target.folder).map_err(failed)?;
        self.rename().map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => FileFailure::Exists { path: self.target.path.clone() },
            _ => failed(error),
        })?;
        if let Err(error) = folder.sync_all() {
            // Not certain to outlive a crash, so it must not count. But if it cannot be taken back either, it stands.
            if fs::rename(&self.target.path, &self.path).is_ok() {
                return Err(failed(error));
            }
        }
        self.there = false;
        Ok(())
    }

    fn rename(&self) -> io::Result<()> {
        let (from, to) = (&self.path, &self.target.path);
        if self.target.overwrite {
            return fs::rename(from, to);
        }
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // A filesystem that has no such renaming: a second name is refused as well if there is a file.
            Err(Errno::INVAL | Errno::NOSYS) => {
                fs::hard_link(from, to)?;
                let _ = fs::remove_file(from);
                Ok(())
            }
            result => Ok(result?),
        }
    }

    /// Removes it.
    pub(crate) fn discard(&mut self) {
        if std::mem::take(&mut self.there) && self.is_ours(&self.path) {
            // One that stays is removed by the next to save under this name.
            let _ = fs::remove_file(&self.path);
        }
    }

    fn is_ours(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|found| identity(&found) == self.identity)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.discard();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    /// A folder that goes with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("ferry-partial-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn target(&self, overwrite: bool) -> Target {
            Target::new(self.0.join("guest"), overwrite).unwrap()
        }

        fn files(&self) -> Vec<String> {
            let mut names: Vec<_> =
                fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn what_is_not_published_goes_and_what_is_stays() {
        let folder = Folder::new("stays");
        drop(folder.target(false).begin().unwrap());
        assert!(folder.files().is_empty());
        let (mut partial, _file) = folder.target(false).begin().unwrap();
        partial.publish().unwrap();
        drop(partial);
        assert_eq!(folder.files(), ["guest"]);
    }

    #[test]
    fn a_file_that_exists_stays_unless_it_may_be_replaced() {
        let folder = Folder::new("exists");
        let (first, _file) = folder.target(false).begin().unwrap();
        fs::write(folder.0.join("guest"), "precious").unwrap();
        assert!(matches!(first.check(), Err(FileFailure::Exists { .. })));
        let renamed = first.rename().unwrap_err();
        assert_eq!(renamed.kind(), io::ErrorKind::AlreadyExists);
        assert!(matches!(folder.target(false).begin(), Err(FileFailure::Exists { .. })));
        assert_eq!(fs::read(folder.0.join("guest")).unwrap(), b"precious");
        folder.target(true).begin().unwrap().0.publish().unwrap();
        assert!(fs::read(folder.0.join("guest")).unwrap().is_empty());
    }

    #[test]
    fn what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not() {
        let folder = Folder::new("stale");
        for name in [".guest.0123456789abcdef.saving", ".guest.short.saving", ".other.0123456789abcdef.saving"] {
            fs::write(folder.0.join(name), "left behind").unwrap();
        }
        let (first, _file) = folder.target(false).begin().unwrap();
        let (second, _file) = folder.target(false).begin().unwrap();
        assert!(first.check().is_ok() && second.check().is_ok());
        let files = folder.files();
        assert!(!files.iter().any(|name| name == ".guest.0123456789abcdef.saving"), "{files:?}");
        assert_eq!(files.len(), 4, "{files:?}");
    }

    #[test]
    fn a_file_that_was_just_made_is_not_taken_for_one_left_behind() {
        let (folder, done) = (Folder::new("fresh"), AtomicBool::new(false));
        let target = folder.target(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    target.remove_stale();
                }
            });
            let lost =
                (0..3000).filter(|_| !target.begin().is_ok_and(|(partial, _file)| partial.check().is_ok())).count();
            done.store(true, Ordering::Relaxed);
            assert_eq!(lost, 0);
        });
    }

    #[test]
    fn a_file_that_somebody_removed_is_missed_in_time() {
        let folder = Folder::new("removed");
        let (mut partial, _file) = folder.target(false).begin().unwrap();
        fs::remove_file(partial.path()).unwrap();
        assert!(matches!(partial.publish(), Err(FileFailure::Removed { .. })));
        fs::write(partial.path(), "another's").unwrap();
        assert!(matches!(partial.publish(), Err(FileFailure::Removed { .. })));
        let other = partial.path().to_owned();
        drop(partial);
        assert!(other.exists());
    }

    #[test]
    fn a_path_must_name_a_file() {
        for path in ["/", "", "..", "folder/"] {
            assert!(matches!(Target::new(path.into(), false), Err(FileFailure::NoName { .. })), "{path}");
        }
        let long = "x".repeat(255);
        assert!(Target::new(long.into(), false).unwrap().stem().len() < 230);
        let missing = Target::new("/nowhere/at/all/guest".into(), false).unwrap();
        assert!(missing.check().unwrap_err().to_string().contains("/nowhere/at/all"));
    }
}
