//! Identities. One `Copy` newtype per kind, all 32 bytes of BLAKE3, written as 64 hex digits.
//!
//! They never convert into one another: an object id is not a tree id, nor an OCI `sha256:`
//! digest.

use std::fmt;
use std::str::FromStr;

/// Length of every id, in bytes.
pub const ID_LEN: usize = 32;

/// A string that is not the 64 lower- or upper-case hex digits of an id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not an id: expected 64 hex digits, got {0:?}")]
pub struct ParseIdError(String);

macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; ID_LEN]);

        impl $name {
            /// The id with these bytes.
            pub const fn from_bytes(bytes: [u8; ID_LEN]) -> Self {
                Self(bytes)
            }

            /// The bytes of the id.
            pub const fn as_bytes(&self) -> &[u8; ID_LEN] {
                &self.0
            }

            /// The first ten hex digits, for users where space is short.
            pub fn short(&self) -> String {
                let mut text = self.to_string();
                text.truncate(10);
                text
            }
        }

        impl From<blake3::Hash> for $name {
            fn from(hash: blake3::Hash) -> Self {
                Self(*hash.as_bytes())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                blake3::Hash::from_hex(text)
                    .map(Self::from)
                    .map_err(|_| ParseIdError(text.chars().take(80).collect()))
            }
        }

        impl serde::Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id_type! {
    /// BLAKE3 of a file's bytes.
    ObjectId
}
id_type! {
    /// Id of a tree's contents: names, types, modes, owners, contents, xattrs and hardlinks, but no
    /// mtimes. Equal on every machine for equal trees; the id that cache keys and equality use.
    TreeId
}
id_type! {
    /// Id of a tree with its mtimes, as stored and served.
    LayerId
}
id_type! {
    /// The inputs of a recipe.
    KeyId
}
id_type! {
    /// BLAKE3 of a pack's index, and so of which objects it holds and where.
    PackId
}
id_type! {
    /// Digest of the contents seen at a path: see [`crate::facts`].
    SeenHash
}

id_type! {
    /// Facts: looks at a project, and their answers.
    FactsId
}
id_type! {
    /// Looks at a project, whatever their answers.
    LooksId
}

impl ObjectId {
    /// The id of these bytes.
    pub fn of(bytes: &[u8]) -> Self {
        blake3::hash(bytes).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_object_ids() {
        let empty = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(ObjectId::of(b"").to_string(), empty);
        assert_eq!(empty.parse::<ObjectId>().unwrap(), ObjectId::of(b""));
        assert_eq!(ObjectId::of(b"").short(), "af1349b9f5");
    }

    #[test]
    fn refuses_what_is_not_an_id() {
        for text in [
            "",
            "af13",
            "zz1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
        ] {
            assert!(text.parse::<TreeId>().is_err(), "{text:?}");
        }
    }
}
