//! State chunks: `(name, kind, version, body)`, one for each vCPU and device.
//!
//! Saved types are separate from the runtime's and KVM's. Each conversion names every field, so a
//! new field breaks the build instead of being lost.

use std::collections::BTreeMap;

use frazil_snapstore::StateChunk;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::error::{Result, VmmError};

/// Declares a saved type with the fields of a runtime type, and conversions in both directions.
/// Their patterns name every field: one that the runtime type gains breaks the build.
macro_rules! saved_twin {
    ($(#[$meta:meta])* $vis:vis struct $saved:ident = $runtime:ident { $($field:ident: $type:ty),* $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        #[serde(deny_unknown_fields)]
        #[allow(missing_docs)] // the names are those of the data sheets
        $vis struct $saved {
            $(pub $field: $type,)*
        }

        impl From<$runtime> for $saved {
            fn from(state: $runtime) -> Self {
                let $runtime { $($field,)* } = state;
                Self { $($field,)* }
            }
        }

        impl From<$saved> for $runtime {
            fn from(saved: $saved) -> Self {
                let $saved { $($field,)* } = saved;
                Self { $($field,)* }
            }
        }
    };
}
pub(crate) use saved_twin;

/// A type that is saved as the body of a chunk.
pub trait Saved: Serialize + DeserializeOwned {
    /// What kind of thing this is the state of.
    const KIND: &'static str;
    /// The version this program writes.
    const VERSION: u32;

    /// Upgrades a body from `version` to the next one. The default suits types that have had only
    /// one version.
    ///
    /// # Errors
    /// A message that says what is wrong with the body, or that the version was never written.
    fn upgrade(version: u32, _body: Value) -> Result<Value, String> {
        Err(never_written(version))
    }
}

/// The error message for a version that no program has ever written.
pub(crate) fn never_written(version: u32) -> String {
    format!("version {version} was never written")
}

/// Encodes `saved` as the chunk `name`.
///
/// # Errors
/// [`VmmError::State`] if it cannot be encoded.
pub fn chunk<T: Saved>(name: &str, saved: &T) -> Result<StateChunk> {
    let body = serde_json::to_value(saved).map_err(|error| VmmError::State {
        chunk: name.to_owned(),
        expected: "a body that can be encoded".into(),
        found: error.to_string(),
    })?;
    Ok(StateChunk { name: name.to_owned(), kind: T::KIND.to_owned(), version: T::VERSION, body })
}

/// The chunks of a snapshot from which a machine is being built. Each of them must be taken.
#[derive(Debug)]
pub struct ChunkSet {
    chunks: BTreeMap<String, StateChunk>,
}

impl ChunkSet {
    /// # Errors
    /// [`VmmError::State`] if two chunks have the same name.
    pub fn new(chunks: Vec<StateChunk>) -> Result<Self> {
        let mut by_name = BTreeMap::new();
        for chunk in chunks {
            if let Some(twice) = by_name.insert(chunk.name.clone(), chunk) {
                return Err(VmmError::State {
                    chunk: twice.name,
                    expected: "one chunk of that name".into(),
                    found: "two".into(),
                });
            }
        }
        Ok(Self { chunks: by_name })
    }

    /// True if there is a chunk `name` that was not taken yet.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.chunks.contains_key(name)
    }

    /// Takes chunk `name`, upgraded to the newest version.
    ///
    /// # Errors
    /// [`VmmError::State`] if the chunk is missing, of another kind or newer than this program, or
    /// its body does not parse.
    pub fn take<T: Saved>(&mut self, name: &str) -> Result<T> {
        let wrong = |expected: String, found: String| VmmError::State {
            chunk: name.to_owned(),
            expected,
            found,
        };
        let chunk = self
            .chunks
            .remove(name)
            .ok_or_else(|| wrong("a chunk of that name in the snapshot".into(), "none".into()))?;
        if chunk.kind != T::KIND {
            return Err(wrong(format!("kind {}", T::KIND), chunk.kind));
        }
        if chunk.version > T::VERSION {
            return Err(wrong(
                format!("version {} or older of {}", T::VERSION, T::KIND),
                format!("version {}: use a newer frazil", chunk.version),
            ));
        }
        // Upgrades of older versions rely on this.
        if !chunk.body.is_object() {
            let expected = format!("a body of {} with named fields", T::KIND);
            return Err(wrong(expected, "none".into()));
        }
        let body = (chunk.version..T::VERSION).try_fold(chunk.body, |body, version| {
            T::upgrade(version, body)
                .map_err(|error| wrong(format!("a body of version {version}"), error))
        })?;
        serde_json::from_value(body).map_err(|error| {
            wrong(format!("a body of {} version {}", T::KIND, T::VERSION), error.to_string())
        })
    }

    /// Checks that all chunks were taken.
    ///
    /// # Errors
    /// [`VmmError::State`], which names a chunk that was not taken: the state of a device that this
    /// program does not have.
    pub fn finish(self) -> Result<()> {
        match self.chunks.into_values().next() {
            None => Ok(()),
            Some(chunk) => Err(VmmError::State {
                chunk: chunk.name,
                expected: "a device this frazil knows".into(),
                found: format!(
                    "kind {}, version {}: use a newer frazil",
                    chunk.kind, chunk.version
                ),
            }),
        }
    }
}

