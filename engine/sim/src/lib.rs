//! pageferry-sim
