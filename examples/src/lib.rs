//! pageferry-examples
