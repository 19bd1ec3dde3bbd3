//! References to snapshots as people type them: `latest`, `latest~3`, `3f9a`, a tag.

use std::collections::BTreeMap;

use crate::catalog::SnapshotInfo;
use crate::error::{Result, StoreError};
use crate::id::SnapshotId;

/// The shortest prefix that is taken for an id.
const MIN_PREFIX_LEN: usize = 4;

/// The reference to the newest snapshot.
pub const LATEST: &str = "latest";

/// Splits `STORE@REF`; either part may be missing. Splits at the last `@`, since a path may contain
/// one. A missing REF after `@` is [`LATEST`].
#[must_use]
pub fn split(text: &str) -> (Option<&str>, &str) {
    match text.rsplit_once('@') {
        Some((store, reference)) => {
            let store = (!store.is_empty()).then_some(store);
            (store, if reference.is_empty() { LATEST } else { reference })
        }
        None => (None, text),
    }
}

/// Checks that `name` can be a tag: it must not look like another kind of reference.
///
/// # Errors
/// [`StoreError::Invalid`] if not; the message says what a tag may be.
pub fn check_tag(name: &str) -> Result<()> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    let like_an_id =
        name.len() >= MIN_PREFIX_LEN && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    if name.is_empty()
        || name.len() > crate::journal_entry::MAX_TAG_LEN
        || !name.chars().all(allowed)
        || name == LATEST
        || like_an_id
    {
        return Err(StoreError::Invalid(format!(
            "`{name}` cannot be a tag: expected up to 255 letters, digits, `-`, `_`, `.` or `/`, \
             but not `{LATEST}` and not just four or more hex digits (which look like an id)"
        )));
    }
    Ok(())
}

pub(crate) fn resolve(
    snapshots: &[SnapshotInfo],
    tags: &BTreeMap<String, SnapshotId>,
    reference: &str,
    store: &str,
) -> Result<SnapshotInfo> {
    let unknown = |hint: String| StoreError::UnknownRef {
        reference: reference.to_owned(),
        store: store.to_owned(),
        hint,
    };
    let (base, generations) = match reference.split_once('~') {
        None => (reference, 0),
        Some((base, "")) => (base, 1),
        Some((base, digits)) => {
            let parsed = digits.parse::<usize>();
            (
                base,
                parsed.map_err(|_| {
                    unknown(format!("expected a number after `~`, found `{digits}`"))
                })?,
            )
        }
    };
    let mut found = resolve_base(snapshots, tags, base, store, &unknown)?;
    for generation in 0..generations {
        // Parents form a cycle, which only a forged journal can have.
        if generation >= snapshots.len() {
            return Err(unknown(format!("{base} cannot have {generations} ancestors")));
        }
        let parent = found
            .parent
            .ok_or_else(|| unknown(format!("{base} has only {generation} ancestors")))?;
        found = by_id(snapshots, parent)
            .ok_or_else(|| unknown(format!("ancestor {} was forgotten", parent.short())))?;
    }
    Ok(found)
}

fn resolve_base(
    snapshots: &[SnapshotInfo],
    tags: &BTreeMap<String, SnapshotId>,
    base: &str,
    store: &str,
    unknown: &dyn Fn(String) -> StoreError,
) -> Result<SnapshotInfo> {
    if base == LATEST {
        return snapshots
            .last()
            .copied()
            .ok_or_else(|| unknown("the store has no snapshots yet".into()));
    }
    if let Some(id) = tags.get(base) {
        return by_id(snapshots, *id)
            .ok_or_else(|| unknown(format!("tag `{base}` points to a forgotten snapshot")));
    }
    let prefix = base.to_ascii_lowercase();
    if prefix.len() < MIN_PREFIX_LEN || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(unknown(format!(
            "expected `{LATEST}`, a tag, or at least {MIN_PREFIX_LEN} digits of an id; `frazil log` lists them"
        )));
    }
    let matches: Vec<_> =
        snapshots.iter().filter(|info| info.id.to_string().starts_with(&prefix)).collect();
    match matches.as_slice() {
        [] => Err(unknown(format!(
            "none of its {} snapshots has that id; `frazil log` lists them",
            snapshots.len()
        ))),
        [one] => Ok(**one),
        several => Err(StoreError::AmbiguousRef {
            reference: base.to_owned(),
            store: store.to_owned(),
            matches: several
                .iter()
                .take(4)
                .map(|info| info.id.short())
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

fn by_id(snapshots: &[SnapshotInfo], id: SnapshotId) -> Option<SnapshotInfo> {
    snapshots.iter().rev().find(|info| info.id == id).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::{BlockRef, Hash};

    #[test]
    fn ancestors_in_a_circle_come_to_an_end() {
        let mut snapshots = line(3);
        snapshots[0].parent = Some(snapshots[2].id);
        let error = resolve(&snapshots, &BTreeMap::new(), "latest~18446744073709551615", "store");
        assert!(error.unwrap_err().to_string().contains("cannot have"));
    }

    fn line(count: u8) -> Vec<SnapshotInfo> {
        let manifest = BlockRef { segment: 0, offset: 0, len: 0, hash: Hash([0; 32]) };
        (0..count)
            .map(|index| SnapshotInfo {
                id: Hash([index; 32]),
                parent: index.checked_sub(1).map(|parent| Hash([parent; 32])),
                time_unix_ms: u64::from(index),
                manifest,
                fingerprints: None,
            })
            .collect()
    }

    #[test]
    fn references_resolve() {
        let line = line(5);
        let tags = BTreeMap::from([("gold".to_owned(), Hash([2; 32]))]);
        let find = |text: &str| resolve(&line, &tags, text, "s").map(|info| info.id.0[0]);
        assert_eq!(find("latest").unwrap(), 4);
        assert_eq!(find("latest~").unwrap(), 3);
        assert_eq!(find("latest~4").unwrap(), 0);
        assert_eq!(find("0303").unwrap(), 3);
        assert_eq!(find("gold~1").unwrap(), 1);
        for bad in [
            "latest~5",
            "latest~x",
            "03",
            "0909",
            "silver",
            "",
            "~1",
            "latest~99999999999999999999",
        ] {
            assert!(matches!(find(bad), Err(StoreError::UnknownRef { .. })), "{bad}");
        }
        assert!(matches!(resolve(&[], &tags, "latest", "s"), Err(StoreError::UnknownRef { .. })));
    }

    #[test]
    fn prefixes_must_be_unique() {
        let mut line = line(2);
        line[1].id.0 = [0; 32];
        line[1].id.0[31] = 1;
        let error = resolve(&line, &BTreeMap::new(), "0000", "s").unwrap_err();
        assert!(matches!(error, StoreError::AmbiguousRef { .. }), "{error}");
    }

    #[test]
    fn stores_and_references_split() {
        assert_eq!(split("/a@b/store@latest~2"), (Some("/a@b/store"), "latest~2"));
        assert_eq!(split("store@"), (Some("store"), "latest"));
        assert_eq!(split("@gold"), (None, "gold"));
        assert_eq!(split("3f9a"), (None, "3f9a"));
    }

    #[test]
    fn tags_do_not_look_like_ids() {
        for good in ["gold", "release/1.2", "abc"] {
            assert!(check_tag(good).is_ok(), "{good}");
        }
        for bad in ["", "latest", "beef", "a b", "x~1", "a@b"] {
            assert!(check_tag(bad).is_err(), "{bad}");
        }
    }
}
