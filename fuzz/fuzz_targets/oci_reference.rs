#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| iii_fuzz_checks::oci::check_reference(bytes));
