//! The contents of journal records.

use crate::codec::{Decoded, Decoder, Malformed, put_block_ref};
use crate::id::{BlockRef, Hash, SnapshotId};
use crate::journal::MAX_BODY_LEN;
use crate::layout::Relayout;

/// The most snapshots in one forget record, and the most numbers in each list of a relayout.
pub(crate) const MAX_LISTED: usize = 30_000;
/// The longest tag, in bytes.
pub(crate) const MAX_TAG_LEN: usize = 255;

const KIND_PUBLISH: u32 = 1;
const KIND_TAG: u32 = 2;
const KIND_FORGET: u32 = 3;
const KIND_RELAYOUT: u32 = 4;

const _: () = assert!(MAX_LISTED * 32 <= MAX_BODY_LEN && MAX_LISTED * 3 * 4 + 128 <= MAX_BODY_LEN);

/// The event that one journal record stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    Publish(Publication),
    /// The tag points to `target` from here on; without a target, the tag is removed.
    Tag {
        name: String,
        target: Option<SnapshotId>,
    },
    /// These snapshots are forgotten; at most [`MAX_LISTED`].
    Forget(Vec<SnapshotId>),
    /// Pruning changed the files; at most [`MAX_LISTED`] numbers in each list.
    Relayout(Relayout),
}

/// A snapshot that is published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Publication {
    pub id: SnapshotId,
    pub parent: Option<SnapshotId>,
    pub manifest: BlockRef,
    pub time_unix_ms: u64,
    /// Where the next transaction continues: segment and offset in bytes.
    pub tail: (u32, u64),
    /// The fingerprints of the pages this transaction wrote, if it kept any.
    pub fingerprints: Option<BlockRef>,
}

impl Entry {
    pub fn kind(&self) -> u32 {
        match self {
            Self::Publish(_) => KIND_PUBLISH,
            Self::Tag { .. } => KIND_TAG,
            Self::Forget(_) => KIND_FORGET,
            Self::Relayout(_) => KIND_RELAYOUT,
        }
    }

    pub fn encode_body(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(160);
        match self {
            Self::Publish(publication) => {
                body.extend_from_slice(&publication.id.0);
                put_optional_id(&mut body, publication.parent);
                put_block_ref(&mut body, &publication.manifest);
                body.extend_from_slice(&publication.time_unix_ms.to_le_bytes());
                put_tail(&mut body, publication.tail);
                put_optional_ref(&mut body, publication.fingerprints.as_ref());
            }
            Self::Tag { name, target } => {
                put_optional_id(&mut body, *target);
                body.extend_from_slice(name.as_bytes());
            }
            Self::Forget(ids) => ids.iter().for_each(|id| body.extend_from_slice(&id.0)),
            Self::Relayout(Relayout { tail, next_pack, pack, moved, dropped, retired_packs }) => {
                body.push(u8::from(tail.is_some()));
                put_tail(&mut body, tail.unwrap_or_default());
                body.extend_from_slice(&next_pack.to_le_bytes());
                put_optional_ref(&mut body, pack.as_ref());
                for list in [moved, dropped, retired_packs] {
                    body.extend_from_slice(&(list.len() as u32).to_le_bytes());
                    list.iter().for_each(|number| body.extend_from_slice(&number.to_le_bytes()));
                }
            }
        }
        body
    }

    pub fn decode_body(kind: u32, body: &[u8]) -> Decoded<Self> {
        let mut decoder = Decoder::new(body);
        match kind {
            KIND_PUBLISH => {
                let publication = Publication {
                    id: decoder.hash("snapshot id")?,
                    parent: optional_id(&mut decoder)?,
                    manifest: decoder.block_ref("manifest reference")?,
                    time_unix_ms: decoder.u64("time")?,
                    tail: (decoder.u32("segment")?, decoder.u64("segment length")?),
                    fingerprints: optional_ref(&mut decoder, "fingerprints")?,
                };
                decoder.finish("published snapshot")?;
                Ok(Self::Publish(publication))
            }
            KIND_TAG => {
                let target = optional_id(&mut decoder)?;
                let name = std::str::from_utf8(decoder.rest())
                    .map_err(|error| Malformed::new("tag", "UTF-8", error))?;
                Ok(Self::Tag { name: name.to_owned(), target })
            }
            KIND_FORGET => {
                let mut ids = Vec::with_capacity(body.len() / 32);
                while !decoder.is_empty() {
                    ids.push(decoder.hash("snapshot id")?);
                }
                Ok(Self::Forget(ids))
            }
            KIND_RELAYOUT => {
                let has_tail = flag(&mut decoder, "presence of a tail")?;
                let tail = (decoder.u32("segment")?, decoder.u64("segment length")?);
                let relayout = Relayout {
                    tail: has_tail.then_some(tail),
                    next_pack: decoder.u32("number of the next pack")?,
                    pack: optional_ref(&mut decoder, "pack index")?,
                    moved: numbers(&mut decoder, "moved segments")?,
                    dropped: numbers(&mut decoder, "dropped segments")?,
                    retired_packs: numbers(&mut decoder, "retired packs")?,
                };
                decoder.finish("relayout")?;
                Ok(Self::Relayout(relayout))
            }
            other => Err(Malformed::new("journal record kind", "1 to 4", other)),
        }
    }
}

fn put_tail(out: &mut Vec<u8>, (segment, offset): (u32, u64)) {
    out.extend_from_slice(&segment.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
}

fn put_optional_ref(out: &mut Vec<u8>, block: Option<&BlockRef>) {
    out.push(u8::from(block.is_some()));
    if let Some(block) = block {
        put_block_ref(out, block);
    }
}

fn optional_ref(decoder: &mut Decoder<'_>, what: &'static str) -> Decoded<Option<BlockRef>> {
    flag(decoder, "presence of a reference")?.then(|| decoder.block_ref(what)).transpose()
}

fn flag(decoder: &mut Decoder<'_>, what: &'static str) -> Decoded<bool> {
    match decoder.u8(what)? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Malformed::new(what, "0 or 1", other)),
    }
}

fn numbers(decoder: &mut Decoder<'_>, what: &'static str) -> Decoded<Vec<u32>> {
    let count = decoder.u32(what)? as usize;
    if count > MAX_LISTED {
        return Err(Malformed::new(what, format!("at most {MAX_LISTED}"), count));
    }
    (0..count).map(|_| decoder.u32(what)).collect()
}

fn put_optional_id(out: &mut Vec<u8>, id: Option<SnapshotId>) {
    out.push(u8::from(id.is_some()));
    out.extend_from_slice(&id.unwrap_or(Hash([0; 32])).0);
}

fn optional_id(decoder: &mut Decoder<'_>) -> Decoded<Option<SnapshotId>> {
    let present = flag(decoder, "presence of an id")?;
    let id = decoder.hash("id")?;
    Ok(present.then_some(id))
}
