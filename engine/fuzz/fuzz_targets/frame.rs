//! Bytes of a lane, cut into frames and messages.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../src/parse.rs"]
mod parse;

fuzz_target!(|bytes: &[u8]| parse::frame(bytes));
