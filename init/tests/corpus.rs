//! The fuzz target's check of a sandbox's messages, over its committed corpus and over bytes near
//! it.

use std::fs;
use std::io;
use std::path::PathBuf;

use iii_fuzz_checks::init as checks;
use iii_init::failure::{Failure, Step};
use iii_init::frame;
use iii_init::message::{MAIN, Report};
use iii_init::vm::{FromGuest, Hello};
use iii_test_support::{check_seeds, mutate};

/// Variants of each seed.
const VARIANTS: u64 = 3000;

fn corpus() -> PathBuf {
    concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/guest_message").into()
}

/// Random bytes that decide the variant: the generator of `SplitMix64`.
fn noise(number: u64) -> Vec<u8> {
    let mut state = number;
    let words = (0..8).map(|_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    });
    words.flat_map(u64::to_le_bytes).collect()
}

fn said(hello: Hello, messages: &[FromGuest]) -> Vec<u8> {
    let frames = messages
        .iter()
        .map(|message| frame::bytes_of(message).unwrap());
    [hello.to_bytes().to_vec()]
        .into_iter()
        .chain(frames)
        .flatten()
        .collect()
}

fn seeds() -> Vec<Vec<u8>> {
    let missing = io::Error::from_raw_os_error(libc::ENOENT);
    let failure = Failure::new(Step::Exec, "no such program", &missing);
    vec![
        said(
            Hello::Control,
            &[
                FromGuest::Ready,
                FromGuest::Report(Report::Running(MAIN)),
                FromGuest::Report(Report::Running(300)),
                FromGuest::Report(Report::Exited(300, 256)),
                FromGuest::Report(Report::Exited(MAIN, 9)),
            ],
        ),
        said(
            Hello::Control,
            &[
                FromGuest::Ready,
                FromGuest::Report(Report::Failed(MAIN, failure)),
            ],
        ),
        said(Hello::Errors(u32::MAX), &[]),
    ]
}

#[test]
fn no_message_of_the_corpus_makes_it_stumble() {
    for number in 0..seeds().len() {
        let seed = fs::read(corpus().join(format!("seed-{number}"))).unwrap();
        checks::check_guest_message(&seed);
        for variant in 0..VARIANTS {
            let bytes = mutate(&seed, &noise(variant));
            let outcome = std::panic::catch_unwind(|| checks::check_guest_message(&bytes));
            assert!(outcome.is_ok(), "variant {variant} of seed {number}");
        }
    }
}

/// The seeds are what is written here.
#[test]
fn seeds_are_current() {
    check_seeds(&corpus(), &seeds());
}
