//! See `frazil_snapstore::fuzzing`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| frazil_snapstore::fuzzing::target("fingerprints")(bytes));
