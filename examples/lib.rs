//! Short programs that link Pageferry: see the files beside this one.
