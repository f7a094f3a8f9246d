//! What every transport passes whose destination comes later.

mod common;

use common::Folder;
use pageferry_conformance::Shelf;

fn shelf() -> Box<dyn Shelf> {
    Box::new(Folder::new(true))
}

/// Through the page cache, as on filesystems that take no direct I/O.
mod buffered {
    use super::*;

    fn shelf() -> Box<dyn Shelf> {
        Box::new(Folder::new(false))
    }

    pageferry_conformance::saved_suite!(shelf);
}

pageferry_conformance::saved_suite!(shelf);
