//! A folder with one guest in it, on a disk where there is one.
#![allow(dead_code)] // each test file uses a part of it

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use pageferry::transport::{Acceptor, Dialer};
use pageferry_conformance::Shelf;
use pageferry_file::{FileAcceptor, FileDialer, RestoreOptions, SaveOptions};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A folder that goes with the test.
pub(crate) struct Folder {
    pub(crate) path: PathBuf,
    pub(crate) direct: bool,
}

impl Folder {
    pub(crate) fn new(direct: bool) -> Self {
        Self::within(std::env::temp_dir(), direct)
    }

    pub(crate) fn within(parent: PathBuf, direct: bool) -> Self {
        let name = format!("ferry-file-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        fs::create_dir_all(&path).expect("the folder for temporary files can be written");
        Self { path, direct }
    }

    /// The saved guest.
    pub(crate) fn file(&self) -> PathBuf {
        self.path.join("guest.ferry")
    }

    pub(crate) fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.path).expect("the folder is there");
        entries.map(|entry| entry.expect("it can be read").file_name().to_string_lossy().into_owned()).collect()
    }

    pub(crate) fn save_options(&self, overwrite: bool) -> SaveOptions {
        let mut options = SaveOptions::default();
        (options.overwrite, options.direct) = (overwrite, self.direct);
        options
    }

    pub(crate) fn restore_options(&self) -> RestoreOptions {
        let mut options = RestoreOptions::default();
        options.direct = self.direct;
        options
    }
}

impl Shelf for Folder {
    fn dialer(&self) -> Arc<dyn Dialer> {
        Arc::new(FileDialer::new(self.file(), self.save_options(true)).expect("the folder can be written"))
    }

    fn acceptor(&self) -> Arc<dyn Acceptor> {
        Arc::new(FileAcceptor::open(self.file(), self.restore_options()).expect("a guest was saved"))
    }

    fn is_full(&self) -> bool {
        self.file().exists()
    }

    fn is_clean(&self) -> bool {
        self.files().iter().all(|name| name == "guest.ferry")
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}
