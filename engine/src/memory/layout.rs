//! Which regions of guest-physical memory exist, and the page space that numbers all their pages.

use std::fmt;

use crate::limits::{MAX_PAGES, MAX_REGION_NAME, MAX_REGIONS};
use crate::units::{PAGE_SIZE, PAGES_PER_WORD, PageNumber, PageRun};

/// A region's position in its [`Layout`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RegionId(pub u32);

impl fmt::Display for RegionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "region {}", self.0)
    }
}

/// What a migration does with a region's content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Transfer {
    /// Copied: the ordinary case.
    Copy,
    /// Known to the destination by its place only: shared storage, or memory the guest cannot keep.
    Skip,
    /// The very same memory at the destination, which is a process of this host and was handed its descriptor: nothing is
    /// copied. The destination must not write, discard or prefault it before it owns the guest (R10), and only a
    /// [`DestinationVm`](crate::DestinationVm) that says it can is offered such a guest.
    Shared,
}

/// A run of guest-physical memory that is mapped as one piece.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Region {
    /// For people: in errors and reports. At most 64 bytes.
    pub name: String,
    /// Guest-physical address of the first byte; a multiple of the page size.
    pub guest_address: u64,
    /// Bytes; a multiple of the page size, may be zero.
    pub len: u64,
    /// Bytes of the pages that back it (4 KiB, 2 MiB, 1 GiB): the granule of discards and faults.
    pub backing_page: u64,
    /// Whether its content travels.
    pub transfer: Transfer,
}

impl Region {
    /// An ordinary region: copied, backed by 4 KiB pages.
    pub fn ram(name: impl Into<String>, guest_address: u64, len: u64) -> Self {
        Self { name: name.into(), guest_address, len, backing_page: PAGE_SIZE as u64, transfer: Transfer::Copy }
    }

    /// Pages in the region.
    pub fn page_count(&self) -> u64 {
        self.len / PAGE_SIZE as u64
    }
}

/// A layout that cannot be migrated, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// A start or a length is not a multiple of the page size.
    #[error("region {name:?}: {what} {value:#x} is not a multiple of 4096")]
    Unaligned {
        /// The region.
        name: String,
        /// Which number.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// Two regions claim the same guest-physical address, or one wraps around.
    #[error("region {name:?} at {guest_address:#x} overlaps {other:?} or wraps around the address space")]
    Overlap {
        /// The region.
        name: String,
        /// Where it starts.
        guest_address: u64,
        /// The region before it.
        other: String,
    },
    /// More of something than the engine's limits allow.
    #[error("the layout has {value} {what}; the limit is {limit}")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much.
        value: u64,
        /// How much is allowed.
        limit: u64,
    },
}

/// The regions of a guest, and the numbering of their pages.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Layout {
    regions: Vec<Region>,
    first_pages: Vec<u64>,
    page_space: u64,
}

impl Layout {
    /// Checks the regions and numbers their pages. Both sides number the same regions alike.
    pub fn new(regions: Vec<Region>) -> Result<Self, LayoutError> {
        let too_large = |what, value, limit| LayoutError::TooLarge { what, value, limit };
        if regions.len() > MAX_REGIONS {
            return Err(too_large("regions", regions.len() as u64, MAX_REGIONS as u64));
        }
        let mut first_pages = Vec::with_capacity(regions.len());
        let mut page_space = 0u64;
        for region in &regions {
            check_region(region)?;
            first_pages.push(page_space);
            page_space = (page_space + region.page_count()).next_multiple_of(PAGES_PER_WORD);
            if page_space > MAX_PAGES {
                return Err(too_large("pages", page_space, MAX_PAGES));
            }
        }
        check_overlaps(&regions)?;
        Ok(Self { regions, first_pages, page_space })
    }

    /// The regions, in the order that numbers their pages.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// One region.
    pub fn region(&self, id: RegionId) -> Option<&Region> {
        self.regions.get(id.0 as usize)
    }

    /// Every region with its id.
    pub fn iter(&self) -> impl Iterator<Item = (RegionId, &Region)> {
        self.regions.iter().enumerate().map(|(index, region)| (RegionId(index as u32), region))
    }

    /// One past the highest page number: the length of a bitmap over this layout. Includes the up
    /// to 63 unused numbers between regions.
    pub fn page_space(&self) -> u64 {
        self.page_space
    }

    /// Pages of all regions that travel.
    pub fn page_count(&self) -> u64 {
        self.regions.iter().filter(|region| region.transfer == Transfer::Copy).map(Region::page_count).sum()
    }

    /// The number of a region's first page; a multiple of 64.
    pub fn first_page(&self, id: RegionId) -> Option<PageNumber> {
        self.first_pages.get(id.0 as usize).copied().map(PageNumber)
    }

    /// All pages of a region; empty for an empty or unknown one.
    pub fn pages_of(&self, id: RegionId) -> PageRun {
        let count = self.region(id).map_or(0, Region::page_count);
        PageRun { first: self.first_page(id).unwrap_or_default(), count }
    }

    /// The region that holds a page, and the page's index in it.
    pub fn locate(&self, page: PageNumber) -> Option<(RegionId, u64)> {
        // Empty regions share their first page number with the next one: the last match is the one with pages.
        let index = self.first_pages.partition_point(|&first| first <= page.0).checked_sub(1)?;
        let in_region = page.0 - self.first_pages[index];
        (in_region < self.regions[index].page_count()).then_some((RegionId(index as u32), in_region))
    }

