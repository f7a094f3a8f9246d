//! The body of a message that a stranger sends first, behind a sound header.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../src/parse.rs"]
mod parse;

fuzz_target!(|bytes: &[u8]| parse::hello(bytes));
