//! A guest whose memory comes from a file: the flat image of another machine's physical memory.
//!
//! What its pages must hold follows from no formula, so a hash of the file's bytes moves with the guest: one for
//! each vCPU's share of memory, keyed afresh for every guest, taken of what was read before it is stored.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use pageferry::memory::is_zero;
use pageferry::units::PAGE_SIZE;
use xxhash_rust::xxh3::Xxh3;

use super::ram::Ram;
use crate::cli::units::show_bytes;

/// Guests made of an image have a whole number of these.
const GRANULE: u64 = 2 << 20;

/// Pages read and hashed at a time: few enough to stay in a core's cache.
const CHUNK_PAGES: u64 = 64;

/// Why a file cannot be a guest's memory.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ImageError {
    /// The host did not give the bytes.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
    /// Something else than a file with bytes in it.
    #[error("{} holds no memory image: it is not a regular file, or empty", .0.display())]
    Empty(PathBuf),
    /// Less memory than the image has.
    #[error("{} has {}, more than --memory {}", path.display(), show_bytes(*image), show_bytes(*memory))]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its bytes.
        image: u64,
        /// The guest's.
        memory: u64,
    },
}

/// A file that holds a memory image from guest-physical address 0.
#[derive(Debug)]
pub(crate) struct Image {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Image {
    /// Opens it.
    pub(crate) fn open(path: &Path) -> Result<Self, ImageError> {
        let unreadable = |source| ImageError::Unreadable { path: path.to_owned(), source };
        let file = File::open(path).map_err(unreadable)?;
        let about = file.metadata().map_err(unreadable)?;
        if !about.is_file() || about.len() == 0 {
            return Err(ImageError::Empty(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), file, bytes: about.len() })
    }

    /// Memory of a guest that is no larger than it has to be.
    pub(crate) fn least_memory(&self) -> u64 {
        self.bytes.next_multiple_of(GRANULE)
    }

    /// Refuses a guest that is too small for the image.
    pub(super) fn check_fits(&self, memory: u64) -> Result<(), ImageError> {
        if self.bytes > memory {
            return Err(ImageError::TooLarge { path: self.path.clone(), image: self.bytes, memory });
        }
        Ok(())
    }

    /// Reads what memory holds from `offset`: past the image's end zeros.
    fn read(&self, offset: u64, into: &mut [u8]) -> Result<(), ImageError> {
        let left = self.bytes.saturating_sub(offset).min(into.len() as u64);
        let (inside, past) = into.split_at_mut(left as usize);
        past.fill(0);
        let unreadable = |source| ImageError::Unreadable { path: self.path.clone(), source };
        self.file.read_exact_at(inside, offset).map_err(unreadable)
    }
}

/// The hashes that prove a guest's memory to be its image, in the order of the shares.
#[derive(Debug)]
pub(super) struct Seal {
    seed: u64,
    shares: Vec<OnceLock<u128>>,
}

impl Seal {
    /// A seal that [`fill`](Self::fill) will make.
    pub(super) fn open(seed: u64, shares: usize) -> Self {
        Self { seed, shares: std::iter::repeat_with(OnceLock::new).take(shares).collect() }
    }

    /// The seal of a guest that was filled elsewhere.
    pub(super) fn of(seed: u64, shares: &[u128]) -> Self {
        Self { seed, shares: shares.iter().copied().map(OnceLock::from).collect() }
    }

    /// The hashes; `None` until all memory is filled.
    pub(super) fn shares(&self) -> Option<Vec<u128>> {
        self.shares.iter().map(|share| share.get().copied()).collect()
    }

    /// Brings one share of memory to what the image holds. Pages of zeros are not touched unless `touch_zero`.
    /// `false` when `go_on` said no.
    pub(super) fn fill(
        &self,
        share: usize,
        pages: Range<u64>,
        (image, touch_zero): (&Image, bool),
        ram: &Ram,
        go_on: impl Fn() -> bool,
    ) -> Result<bool, ImageError> {
        let mut hasher = Xxh3::with_seed(self.seed);
        let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
        for (first, length) in chunks(pages) {
            if !go_on() {
                return Ok(false);
            }
            let chunk = &mut buffer[..length];
            image.read(first * PAGE_SIZE as u64, chunk)?;
            hasher.update(chunk);
            for (page, content) in (first..).zip(chunk.chunks_exact(PAGE_SIZE)) {
                if touch_zero || !is_zero(content) {
                    ram.write(page, content);
                }
            }
        }
        // Each share is filled once.
        let _ = self.shares[share].set(hasher.digest128());
        Ok(true)
    }