    /// The region that holds a whole run of pages, and the first page's index in it.
    pub fn locate_run(&self, run: PageRun) -> Option<(RegionId, u64)> {
        let (region, first) = self.locate(run.first)?;
        let left = self.region(region)?.page_count() - first;
        (run.count <= left).then_some((region, first))
    }

    /// The region and page that hold a guest-physical address.
    pub fn locate_address(&self, guest_address: u64) -> Option<(RegionId, u64)> {
        self.iter().find_map(|(id, region)| {
            let offset = guest_address.checked_sub(region.guest_address)?;
            (offset < region.len).then_some((id, offset / PAGE_SIZE as u64))
        })
    }

    /// Whether two layouts describe the same guest memory; names and backing may differ.
    pub fn is_same_memory(&self, other: &Self) -> bool {
        let key = |region: &Region| (region.guest_address, region.len, region.transfer);
        self.regions.iter().map(key).eq(other.regions.iter().map(key))
    }

    /// A page as people know it: region name and guest-physical address.
    pub fn describe(&self, page: PageNumber) -> String {
        match self.locate(page) {
            Some((id, index)) => {
                let region = &self.regions[id.0 as usize];
                let address = region.guest_address + index * PAGE_SIZE as u64;
                format!("guest-physical {address:#x} ({})", region.name)
            }
            None => format!("{page} (in no region)"),
        }
    }
}

fn check_region(region: &Region) -> Result<(), LayoutError> {
    let page = PAGE_SIZE as u64;
    let numbers = [("start", region.guest_address), ("length", region.len)];
    for (what, value) in numbers {
        if value % page != 0 {
            let name = region.name.clone();
            return Err(LayoutError::Unaligned { name, what, value });
        }
    }
    if !region.backing_page.is_power_of_two() || region.backing_page < page {
        let name = region.name.clone();
        return Err(LayoutError::Unaligned { name, what: "backing page size", value: region.backing_page });
    }
    if region.name.len() > MAX_REGION_NAME {
        return Err(LayoutError::TooLarge {
            what: "bytes in a region's name",
            value: region.name.len() as u64,
            limit: MAX_REGION_NAME as u64,
        });
    }
    // Keeps the sum over all regions far from overflow.
    if region.page_count() > MAX_PAGES {
        return Err(LayoutError::TooLarge { what: "pages", value: region.page_count(), limit: MAX_PAGES });
    }
    Ok(())
}

fn check_overlaps(regions: &[Region]) -> Result<(), LayoutError> {
    let mut by_address: Vec<&Region> = regions.iter().filter(|region| region.len > 0).collect();
    by_address.sort_by_key(|region| region.guest_address);
    let mut end = 0u64;
    let mut previous = "";
    for region in by_address {
        let region_end = region.guest_address.checked_add(region.len);
        let overlaps = region.guest_address < end;
        match region_end {
            Some(region_end) if !overlaps => end = region_end,
            _ => {
                return Err(LayoutError::Overlap {
                    name: region.name.clone(),
                    guest_address: region.guest_address,
                    other: previous.to_owned(),
                });
            }
        }
        previous = &region.name;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_regions() -> Layout {
        Layout::new(vec![
            Region::ram("low", 0, 3 * 4096),
            Region::ram("empty", 0x8000_0000, 0),
            Region::ram("high", 0x1_0000_0000, 130 * 4096),
        ])
        .unwrap()
    }

    #[test]
    fn regions_start_at_bitmap_words_and_pages_translate_both_ways() {
        let layout = two_regions();
        assert_eq!(layout.first_page(RegionId(2)), Some(PageNumber(64)));
        assert_eq!(layout.page_space(), 64 + 192);
        assert_eq!(layout.page_count(), 133);
        assert_eq!(layout.locate(PageNumber(2)), Some((RegionId(0), 2)));
        assert_eq!(layout.locate(PageNumber(3)), None);
        assert_eq!(layout.locate(PageNumber(64)), Some((RegionId(2), 0)));
        assert_eq!(layout.locate(PageNumber(64 + 130)), None);
        assert_eq!(layout.locate_address(0x1_0000_1fff), Some((RegionId(2), 1)));
    }

    #[test]
    fn a_run_that_leaves_its_region_is_refused() {
        let layout = two_regions();
        let run = |first, count| PageRun { first: PageNumber(first), count };
        assert!(layout.locate_run(run(64, 130)).is_some());
        assert!(layout.locate_run(run(64, 131)).is_none());
        assert!(layout.locate_run(run(0, u64::MAX)).is_none());
    }

    #[test]
    fn bad_layouts_name_the_region() {
        let unaligned = Layout::new(vec![Region::ram("odd", 0, 4097)]).unwrap_err();
        assert!(unaligned.to_string().contains("\"odd\""), "{unaligned}");
        let overlap = Layout::new(vec![Region::ram("a", 0, 8192), Region::ram("b", 4096, 4096)]);
        assert!(matches!(overlap, Err(LayoutError::Overlap { name, .. }) if name == "b"));
        let wraps = Layout::new(vec![Region::ram("w", !4095, 8192)]);
        assert!(matches!(wraps, Err(LayoutError::Overlap { .. })));
        let huge = Layout::new(vec![Region::ram("h", 0, 1 << 62)]);
        assert!(matches!(huge, Err(LayoutError::TooLarge { .. })));
    }

    #[test]
    fn an_empty_layout_is_a_layout() {
        let layout = Layout::new(vec![]).unwrap();
        assert_eq!(layout.page_space(), 0);
        assert_eq!(layout.locate(PageNumber(0)), None);
    }
}
