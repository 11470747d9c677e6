#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| iii_fuzz::oci::check_layer(bytes));
