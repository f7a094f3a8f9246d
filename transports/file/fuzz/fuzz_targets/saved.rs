//! The file of a saved guest: opened and restored.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../src/restore.rs"]
mod restore;

fuzz_target!(|bytes: &[u8]| {
    let _ = restore::saved(bytes, restore::SHORT);
});