    /// Whether one share of memory holds what the image held.
    pub(super) fn holds(&self, share: usize, pages: Range<u64>, ram: &Ram) -> bool {
        let mut hasher = Xxh3::with_seed(self.seed);
        let mut buffer = vec![0; CHUNK_PAGES as usize * PAGE_SIZE];
        for (first, length) in chunks(pages) {
            let chunk = &mut buffer[..length];
            ram.read(first, chunk);
            hasher.update(chunk);
        }
        self.shares[share].get() == Some(&hasher.digest128())
    }
}

/// The first page and the bytes of each chunk.
fn chunks(pages: Range<u64>) -> impl Iterator<Item = (u64, usize)> {
    let end = pages.end;
    let length = move |first: u64| (end - first).min(CHUNK_PAGES) as usize * PAGE_SIZE;
    pages.step_by(CHUNK_PAGES as usize).map(move |first| (first, length(first)))
}

#[cfg(test)]
mod tests {
    use pageferry::memory::Backing;

    use super::*;

    const PAGES: u64 = 300;

    /// The image of 300 pages, the last of them cut short, every third one zero.
    fn image(name: &str) -> Image {
        let path = std::env::temp_dir().join(format!("image-{}-{name}", std::process::id()));
        let byte = |at: u64| if (at / PAGE_SIZE as u64).is_multiple_of(3) { 0 } else { (at % 251) as u8 };
        std::fs::write(&path, (0..PAGES * PAGE_SIZE as u64 - 100).map(byte).collect::<Vec<_>>()).unwrap();
        let image = Image::open(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        image
    }

    fn ram() -> Ram {
        Ram::map(Ram::layout(2 << 20).unwrap(), Backing::Anonymous).unwrap()
    }

    #[test]
    fn memory_holds_the_image_and_zeros_after_it() {
        let (image, ram, seal) = (image("holds"), ram(), Seal::open(7, 1));
        assert!(seal.fill(0, 0..512, (&image, false), &ram, || true).unwrap());
        let (mut memory, mut file) = (vec![1; 2 << 20], vec![0; image.bytes as usize]);
        ram.read(0, &mut memory);
        image.file.read_exact_at(&mut file, 0).unwrap();
        file.resize(2 << 20, 0);
        assert!(memory == file);
    }

    #[test]
    fn a_seal_that_moved_finds_any_wrong_byte_in_its_share() {
        let (image, ram, seal) = (image("seal"), ram(), Seal::open(7, 2));
        for (share, pages) in [(0, 0..200), (1, 200..512)] {
            assert_eq!(seal.shares(), None);
            assert!(seal.fill(share, pages, (&image, false), &ram, || true).unwrap());
        }
        let moved = Seal::of(7, &seal.shares().unwrap());
        let holds = || (moved.holds(0, 0..200, &ram), moved.holds(1, 200..512, &ram));
        assert_eq!(holds(), (true, true));
        for (page, found) in [(0, (false, true)), (199, (false, true)), (200, (true, false)), (511, (true, false))] {
            let mut content = [0; PAGE_SIZE];
            ram.read(page, &mut content);
            content[4095] ^= 1;
            ram.write(page, &content);
            assert_eq!(holds(), found, "page {page}");
            content[4095] ^= 1;
            ram.write(page, &content);
        }
        assert!(!Seal::of(8, &seal.shares().unwrap()).holds(0, 0..200, &ram));
    }

    #[test]
    fn an_image_that_shrinks_while_it_is_read_is_an_error_with_its_name() {
        let shrunk = Image { bytes: 1 << 20, file: File::open("/dev/null").unwrap(), path: "gone".into() };
        let told = Seal::open(1, 1).fill(0, 0..512, (&shrunk, false), &ram(), || true).unwrap_err().to_string();
        assert!(told.contains("gone"), "{told}");
    }

    #[test]
    fn filling_stops_when_nobody_waits_for_it() {
        let seal = Seal::open(1, 1);
        assert!(!seal.fill(0, 0..512, (&image("stops"), false), &ram(), || false).unwrap());
        assert_eq!(seal.shares(), None);
    }
}
