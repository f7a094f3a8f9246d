//! Guest memory that is mapped in this process: anonymous or behind a memfd.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::ptr::NonNull;

use memmap2::{MmapOptions, MmapRaw};

use super::{GuestMemory, Layout, MemoryError, RegionId, Window, page_offset};
use crate::units::PAGE_SIZE;

/// What stands behind the pages of a [`MappedMemory`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory, transparent huge pages where the host gives them.
    #[default]
    Anonymous,
    /// A memfd per region, mapped shared: other processes can be handed the same memory.
    Memfd,
    /// Anonymous huge pages of 2 MiB from the host's reserved pool.
    HugePages2M,
}

/// Regions of memory mapped in this process, one mapping each, all zeros when new.
#[derive(Debug)]
pub struct MappedMemory {
    layout: Layout,
    maps: Vec<Option<Map>>,
}

/// Bytes of a page of [`Backing::HugePages2M`].
const HUGE_PAGE: usize = 2 << 20;

#[derive(Debug)]
struct Map {
    raw: MmapRaw,
    file: Option<File>,
    /// Bytes of the smallest piece that can be given back.
    granule: u64,
}

impl MappedMemory {
    /// Maps every region of a layout. Nothing is touched: a page costs memory when it is first written.
    pub fn new(layout: Layout, backing: Backing) -> io::Result<Self> {
        let maps = layout
            .regions()
            .iter()
            .map(|region| match region.len {
                0 => Ok(None),
                len => map(&region.name, len, backing).map(Some),
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { layout, maps })
    }

    /// Maps memory that another process has handed over: a memfd for each region that is not empty, in the layout's order. Nothing
    /// of it is touched. Each must be a memfd of exactly the region's length, whose pages nobody can take away
    /// ([`Backing::Memfd`] makes such).
    pub fn from_files(layout: Layout, files: Vec<File>) -> Result<Self, NotShareable> {
        let mut files = files.into_iter();
        let maps = layout
            .regions()
            .iter()
            .map(|region| match region.len {
                0 => Ok(None),
                len => {
                    let file = files.next().ok_or_else(|| NotShareable::Missing(region.name.clone()))?;
                    map_shared(&region.name, len, file).map(Some)
                }
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { layout, maps })
    }

    /// The memfd behind a region, where there is one.
    pub fn file(&self, region: RegionId) -> Option<BorrowedFd<'_>> {
        self.map_of(region)?.file.as_ref().map(AsFd::as_fd)
    }

    /// Makes every page present and writable now, so that first touches do not cost time later.
    pub fn prefault(&self) -> io::Result<()> {
        for map in self.maps.iter().flatten() {
            madvise(map, 0..map.raw.len() as u64, libc::MADV_POPULATE_WRITE)?;
        }
        Ok(())
    }

    fn map_of(&self, region: RegionId) -> Option<&Map> {
        self.maps.get(region.0 as usize)?.as_ref()
    }
}

fn map(name: &str, len: u64, backing: Backing) -> io::Result<Map> {
    let len = usize::try_from(len).map_err(io::Error::other)?;
    let mut options = MmapOptions::new();
    options.len(len);
    if backing != Backing::HugePages2M {
        options.no_reserve_swap();
    }
    match backing {
        Backing::Anonymous => {
            let raw = MmapRaw::from(options.map_anon()?);
            // Refused where transparent huge pages are compiled out; small pages work as well.
            let _ = raw.advise(memmap2::Advice::HugePage);
            Ok(Map { raw, file: None, granule: PAGE_SIZE as u64 })
        }
        Backing::HugePages2M => {
            // Reserved now: a pool that is too small is an error here, not a fault in the guest.
            options.len(len.next_multiple_of(HUGE_PAGE));
            let raw = MmapRaw::from(options.huge(Some(21)).map_anon()?);
            Ok(Map { raw, file: None, granule: HUGE_PAGE as u64 })
        }
        Backing::Memfd => {
            let file = memfd(name)?;
            file.set_len(len as u64)?;
            seal(&file)?;
            let raw = options.map_raw(&file)?;
            Ok(Map { raw, file: Some(file), granule: PAGE_SIZE as u64 })
        }
    }
}

/// Why memory that was handed over cannot be a guest's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotShareable {
    /// Too few descriptors.
    #[error("no descriptor came for region {0:?}")]
    Missing(String),
    /// Something else than a memfd.
    #[error("what came for region {0:?} is no memfd")]
    NotAMemfd(String),
    /// A memfd of another length.
    #[error("the memfd for region {name:?} has {found} bytes, not {expected}")]
    Length {
        /// The region.
        name: String,
        /// Its length.
        expected: u64,
        /// The memfd's.
        found: u64,
    },
    /// A memfd that can be cut while the guest runs on it, or that the guest cannot write.
    #[error("the memfd for region {0:?} must be sealed against shrinking and growing, and not against writing")]
    Seals(String),
    /// The host could not map it.
    #[error("the memfd for region {name:?}: {source}")]
    Host {
        /// The region.
        name: String,
        /// What the host said.
        source: io::Error,
    },
}

