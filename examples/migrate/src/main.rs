//! `migrate`
fn main() {}
