//! pageferry-benches
