//! The suite that every transport passes.

mod common;

use common::{join, missing};

pageferry_conformance::suite!(join, unless: missing);
