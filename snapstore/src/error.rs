//! Errors of the store, with messages that a person can act on.
//!
//! Each message names the place (store, file, offset), what was expected, what was found and
//! what to do about it.

use std::io;

use crate::format::{JOURNAL_FILE, STORE_FILE};

/// Every error the store returns.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The operating system refused an operation on one of the store's files.
    #[error("cannot {op} {file}: {source}")]
    Io {
        /// The attempted operation, as a verb: "read", "append to", "sync", …
        op: &'static str,
        /// The file, as the storage names it.
        file: String,
        /// The system's own error.
        #[source]
        source: io::Error,
    },

    /// The medium is full. The space that the failed transaction had used was freed again.
    #[error(
        "no space left on the device: cannot {op} {file}; the unfinished write was discarded and \
         its space released, and all existing snapshots are intact: free some space (`frazil \
         forget`, then `frazil prune`) or use another disk, and try again"
    )]
    DiskFull {
        /// The attempted operation, as a verb.
        op: &'static str,
        /// The file that could not grow.
        file: String,
    },

    /// The directory holds no store.
    #[error(
        "{path} is not a frazil store: expected {expected}, found {found}; pass the directory \
         given as --store when the VM ran, or create one with `frazil run --store DIR`"
    )]
    NotAStore {
        /// The path that was opened.
        path: String,
        /// What a store would have there.
        expected: &'static str,
        /// What was found there.
        found: String,
    },

    /// The store was written by a later format than this program reads.
    #[error(
        "{file} has format version {found}, but this frazil reads versions up to {expected}: use \
         a newer frazil"
    )]
    UnsupportedVersion {
        /// The file whose header has that version.
        file: String,
        /// The newest version this program reads.
        expected: u32,
        /// The version found.
        found: u32,
    },

    /// Bytes do not match the reference to them, or do not parse.
    #[error(
        "{file} is damaged at offset {offset}: {what}: expected {expected}, found {found}; {}",
        remedy(.file)
    )]
    Corrupt {
        /// The damaged file.
        file: String,
        /// Offset of the damaged record in bytes.
        offset: u64,
        /// The damaged record or field.
        what: String,
        /// What the reference or the format demands.
        expected: String,
        /// What was read.
        found: String,
    },

    /// A file or record is not there.
    #[error(
        "{file} is missing the data written at offset {offset}: {found}; if the snapshot was \
         forgotten and pruned while being read, use another one; otherwise the store is damaged: \
         run `frazil verify` to see how badly"
    )]
    Missing {
        /// The file that should hold it, or that it was first written to.
        file: String,
        /// Offset of the record in bytes.
        offset: u64,
        /// What there is instead.
        found: String,
    },

    /// No snapshot matches the reference.
    #[error("no snapshot `{reference}` in {store}: {hint}")]
    UnknownRef {
        /// The reference as given.
        reference: String,
        /// The store searched.
        store: String,
        /// Why nothing matches, or what there is instead.
        hint: String,
    },

    /// More than one snapshot id starts with the prefix.
    #[error("`{reference}` is ambiguous in {store}: it matches {matches}; give more digits")]
    AmbiguousRef {
        /// The prefix as given.
        reference: String,
        /// The store searched.
        store: String,
        /// Some of the ids that start with it.
        matches: String,
    },

    /// Another transaction is being written, here or in another process.
    #[error(
        "{store} is being written by {holder}, and allows one writer at a time: wait until its \
         checkpoint is done, or stop that process"
    )]
    Busy {
        /// The store.
        store: String,
        /// The process that holds the writer lock.
        holder: String,
    },

    /// An earlier I/O error left the writer unsure of the medium's state.
    #[error(
        "{store} accepts no more writes through this handle after an I/O error ({cause}): check \
         the disk, then reopen the store"
    )]
    Latched {
        /// The store.
        store: String,
        /// The first error.
        cause: String,
    },

    /// The source of page contents failed.
    #[error("cannot read page {page} of region `{region}` from its source: {source}")]
    Source {
        /// Region name.
        region: String,
        /// Page number in the region.
        page: u64,
        /// The source's own error.
        #[source]
        source: io::Error,
    },

    /// The caller asked for something invalid; the message says what.
    #[error("{0}")]
    Invalid(String),

    /// The transaction or prune was cancelled by its owner.
    #[error("cancelled: {0}")]
    Cancelled(String),
}

/// Advice on damage in `file`.
fn remedy(file: &str) -> &'static str {
    match file {
        STORE_FILE => "restore that file from a backup: the rest of the store may be intact",
        JOURNAL_FILE => {
            "restore that file from a backup if there is one. A record that a crash cut short is \
             removed by the next checkpoint; a journal damaged before its end is never written to"
        }
        _ => {
            "restore that file from a backup, or forget the snapshots that need it (`frazil \
             verify` names them): the others do not need it"
        }
    }
}

impl StoreError {
    /// Wraps an I/O error, telling a full medium from any other failure.
    pub(crate) fn io(op: &'static str, file: impl Into<String>, source: io::Error) -> Self {
        let file = file.into();
        if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            Self::DiskFull { op, file }
        } else {
            Self::Io { op, file, source }
        }
    }

    /// True if nobody knows what the medium holds after this error (a failed sync may have dropped
    /// dirty pages), so the writer must not go on.
    #[must_use]
    pub fn latches(&self) -> bool {
        matches!(self, Self::Io { .. })
    }
}

/// A result whose error is a [`StoreError`] unless given.
pub type Result<T, E = StoreError> = std::result::Result<T, E>;
