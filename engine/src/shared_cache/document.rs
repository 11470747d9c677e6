//! The documents of a layer cache, as they lie in a registry.
//!
//! - An OCI image index under the tag that is a step's key in hex: of each record a manifest, the
//!   newest first.
//! - An OCI image manifest: its configuration is the record, its one layer is the layer as an
//!   archive (tar, zstd), the same blob as in an exported image.
//! - A record: JSON, compressed with zstd where it is long. Its fields are those of [`Document`].
//!
//! A document that does not parse, is too large, or has another purpose is refused before it has an
//! effect.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;

use iii_oci::Digest;
use iii_oci::limits::MAX_PATH;
use iii_store::{Fact, KeyId, LayerId, Record, TreeId};
use serde::de::{self, DeserializeOwned, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::plan::Kind;

/// The kind of all these documents.
pub const ARTIFACT: &str = "application/vnd.iii.layer-cache.v1";
/// Media type of an index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Media type of a manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// Media type of a record.
pub const RECORD: &str = "application/vnd.iii.layer-cache.record.v1+json";
/// Annotation of an entry of an index: the hash of its record's facts.
pub const FACTS: &str = "dev.iii.cache.facts";
/// Annotation of an entry of an index: its layer.
pub const LAYER: &str = "dev.iii.cache.layer";

/// The format of records that is written, and the only one that is read.
const FORMAT: u32 = 2;
/// Most records of a key.
pub const MAX_RECORDS: usize = 8;
/// Longest record, in bytes, as it is stored.
pub const MAX_STORED: u64 = 16 << 20;
/// Longest record, in bytes, decompressed.
pub const MAX_PLAIN: usize = 64 << 20;
/// Length of a record from which it is compressed.
const COMPRESS_FROM: usize = 64 << 10;
const ZSTD_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
const ZSTD_LEVEL: i32 = 3;
/// Most facts of a record: as many as a step can have.
pub const MAX_FACTS: usize = iii_overlay::MAX_FACTS;
/// The longest time that a step is believed to have taken, in seconds: garbage collection keeps
/// slow builds longer.
const MAX_SECONDS: f64 = 6.0 * 3600.0;
/// Longest name of a version.
const MAX_VERSION: usize = 64;
/// Context of the hash of facts.
const FACTS_CONTEXT: &str = "iii 2026 layer cache facts v1";

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Of a later version, most likely.
    #[error("it is of format {0}, and this version of iii knows only {FORMAT}")]
    Format(u64),
    /// Not valid.
    #[error("it is not valid JSON of its kind")]
    Json(#[source] serde_json::Error),
    /// Cannot be decompressed.
    #[error("decompressing it failed")]
    Compression(#[source] std::io::Error),
    /// Too large.
    #[error("{what} is over the limit of {limit}")]
    Limit {
        /// The part that is too large.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// Meant for something else.
    #[error("it is {0}")]
    Other(&'static str),
    /// Facts that no step can have seen.
    #[error("its facts are wrong: {0}")]
    Facts(&'static str),
}

/// A record as it is stored: a [`Record`] of the store, with its key and kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// [`FORMAT`].
    format: u32,
    /// The step's key.
    pub key: KeyId,
    /// Setup or install.
    pub kind: Kind,
    /// The step's facts, in the order of [`iii_store::facts::sort`].
    #[serde(deserialize_with = "bounded_facts")]
    pub facts: Vec<Fact>,
    /// The layer.
    pub layer_id: LayerId,
    /// The layer without its mtimes.
    pub tree_id: TreeId,
    /// Digest of the layer's plain archive.
    pub diff_id: Digest,
    /// For people, and for garbage collection.
    pub provenance: Provenance,
}

/// When a layer was made, and how long that took.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// In seconds since 1970.
    created: u64,
    /// How long the step took.
    seconds: f64,
    /// The version that ran it.
    version: String,
}

/// Reads no more facts than there can be.
fn bounded_facts<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Fact>, D::Error> {
    struct Bounded;
    impl<'de> Visitor<'de> for Bounded {
        type Value = Vec<Fact>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX_FACTS} facts")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Fact>, A::Error> {
            let mut facts = Vec::new();
            while let Some(fact) = seq.next_element()? {
                if facts.len() >= MAX_FACTS {
                    return Err(de::Error::invalid_length(facts.len() + 1, &self));
                }
                facts.push(fact);
            }
            Ok(facts)
        }
    }
    from.deserialize_seq(Bounded)
}

fn check_facts(facts: &[Fact]) -> Result<(), DocumentError> {
    for fact in facts {
        if fact.path.len() > MAX_PATH {
            return Err(DocumentError::Facts("a path is too long"));
        }
        let mut names = fact.path.split(|&byte| byte == b'/');
        let is_root = fact.path.is_empty();
        if !is_root && names.any(|name| iii_store::tree::check_name(name).is_err()) {
            return Err(DocumentError::Facts("a path is not valid"));
        }
    }
    let before = |a: &Fact, b: &Fact| (&a.path, a.seen.how()) < (&b.path, b.seen.how());
    if !facts.is_sorted_by(before) {
        return Err(DocumentError::Facts("they are not in order"));
    }
    Ok(())
}

/// The hash of facts, by which records of an index are told apart.
pub fn facts_hash(facts: &[Fact]) -> Result<String, DocumentError> {
    let text = serde_json::to_vec(facts).map_err(DocumentError::Json)?;
    let hash = blake3::Hasher::new_derive_key(FACTS_CONTEXT)
        .update(&text)
        .finalize();
    Ok(hash.to_hex().to_string())
}

impl Document {
    /// The document of a record of the store, as a step of kind `kind` has it under `key`.
    pub fn new(key: KeyId, kind: Kind, record: &Record, diff_id: Digest) -> Self {
        let number = |name: &str| record.provenance.get(name);
        let version = record.provenance.get("version").and_then(|v| v.as_str());
        let mut facts = record.facts.clone();
        iii_store::facts::sort(&mut facts);
        Self {
            format: FORMAT,
            key,
            kind,
            facts,
            layer_id: record.layer_id,
            tree_id: record.tree_id,
            diff_id,
            provenance: Provenance {
                created: number("created")
                    .and_then(serde_json::Value::as_u64)
                    .unwrap_or(0),
                seconds: number("seconds")
                    .and_then(serde_json::Value::as_f64)
                    .unwrap_or(0.0),
                version: version.unwrap_or_default().to_owned(),
            },
        }
    }

    /// As it is stored. Equal documents are equal bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DocumentError> {
        check_facts(&self.facts)?;
        let plain = serde_json::to_vec(self).map_err(DocumentError::Json)?;
        let limit = |what, limit| DocumentError::Limit { what, limit };
        if self.facts.len() > MAX_FACTS {
            return Err(limit("the number of facts", MAX_FACTS as u64));
        }
        if plain.len() > MAX_PLAIN {
            return Err(limit("its length", MAX_PLAIN as u64));
        }
        if plain.len() < COMPRESS_FROM {
            return Ok(plain);
        }
        let stored =
            zstd::bulk::compress(&plain, ZSTD_LEVEL).map_err(DocumentError::Compression)?;
        if stored.len() as u64 > MAX_STORED {
            return Err(limit("its compressed length", MAX_STORED));
        }
        Ok(stored)
    }

    /// Reads a record that is to be one of a step of kind `kind` under `key`.
    pub fn parse(stored: &[u8], key: &KeyId, kind: Kind) -> Result<Self, DocumentError> {
        #[derive(Deserialize)]
        struct Head {
            format: u64,
        }
        let limit = |what, limit| DocumentError::Limit { what, limit };
        if stored.len() as u64 > MAX_STORED {
            return Err(limit("its compressed length", MAX_STORED));
        }
        let mut plain = Vec::new();
        let text = if stored.starts_with(&ZSTD_MAGIC) {
            let decoder = zstd::Decoder::with_buffer(stored).map_err(DocumentError::Compression)?;
            decoder
                .take(MAX_PLAIN as u64 + 1)
                .read_to_end(&mut plain)
                .map_err(DocumentError::Compression)?;
            &plain[..]
        } else {
            stored
        };
        if text.len() > MAX_PLAIN {
            return Err(limit("its length", MAX_PLAIN as u64));
        }
        let head: Head = serde_json::from_slice(text).map_err(DocumentError::Json)?;
        if head.format != u64::from(FORMAT) {
            return Err(DocumentError::Format(head.format));
        }
        let document: Self = serde_json::from_slice(text).map_err(DocumentError::Json)?;
        if document.key != *key {
            return Err(DocumentError::Other("a record of another key"));
        }
        if document.kind != kind {
            return Err(DocumentError::Other("a record of another kind of step"));
        }
        check_facts(&document.facts)?;
        Ok(document)
    }

    /// The record for the store, which came from `cache`.
    pub fn into_record(self, cache: &str) -> Record {
        let Provenance {
            created,
            seconds,
            mut version,
        } = self.provenance;
        version.retain(|c| c.is_ascii_graphic());
        version.truncate(MAX_VERSION);
        let seconds = if seconds.is_finite() {
            seconds.clamp(0.0, MAX_SECONDS)
        } else {
            0.0
        };
        let provenance = [
            ("kind", self.kind.to_string().into()),
            (iii_store::ORIGIN, cache.into()),
            ("seconds", seconds.into()),
            // Later is what a date cannot show.
            ("created", created.min(u64::from(u32::MAX)).into()),
            ("version", version.into()),
        ];
        Record {
            facts: self.facts,
            layer_id: self.layer_id,
            tree_id: self.tree_id,
            provenance: provenance
                .map(|(name, value): (_, serde_json::Value)| (name.to_owned(), value))
                .into_iter()
                .collect(),
        }
    }
}

