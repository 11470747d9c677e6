#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| iii_fuzz_checks::store::check_layer(bytes));
