//! pageferry-kvm
