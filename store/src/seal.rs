//! Seals, by which a damaged JSON file of the store is recognised.
//!
//! JSON carries no checksum, and one digit more or less is JSON still. So the store's JSON files
//! are sealed:
//!
//! ```text
//! the JSON text, a newline, 64 lower-case hex digits (BLAKE3 of everything before), a newline
//! ```

/// Length of a seal: its digits and the newline after them.
const SEAL: usize = 65;

fn digits(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// Seals a JSON text.
pub fn seal(mut json: Vec<u8>) -> Vec<u8> {
    json.push(b'\n');
    let digits = digits(&json);
    json.extend_from_slice(digits.as_bytes());
    json.push(b'\n');
    json
}

/// The JSON text of a sealed file; nothing if any byte of the file is not as it was written.
pub fn open(bytes: &[u8]) -> Option<&[u8]> {
    let (sealed, seal) = bytes.split_at_checked(bytes.len().checked_sub(SEAL)?)?;
    let json = sealed.strip_suffix(b"\n")?;
    // Compared as text: the same digits in capitals are not the written text.
    (seal.strip_suffix(b"\n")? == digits(sealed).as_bytes()).then_some(json)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The format: this may never change.
    #[test]
    fn golden() {
        assert_eq!(
            String::from_utf8(seal(b"{}".to_vec())).unwrap(),
            "{}\na7c4d54776fcb179f048728766a52d75dc450cc2a5072b7e2c238aa9b2cff3b6\n"
        );
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_found() {
        let sealed = seal(br#"{"a": [1, 2, "b"]}"#.to_vec());
        assert_eq!(open(&sealed), Some(&br#"{"a": [1, 2, "b"]}"#[..]));
        for at in 0..sealed.len() {
            for bit in 0..8 {
                let mut bytes = sealed.clone();
                bytes[at] ^= 1 << bit;
                assert_eq!(open(&bytes), None, "bit {bit} of byte {at}");
            }
            assert_eq!(open(&sealed[..at]), None, "cut to {at}");
        }
        let longer = [&sealed[..], b"\n"].concat();
        assert_eq!(open(&longer), None);
    }
}
