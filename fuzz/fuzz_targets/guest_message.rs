#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| iii_fuzz::init::check_guest_message(bytes));