/// Reference to a blob or a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// Of what kind the artifact is, for a manifest in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Its annotations.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// The descriptor of `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            artifact_type: None,
            annotations: BTreeMap::new(),
        }
    }
}

/// The records of one key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    /// The newest first.
    pub manifests: Vec<Descriptor>,
}

impl Index {
    /// An index of these manifests.
    pub fn new(manifests: Vec<Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: INDEX.to_owned(),
            artifact_type: ARTIFACT.to_owned(),
            manifests,
        }
    }

    /// Reads an index. Other entries, and records beyond the limit of a key, are left out.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let mut index: Self = parse(bytes)?;
        if index.artifact_type != ARTIFACT {
            return Err(DocumentError::Other("not an index of cached layers"));
        }
        let is_record = |one: &Descriptor| {
            one.media_type == MANIFEST && one.artifact_type.as_deref() == Some(ARTIFACT)
        };
        index.manifests.retain(is_record);
        index.manifests.truncate(MAX_RECORDS);
        Ok(index)
    }

    /// Puts `new` in front, in place of a record with the same facts.
    pub fn merge(&mut self, new: Descriptor) {
        let facts = new.annotations.get(FACTS).cloned();
        self.manifests
            .retain(|old| old.digest != new.digest && old.annotations.get(FACTS) != facts.as_ref());
        self.manifests.insert(0, new);
        self.manifests.truncate(MAX_RECORDS);
    }
}

