//! Where everything lies in the guest's memory, and which page is what.
//!
//! ```text
//! 0           RAM below 1 MiB: what the loader left, trampoline   static
//! 0x100000    the image: code, constants, first tables            static
//! image_end   one block per vCPU: a ledger page                   its own redundancy
//!                                 and the stack                   not checked
//!             page directories, one page per GiB above the first  static
//!             hashes of all static pages                          hashed too
//!             all other RAM: data                                 must hold its content
//! ```
//!
//! Linear addresses are physical addresses, mapped by 2 MiB pages for ring 3 up to the end of RAM and at
//! least up to 4 GiB. Static pages never change after boot: a hash of each is taken then.

use core::ops::Range;
use core::slice;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::ledger::Ledger;
use crate::workload::page::{LivePage, PAGE_BYTES, PAGE_WORDS};

/// Bytes of a vCPU's block: the ledger page, and the stack, which must not grow into it.
pub(crate) const BLOCK_BYTES: u64 = (1 + STACK_PAGES) * PAGE;
/// Pages of a vCPU's block that a check leaves out.
pub(crate) const STACK_PAGES: u64 = 7;

const PAGE: u64 = PAGE_BYTES as u64;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 1 << 21;
const TABLE_FLAGS: u64 = 0x27; // as in boot.s
const LARGE_PAGE_FLAGS: u64 = 0xe7;
/// RAM below this was used by firmware and loader.
const FIRST_MIB: u64 = 1 << 20;
/// Entries of the loader's memory map that are RAM: far more than any machine has.
const MOST_RANGES: usize = 16;
/// What one table of GiBs maps.
const MOST_MEMORY: u64 = 512 * GIB;

unsafe extern "C" {
    static image_start: u8;
    static image_end: u8;
    static gib_map: [AtomicU64; 512];
}

/// Ranges of whole page numbers.
type Pages = Range<u64>;

/// The map of this guest.
#[derive(Debug)]
pub(crate) struct Memory {
    ram: [Pages; MOST_RANGES],
    vcpus: u64,
    first_directory: u64,
    first_hash: u64,
    first_data: u64,
}

impl Memory {
    /// Lays out the guest in this RAM.
    pub(crate) fn new(ranges: impl Iterator<Item = Range<u64>>, vcpus: u64) -> Self {
        let mut ram = [const { 0..0 }; MOST_RANGES];
        for (index, range) in ranges.enumerate() {
            ram[index] = range.start.div_ceil(PAGE)..range.end / PAGE;
        }
        let end = ram.iter().map(|pages| pages.end * PAGE).max().unwrap_or(0);
        assert!(end <= MOST_MEMORY, "more than 512 GiB of address space");
        let first_directory = image().end + vcpus * BLOCK_BYTES / PAGE;
        let first_hash = first_directory + end.max(4 * GIB).div_ceil(GIB) - 1;
        let mut memory = Self { ram, vcpus, first_directory, first_hash, first_data: first_hash };
        memory.first_data += memory.static_pages().count().div_ceil(PAGE_WORDS) as u64;
        let whole = image().start..memory.first_data;
        assert!(
            memory.ram.iter().any(|pages| pages.start <= whole.start && whole.end <= pages.end),
            "the guest needs more RAM after 1 MiB"
        );
        memory
    }

    /// Maps what the first directory, which boot.s made, does not.
    pub(crate) fn map(&self) {
        for page in self.first_directory..self.first_hash {
            let gib = page - self.first_directory + 1;
            for index in 0..512 {
                let entry = (page * PAGE + index * 8) as *mut u64;
                // SAFETY: this page is RAM in the first GiB that belongs to this directory alone.
                unsafe { entry.write(gib * GIB + index * LARGE_PAGE + LARGE_PAGE_FLAGS) };
            }
            // SAFETY: boot.s defines the table; the entry was not present, so no stale translation exists.
            unsafe { gib_map[gib as usize].store(page * PAGE + TABLE_FLAGS, Ordering::Release) };
        }
    }

    /// Pages of RAM.
    pub(crate) fn ram_pages(&self) -> u64 {
        self.ram.iter().map(|pages| pages.end - pages.start).sum()
    }

    /// Pages that hold data.
    pub(crate) fn data_pages(&self) -> u64 {
        self.data().map(|pages| pages.end - pages.start).sum()
    }

    /// Data page number `index`: its page number and its content.
    pub(crate) fn data_page(&self, mut index: u64) -> (u64, LivePage) {
        for pages in self.data() {
            let len = pages.end - pages.start;
            if index < len {
                let page = pages.start + index;
                // SAFETY: a page of RAM, mapped, which belongs to no Rust object.
                return (page, unsafe { LivePage::new((page * PAGE) as *mut u8) });
            }
            index -= len;
        }
        panic!("data page {index} past the last");
    }

    /// The ledger of a vCPU.
    pub(crate) fn ledger(&self, vcpu: u64) -> &'static Ledger {
        assert!(vcpu < self.vcpus);
        // SAFETY: the page belongs to this ledger alone, was zero at boot, and a ledger consists of atomics.
        unsafe { &*(ledger_address(vcpu) as *const Ledger) }
    }

    /// Page numbers of all static pages.
    pub(crate) fn static_pages(&self) -> impl Iterator<Item = u64> {
        let low = self.ram.iter().flat_map(|pages| pages.start..pages.end.min(FIRST_MIB / PAGE));
        low.chain(image()).chain(self.first_directory..self.first_hash)
    }

    /// Where the hashes of the static pages are kept, one for each in order; the rest stays zero.
    pub(crate) fn hashes(&self) -> &'static [AtomicU64] {
        let words = (self.first_data - self.first_hash) as usize * PAGE_WORDS;
        // SAFETY: these pages are RAM, mapped, were zero at boot, and belong to this table alone.
        unsafe { slice::from_raw_parts(self.hashes_address() as *const AtomicU64, words) }
    }

    /// Where that is.
    pub(crate) const fn hashes_address(&self) -> u64 {
        self.first_hash * PAGE
    }

    fn data(&self) -> impl Iterator<Item = Pages> {
        let first_data = self.first_data;
        self.ram.iter().map(move |pages| pages.start.max(first_data).min(pages.end)..pages.end)
    }
}

/// Where a vCPU's ledger is.
pub(crate) fn ledger_address(vcpu: u64) -> u64 {
    image().end * PAGE + vcpu * BLOCK_BYTES
}

/// The hash of the present content of a static page.
pub(crate) fn hash_page(page: u64) -> u64 {
    let words = (page * PAGE) as *const u64;
    // SAFETY: a page of RAM, mapped; volatile because others may own what lies there.
    hash((0..PAGE_WORDS).map(|index| unsafe { words.add(index).read_volatile() }))
}

/// A hash that changes whenever a single word does.
pub(crate) fn hash(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(1, |hash, word| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29))
}

/// The pages the program was loaded to.
fn image() -> Pages {
    // The linker script aligns both.
    (&raw const image_start) as u64 / PAGE..(&raw const image_end) as u64 / PAGE
}