fn map_shared(name: &str, len: u64, file: File) -> Result<Map, NotShareable> {
    let failed = |source| NotShareable::Host { name: name.to_owned(), source };
    // SAFETY: plain system call on a descriptor we own.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 {
        return Err(NotShareable::NotAMemfd(name.to_owned()));
    }
    let found = file.metadata().map_err(failed)?.len();
    if found != len {
        return Err(NotShareable::Length { name: name.to_owned(), expected: len, found });
    }
    let unwritable = libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE;
    if seals & MEMFD_SEALS != MEMFD_SEALS || seals & unwritable != 0 {
        return Err(NotShareable::Seals(name.to_owned()));
    }
    let len = usize::try_from(len).map_err(|error| failed(io::Error::other(error)))?;
    let raw = MmapOptions::new().len(len).no_reserve_swap().map_raw(&file).map_err(failed)?;
    Ok(Map { raw, file: Some(file), granule: PAGE_SIZE as u64 })
}

/// Whoever has the descriptor can take no page away by changing the length.
const MEMFD_SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

fn seal(file: &File) -> io::Result<()> {
    // SAFETY: plain system call on a descriptor we own.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, MEMFD_SEALS) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn memfd(name: &str) -> io::Result<File> {
    let name = std::ffi::CString::new(name).map_err(io::Error::other)?;
    // SAFETY: `name` is a valid C string for the length of the call.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that nobody else owns.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn madvise(map: &Map, bytes: Range<u64>, advice: i32) -> io::Result<()> {
    let len = (bytes.end - bytes.start) as usize;
    // SAFETY: callers pass a range inside the mapping.
    let result = unsafe {
        let start = map.raw.as_mut_ptr().add(bytes.start as usize);
        libc::madvise(start.cast(), len, advice)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

// SAFETY: each window is a live mapping owned by `self`, of which no reference is ever made.
unsafe impl GuestMemory for MappedMemory {
    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn window(&self, region: RegionId) -> Option<Window> {
        let map = self.map_of(region)?;
        Some(Window { start: NonNull::new(map.raw.as_mut_ptr())?, len: map.raw.len() })
    }

    fn file(&self, region: RegionId) -> Option<BorrowedFd<'_>> {
        Self::file(self, region)
    }

    fn populated(&self, region: RegionId) -> Option<Vec<Range<u64>>> {
        let Some(map) = self.map_of(region) else {
            return Some(Vec::new());
        };
        let found = match &map.file {
            Some(file) => populated_file(file, map.raw.len() as u64),
            None => populated_anonymous(map),
        };
        // Huge pages can reach past the region's end.
        let end = self.layout.region(region)?.page_count();
        let clipped = |range: Range<u64>| range.start.min(end)..range.end.min(end);
        Some(found.ok()?.into_iter().map(clipped).filter(|range| !range.is_empty()).collect())
    }

    fn discard(&self, region: RegionId, pages: Range<u64>) -> Result<(), MemoryError> {
        let bytes = page_offset(pages.start)..page_offset(pages.end);
        let out_of_bounds =
            MemoryError::OutOfBounds { region, offset: bytes.start, len: bytes.end.saturating_sub(bytes.start) };
        let map = match self.map_of(region) {
            Some(map) if bytes.start <= bytes.end && bytes.end <= map.raw.len() as u64 => map,
            _ => return Err(out_of_bounds),
        };
        if !bytes.start.is_multiple_of(map.granule) || !bytes.end.is_multiple_of(map.granule) {
            return Err(MemoryError::Unsupported("giving back a part of a huge page"));
        }
        let advice = if map.file.is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        let offset = bytes.start;
        madvise(map, bytes, advice).map_err(|source| MemoryError::Host { region, offset, source })
    }
}

/// The data extents of a memfd, by SEEK_DATA and SEEK_HOLE.
fn populated_file(file: &File, len: u64) -> io::Result<Vec<Range<u64>>> {
    let seek = |from: u64, whence: i32| -> io::Result<Option<u64>> {
        // SAFETY: plain system call on a descriptor we own; the file offset is used by nobody else.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
        if at >= 0 {
            return Ok(Some(at as u64));
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
    };
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(data) = seek(at, libc::SEEK_DATA)? {
        let hole = seek(data, libc::SEEK_HOLE)?.unwrap_or(len).min(len);
        found.push(data / PAGE_SIZE as u64..hole.div_ceil(PAGE_SIZE as u64));
        at = hole;
        if at >= len {
            break;
        }
    }
    Ok(found)
}

/// The present or swapped-out pages of an anonymous mapping, from `/proc/self/pagemap`: by the
/// PAGEMAP_SCAN ioctl (Linux 6.7), which skips holes without looking at each page.
fn populated_anonymous(map: &Map) -> io::Result<Vec<Range<u64>>> {
    const PAGE_IS_PRESENT: u64 = 1 << 3;
    const PAGE_IS_SWAPPED: u64 = 1 << 4;
    let start = map.raw.as_mut_ptr() as u64;
    let whole = start..start + map.raw.len() as u64;
    let mut found: Vec<Range<u64>> = Vec::new();
    scan_pagemap(whole, PAGE_IS_PRESENT | PAGE_IS_SWAPPED, |bytes| {
        let pages = (bytes.start - start) / PAGE_SIZE as u64..(bytes.end - start) / PAGE_SIZE as u64;
        match found.last_mut() {
            Some(last) if last.end == pages.start => last.end = pages.end,
            _ => found.push(pages),
        }
    })?;
    Ok(found)
}

/// Argument of PAGEMAP_SCAN, as in the kernel's `include/uapi/linux/fs.h`.
#[repr(C)]
#[derive(Default)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct ScanRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Calls `found` for each run of addresses whose pages are in any of `categories`.
fn scan_pagemap(addresses: Range<u64>, categories: u64, mut found: impl FnMut(Range<u64>)) -> io::Result<()> {
    /// `_IOWR('f', 16, struct pm_scan_arg)`.
    const PAGEMAP_SCAN: u64 = 0xC060_6610;
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut regions = [ScanRegion::default(); 512];
    let mut start = addresses.start;
    while start < addresses.end {
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            start,
            end: addresses.end,
            vec: regions.as_mut_ptr() as u64,
            vec_len: regions.len() as u64,
            category_anyof_mask: categories,
            return_mask: categories,
            ..ScanArgument::default()
        };
        // SAFETY: the argument and the vector it points to live through the call; the kernel writes
        // at most `vec_len` entries.
        let filled = unsafe { libc::ioctl(pagemap.as_raw_fd(), PAGEMAP_SCAN as _, &raw mut argument) };
        let filled = usize::try_from(filled).map_err(|_| io::Error::last_os_error())?;
        for region in &regions[..filled] {
            found(region.start..region.end);
        }
        if argument.walk_end <= start {
            return Err(io::Error::other("PAGEMAP_SCAN made no progress"));
        }
        start = argument.walk_end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Region;

    fn memory(backing: Backing) -> MappedMemory {
        let layout = Layout::new(vec![Region::ram("ram", 0, 4 << 20), Region::ram("none", 4 << 20, 0)]);
        MappedMemory::new(layout.unwrap(), backing).unwrap()
    }

    fn touched_pages(memory: &MappedMemory) -> Vec<u64> {
        memory.populated(RegionId(0)).unwrap().into_iter().flatten().collect()
    }

    fn file_of(memory: &MappedMemory) -> File {
        File::from(memory.file(RegionId(0)).unwrap().try_clone_to_owned().unwrap())
    }

    #[test]
    fn memory_that_was_handed_over_is_the_same_memory() {
        let ours = memory(Backing::Memfd);
        let theirs = MappedMemory::from_files(ours.layout().clone(), vec![file_of(&ours)]).unwrap();
        ours.write(RegionId(0), 8190, b"from here").unwrap();
        let mut bytes = [0; 9];
        theirs.read(RegionId(0), 8190, &mut bytes).unwrap();
        assert_eq!(&bytes, b"from here");
        drop(ours);
        theirs.read(RegionId(0), 8190, &mut bytes).unwrap();
        assert_eq!(&bytes, b"from here");
    }

    #[test]
    fn only_a_memfd_of_the_right_length_that_nobody_can_cut_is_taken() {
        let ours = memory(Backing::Memfd);
        let layout = |len| Layout::new(vec![Region::ram("ram", 0, len)]).unwrap();
        let refusal = |len, files| MappedMemory::from_files(layout(len), files).unwrap_err();
        assert!(matches!(refusal(4 << 20, Vec::new()), NotShareable::Missing(_)));
        assert!(matches!(refusal(8 << 20, vec![file_of(&ours)]), NotShareable::Length { found: 0x0040_0000, .. }));
        let unsealed = memfd("unsealed").unwrap();
        unsealed.set_len(4 << 20).unwrap();
        assert!(matches!(refusal(4 << 20, vec![unsealed]), NotShareable::Seals(_)));
        let ordinary = File::open("/proc/self/exe").unwrap();
        assert!(matches!(refusal(4 << 20, vec![ordinary]), NotShareable::NotAMemfd(_)));
        assert!(file_of(&ours).set_len(0).is_err() && file_of(&ours).set_len(8 << 20).is_err());
    }

    #[test]
    fn only_touched_pages_are_populated_and_discard_empties_them() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let memory = memory(backing);
            if backing == Backing::Memfd {
                // The kernel may give an anonymous mapping a neighbour's huge page.
                assert_eq!(touched_pages(&memory), []);
            }
            memory.write(RegionId(0), 5 * 4096 + 7, b"here").unwrap();
            assert!(touched_pages(&memory).contains(&5), "{backing:?}");
            memory.discard(RegionId(0), 5..6).unwrap();
            let mut bytes = [1; 4];
            memory.read(RegionId(0), 5 * 4096 + 7, &mut bytes).unwrap();
            assert_eq!(bytes, [0; 4], "{backing:?}");
            assert_eq!(memory.populated(RegionId(1)), Some(vec![]));
        }
    }

    #[test]
    fn access_outside_a_region_is_an_error_that_names_it() {
        let memory = memory(Backing::Anonymous);
        let error = memory.write(RegionId(0), (4 << 20) - 2, b"four").unwrap_err();
        assert!(error.to_string().contains("region 0"), "{error}");
        assert!(memory.read(RegionId(0), u64::MAX, &mut [0; 2]).is_err());
        assert!(memory.read(RegionId(1), 0, &mut [0; 1]).is_err());
        assert!(memory.read(RegionId(1), 0, &mut []).is_ok());
        assert!(memory.read(RegionId(9), 0, &mut [0; 1]).is_err());
        assert!(memory.discard(RegionId(0), 0..1025).is_err());
    }
}