/// A record and its layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    schema_version: u32,
    media_type: String,
    artifact_type: String,
    /// The record.
    pub config: Descriptor,
    layers: [Descriptor; 1],
}

impl Manifest {
    /// Of a record and the blob of its layer.
    pub fn new(record: Descriptor, layer: Descriptor) -> Self {
        Self {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            artifact_type: ARTIFACT.to_owned(),
            config: record,
            layers: [layer],
        }
    }

    /// Reads a manifest.
    pub fn parse(bytes: &[u8]) -> Result<Self, DocumentError> {
        let manifest: Self = parse(bytes)?;
        if manifest.artifact_type != ARTIFACT || manifest.config.media_type != RECORD {
            return Err(DocumentError::Other("not the manifest of a cached layer"));
        }
        Ok(manifest)
    }

    /// The blob of the layer.
    pub fn layer(&self) -> &Descriptor {
        let [layer] = &self.layers;
        layer
    }
}

/// As JSON.
pub fn to_json(document: &impl Serialize) -> Result<Vec<u8>, DocumentError> {
    serde_json::to_vec(document).map_err(DocumentError::Json)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DocumentError> {
    serde_json::from_slice(bytes).map_err(DocumentError::Json)
}

#[cfg(test)]
mod tests {
    use iii_store::{Kind as NodeKind, ObjectId, Seen};

    use super::*;

    fn key() -> KeyId {
        KeyId::from_bytes([7; 32])
    }

    fn fact(path: &str, seen: Seen) -> Fact {
        let path = path.as_bytes().to_vec();
        Fact { path, seen }
    }

    fn record(facts: Vec<Fact>) -> Record {
        Record {
            facts,
            layer_id: LayerId::from_bytes([1; 32]),
            tree_id: TreeId::from_bytes([2; 32]),
            provenance: serde_json::Map::from_iter([
                ("seconds".to_owned(), 1.5.into()),
                ("created".to_owned(), 1_800_000_000.into()),
                ("version".to_owned(), "0.1.0".into()),
                ("reason".to_owned(), "never told".into()),
                (iii_store::ORIGIN.to_owned(), "never told".into()),
            ]),
        }
    }

    fn document() -> Document {
        let stat = Seen::Stat {
            kind: NodeKind::Dir,
            exec: true,
        };
        let contents = Seen::Contents {
            object: ObjectId::of(b"{}"),
            exec: false,
        };
        let record = record(vec![
            fact("dir", stat),
            fact("package.json", contents),
            fact("yarn.lock", Seen::Absent),
        ]);
        Document::new(key(), Kind::Install, &record, Digest::of(b"tar"))
    }

    fn parse(bytes: &[u8]) -> Result<Document, String> {
        Document::parse(bytes, &key(), Kind::Install)
            .map_err(|error| iii_store::with_causes(&error))
    }

    /// The format of a record: it may change only together with its number.
    #[test]
    fn golden_record() {
        let bytes = document().to_bytes().unwrap();
        let expected = [
            r#"{"format":2,"key":"0707070707070707070707070707070707070707070707070707070707070707","#,
            r#""kind":"install","facts":[{"path":"dir","seen":{"stat":{"kind":"dir","exec":true}}},"#,
            r#"{"path":"package.json","seen":{"contents":{"object":"#,
            r#""6e46dd10defc9b56c29a6ec56b508c21f54c08192194e4df25bf36f0c9c3c279","exec":false}}},"#,
            r#"{"path":"yarn.lock","seen":"absent"}],"#,
            r#""layer_id":"0101010101010101010101010101010101010101010101010101010101010101","#,
            r#""tree_id":"0202020202020202020202020202020202020202020202020202020202020202","#,
            r#""diff_id":"sha256:90aebae315675cbf04612de4f7d5874850f48e0b8dd82becbeaa47ca93f5ebfb","#,
            r#""provenance":{"created":1800000000,"seconds":1.5,"version":"0.1.0"}}"#,
        ]
        .concat();
        assert_eq!(String::from_utf8(bytes.clone()).unwrap(), expected);
        assert_eq!(parse(&bytes), Ok(document()));
    }

    #[test]
    fn a_record_comes_back_and_says_where_from() {
        let stored = document().to_bytes().unwrap();
        let back = parse(&stored).unwrap().into_record("docker://a/b");
        assert_eq!(back.origin(), Some("docker://a/b"));
        assert_eq!(back.facts, document().facts);
        assert_eq!(back.provenance["seconds"], 1.5);
        assert_eq!(back.provenance.get("reason"), None);
        // Passed on, it has the same bytes.
        let passed_on = Document::new(key(), Kind::Install, &back, Digest::of(b"tar"));
        assert_eq!(passed_on.to_bytes().unwrap(), stored);
    }

    #[test]
    fn long_records_are_compressed() {
        let facts = (0..5000).map(|at| fact(&format!("file-{at:05}"), Seen::Absent));
        let record = record(facts.collect());
        let document = Document::new(key(), Kind::Install, &record, Digest::of(b""));
        let stored = document.to_bytes().unwrap();
        assert!(stored.starts_with(&ZSTD_MAGIC) && stored.len() < 64 << 10);
        assert_eq!(parse(&stored), Ok(document));
    }

    #[test]
    fn hostile_records_are_refused() {
        let text = String::from_utf8(document().to_bytes().unwrap()).unwrap();
        let with = |from: &str, to: &str| {
            assert!(text.contains(from), "{from}");
            text.replacen(from, to, 1).into_bytes()
        };
        let zeros = zstd::bulk::compress(&vec![b' '; MAX_PLAIN + 1], 1).unwrap();
        let many = vec![r#"{"path":"","seen":"absent"}"#; MAX_FACTS + 1].join(",");
        let facts_at = text.find("\"facts\":[").unwrap() + 9;
        let many = format!("{}{many},{}", &text[..facts_at], &text[facts_at..]);
        let long = format!("\"path\":\"{}\"", "a/".repeat(MAX_PATH));
        let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for (what, bytes, message) in [
            ("nothing", Vec::new(), "not valid JSON"),
            ("nonsense", b"<html>".to_vec(), "not valid JSON"),
            ("depth", nested.into_bytes(), "not valid JSON"),
            (
                "format",
                with("\"format\":2", "\"format\":1"),
                "it is of format 1",
            ),
            (
                "later",
                b"{\"format\":7,\"x\":1}".to_vec(),
                "it is of format 7",
            ),
            ("no format", b"{}".to_vec(), "not valid JSON"),
            ("key", with(":\"0707", ":\"0708"), "another key"),
            (
                "kind",
                with("\"kind\":\"install\"", "\"kind\":\"setup\""),
                "another kind",
            ),
            (
                "no kind",
                with("\"kind\":\"install\"", "\"kind\":\"x\""),
                "not valid JSON",
            ),
            ("order", with("package.json", "z"), "not in order"),
            (
                "twice",
                with(
                    "{\"path\":\"yarn.lock\",\"seen\":\"absent\"}",
                    "{\"path\":\"a\",\"seen\":\"absent\"},{\"path\":\"a\",\"seen\":\"absent\"}",
                ),
                "not in order",
            ),
            (
                "dots",
                with("\"yarn.lock\"", "\"z/../../etc\""),
                "a path is not valid",
            ),
            (
                "absolute",
                with("\"yarn.lock\"", "\"/z\""),
                "a path is not valid",
            ),
            (
                "zero",
                with("\"yarn.lock\"", "\"z%00\""),
                "a path is not valid",
            ),
            ("long", with("\"path\":\"yarn.lock\"", &long), "too long"),
            ("many", many.into_bytes(), "at most 200000 facts"),
            ("bomb", zeros, "over the limit of 67108864"),
            (
                "large",
                vec![b' '; MAX_STORED as usize + 1],
                "over the limit of 16777216",
            ),
            (
                "broken zstd",
                [&ZSTD_MAGIC[..], &[0xff; 9]].concat(),
                "decompressing",
            ),
        ] {
            let error = parse(&bytes).expect_err(what);
            assert!(error.contains(message), "{what}: {error}");
        }
        // An impossible value counts only as far as it does no harm.
        for (seconds, kept) in [("1e300", MAX_SECONDS), ("-5", 0.0), ("2", 2.0)] {
            let bytes = with("\"seconds\":1.5", &format!("\"seconds\":{seconds}"));
            let record = parse(&bytes).unwrap().into_record("c");
            assert_eq!(record.provenance["seconds"], kept);
        }
        let bytes = with("\"0.1.0\"", "\"0\\u001b[31m 1\"");
        let record = parse(&bytes).unwrap().into_record("c");
        assert_eq!(record.provenance["version"], "0[31m1");
    }

    #[test]
    fn no_variant_of_a_document_is_too_much() {
        let record = document().to_bytes().unwrap();
        let entry = Descriptor::of(MANIFEST, b"{}");
        let index = to_json(&Index::new(vec![entry.clone()])).unwrap();
        let manifest = to_json(&Manifest::new(entry.clone(), entry)).unwrap();
        for bytes in [record, index, manifest] {
            for at in 0..bytes.len() {
                for byte in [0, b'"', b'9', b'{', 0xff] {
                    let mut variant = bytes.clone();
                    variant[at] = byte;
                    for some in [&variant[..], &variant[..at]] {
                        let _ = parse(some);
                        let _ = Index::parse(some);
                        let _ = Manifest::parse(some);
                    }
                }
            }
        }
    }

    #[test]
    fn an_index_keeps_one_record_for_the_same_facts_and_no_more_than_a_key_has() {
        let entry = |facts: &str, bytes: &[u8]| Descriptor {
            artifact_type: Some(ARTIFACT.into()),
            annotations: [(FACTS.to_owned(), facts.to_owned())].into(),
            ..Descriptor::of(MANIFEST, bytes)
        };
        let mut index = Index::new(Vec::new());
        index.merge(entry("a", b"1"));
        index.merge(entry("b", b"2"));
        index.merge(entry("a", b"3"));
        assert_eq!(index.manifests, [entry("a", b"3"), entry("b", b"2")]);
        for at in 0..=MAX_RECORDS {
            index.merge(entry(&at.to_string(), &[at as u8]));
        }
        assert_eq!(index.manifests.len(), MAX_RECORDS);
        let mut other = index.clone();
        // Other entries, and surplus records, are left out.
        other
            .manifests
            .insert(1, Descriptor::of(MANIFEST, b"an image"));
        other.manifests.push(entry("z", b"z"));
        let bytes = to_json(&other).unwrap();
        assert_eq!(Index::parse(&bytes).unwrap(), index);
        other.artifact_type = "a/b".into();
        Index::parse(&to_json(&other).unwrap()).unwrap_err();
        let record = Descriptor::of(RECORD, b"{}");
        let manifest = Manifest::new(record.clone(), Descriptor::of("x", b""));
        assert_eq!(
            Manifest::parse(&to_json(&manifest).unwrap()).unwrap(),
            manifest
        );
        for wrong in [
            Manifest::new(Descriptor::of("x", b""), record.clone()),
            Manifest {
                artifact_type: "x".into(),
                ..manifest.clone()
            },
        ] {
            Manifest::parse(&to_json(&wrong).unwrap()).unwrap_err();
        }
        let mut two = serde_json::to_value(&manifest).unwrap();
        two["layers"] = serde_json::json!([record, record]);
        Manifest::parse(two.to_string().as_bytes()).unwrap_err();
    }

    #[test]
    fn equal_facts_have_equal_hashes() {
        let hash = |facts: &[Fact]| facts_hash(facts).unwrap();
        let one = [fact("a", Seen::Absent)];
        assert_eq!(hash(&one), hash(&one.clone()));
        assert_ne!(hash(&one), hash(&[]));
        assert_ne!(hash(&one), hash(&[fact("b", Seen::Absent)]));
    }
}