/// Serializes a 64-bit number as `"0x…"`: exact in every JSON reader, and the way that people read
/// addresses.
pub mod hex_u64 {
    use serde::{Deserialize, Deserializer, Serializer};

    /// # Errors
    /// The serializer's.
    #[allow(clippy::trivially_copy_pass_by_ref)] // serde fixes the signature
    pub fn serialize<S: Serializer>(value: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{value:#x}"))
    }

    /// # Errors
    /// If the value is not such a text.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text
            .strip_prefix("0x")
            .ok_or_else(|| serde::de::Error::custom(format!("expected 0x…, found `{text}`")))?;
        u64::from_str_radix(digits, 16)
            .map_err(|_| serde::de::Error::custom(format!("expected hex digits, found `{text}`")))
    }
}

/// Bytes saved as hex digits, for state whose layout only the processor's manual defines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HexBytes(pub Vec<u8>);

impl Serialize for HexBytes {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |value: u8| DIGITS[usize::from(value)] as char;
        let text: String =
            self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
        serializer.serialize_str(&text)
    }
}

impl<'de> serde::Deserialize<'de> for HexBytes {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        let digits = text.as_bytes();
        if !digits.len().is_multiple_of(2) {
            return Err(D::Error::custom("expected an even number of hex digits"));
        }
        let value = |digit: u8| {
            (digit as char).to_digit(16).ok_or_else(|| D::Error::custom("expected hex digits"))
        };
        let pairs = digits.chunks_exact(2);
        let bytes = pairs
            .map(|pair| Ok((value(pair[0])? << 4 | value(pair[1])?) as u8))
            .collect::<Result<_, D::Error>>()?;
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Thing {
        #[serde(with = "hex_u64")]
        address: u64,
        bytes: HexBytes,
        added: u8,
    }

    impl Saved for Thing {
        const KIND: &'static str = "thing";
        const VERSION: u32 = 2;

        fn upgrade(version: u32, mut body: Value) -> Result<Value, String> {
            if version != 1 {
                return Err("never written".into());
            }
            body["added"] = 7.into();
            Ok(body)
        }
    }

    fn set(kind: &str, version: u32, body: Value) -> ChunkSet {
        ChunkSet::new(vec![StateChunk { name: "t".into(), kind: kind.into(), version, body }])
            .unwrap()
    }

    #[test]
    fn chunks_round_trip_and_upgrade() {
        let thing = Thing { address: u64::MAX, bytes: HexBytes(vec![0, 0xab]), added: 7 };
        let saved = chunk("t", &thing).unwrap();
        assert_eq!(saved.body["address"], "0xffffffffffffffff");
        let mut chunks = ChunkSet::new(vec![saved]).unwrap();
        assert_eq!(chunks.take::<Thing>("t").unwrap(), thing);
        chunks.finish().unwrap();
        let old = serde_json::json!({"address": "0xffffffffffffffff", "bytes": "00ab"});
        assert_eq!(set("thing", 1, old).take::<Thing>("t").unwrap(), thing);
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let refused = |result: Result<Thing>| match result {
            Err(VmmError::State { chunk, .. }) => assert_eq!(chunk, "t"),
            other => panic!("{other:?}"),
        };
        refused(set("other", 2, Value::Null).take("t"));
        refused(set("thing", 3, Value::Null).take("t"));
        refused(set("thing", 0, Value::Null).take("t"));
        for version in [1, 2] {
            refused(set("thing", version, Value::Null).take("t"));
            refused(set("thing", version, serde_json::json!([1])).take("t"));
        }
        refused(ChunkSet::new(Vec::new()).unwrap().take("t"));
        assert!(set("thing", 2, Value::Null).finish().is_err());
        let twice = set("a", 1, Value::Null).chunks.into_values().next().unwrap();
        assert!(ChunkSet::new(vec![twice.clone(), twice]).is_err());
    }
}
