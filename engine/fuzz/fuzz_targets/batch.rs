//! The body of a batch of pages, behind a sound header: parsed, unpacked, placed.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../src/parse.rs"]
mod parse;

fuzz_target!(|bytes: &[u8]| parse::batch(bytes));
