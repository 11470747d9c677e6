//! Seeds and variants of them, for tests that run without a fuzzer. Part of those of several
//! crates.

use std::fs;
use std::path::Path;

/// One to four changes of the kinds that decoders stumble over, chosen by 64 bytes of noise.
pub fn mutate(seed: &[u8], random: &[u8]) -> Vec<u8> {
    let mut bytes = seed.to_vec();
    let word = |at: usize| u64::from_le_bytes(random[at * 8..][..8].try_into().unwrap());
    for round in 0..=word(0) % 4 {
        let round = round as usize;
        if bytes.is_empty() {
            break;
        }
        let at = (word(1 + round) % bytes.len() as u64) as usize;
        let what = random[40 + round];
        match what % 8 {
            0 => bytes[at] ^= 1 << (what >> 5),
            1 => bytes[at] = what,
            2 => bytes.truncate(at),
            3 => bytes.insert(at, what),
            // Numbers: all at the alignment that the formats have.
            4..6 => {
                let values = [
                    0,
                    1,
                    u32::MAX,
                    u32::MAX - 1,
                    1 << 31,
                    0x100,
                    at as u32,
                    what.into(),
                ];
                let at = at & !3;
                let value = values[usize::from(what >> 5)].to_le_bytes();
                bytes
                    .iter_mut()
                    .skip(at)
                    .zip(value)
                    .for_each(|(byte, value)| *byte = value);
            }
            // A piece of itself in another place.
            _ => {
                let from = (word(5) % bytes.len() as u64) as usize;
                let piece = bytes[from..(from + 96).min(bytes.len())].to_vec();
                bytes
                    .iter_mut()
                    .skip(at & !7)
                    .zip(piece)
                    .for_each(|(byte, value)| *byte = value);
            }
        }
    }
    bytes
}

/// That the seeds in `dir` are these. Writes them there where `III_WRITE_SEEDS` is set.
pub fn check_seeds(dir: &Path, seeds: &[Vec<u8>]) {
    for (number, seed) in seeds.iter().enumerate() {
        let path = dir.join(format!("seed-{number}"));
        if std::env::var_os("III_WRITE_SEEDS").is_some() {
            fs::create_dir_all(dir).unwrap();
            fs::write(&path, seed).unwrap();
        }
        let same = fs::read(&path).is_ok_and(|bytes| bytes == *seed);
        assert!(same, "{}", path.display());
    }
}
