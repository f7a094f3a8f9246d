//! pageferry-tcp
