//! Creating a store, and completing one whose creation was cut short.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Result, StoreError};
use crate::format::{
    FILE_HEADER_LEN, FORMAT_VERSION, FileHeader, FileKind, JOURNAL_FILE, LOCK_FILE, PIN_FOLDER,
    SEGMENT_FOLDER, STORE_FILE,
};
use crate::journal::{self, Cursor};
use crate::storage::{Storage, StoreFile, WriterLock};
use crate::store::{lock, unix_ms};

/// How long another process may take to create a store: a few syncs, on a busy disk.
const CREATION_PATIENCE: Duration = Duration::from_secs(30);
/// How often to check whether it has.
const CREATION_LOOK: Duration = Duration::from_millis(10);

/// Creates the store's files as far as they are missing.
pub(crate) fn create_if_missing(storage: &dyn Storage) -> Result<()> {
    if unfinished(storage)?.is_none() {
        return Ok(());
    }
    let _lock = lock_to_create(storage)?;
    // Checked again: another process may have created the store before the lock was ours.
    match unfinished(storage)? {
        Some(Unfinished::Nothing) => create(storage),
        Some(Unfinished::StoreFile(header)) => {
            let file = storage.open(STORE_FILE, true);
            put_header(storage, STORE_FILE, file, &header)
        }
        None => Ok(()),
    }
}

/// Takes the writer lock of a store to be created. If another process holds it, which may just be
/// creating the same store, waits up to [`CREATION_PATIENCE`]; returns none if the store is
/// complete meanwhile.
fn lock_to_create(storage: &dyn Storage) -> Result<Option<Box<dyn WriterLock>>> {
    let until = Instant::now() + CREATION_PATIENCE;
    loop {
        match lock(storage) {
            Err(StoreError::Busy { .. }) if Instant::now() < until => {}
            locked => return locked.map(Some),
        }
        std::thread::sleep(CREATION_LOOK);
        if unfinished(storage)?.is_none() {
            return Ok(None);
        }
    }
}

/// Refuses a directory that holds anything but what an interrupted creation leaves.
pub(crate) fn refuse_foreign(storage: &dyn Storage, names: &[String]) -> Result<()> {
    let known = [LOCK_FILE, JOURNAL_FILE, SEGMENT_FOLDER, PIN_FOLDER];
    let foreign = names.iter().find(|name| !known.contains(&name.as_str()));
    let segments = storage.list(SEGMENT_FOLDER).unwrap_or_default();
    match foreign.or(segments.first()) {
        None => Ok(()),
        Some(name) => Err(StoreError::NotAStore {
            path: storage.describe(),
            expected: "the file FRAZIL, or an empty directory",
            found: format!("`{name}` and no FRAZIL"),
        }),
    }
}

fn create(storage: &dyn Storage) -> Result<()> {
    let header = FileHeader {
        kind: FileKind::Journal,
        version: FORMAT_VERSION,
        number: 0,
        store: random_uuid()?,
        created_unix_ms: unix_ms(),
    };
    // `FRAZIL` comes last: until it exists, an interrupted creation starts over.
    match storage.remove(JOURNAL_FILE) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(StoreError::io("replace", JOURNAL_FILE, error));
        }
        _ => {}
    }
    for (name, kind) in [(JOURNAL_FILE, FileKind::Journal), (STORE_FILE, FileKind::Store)] {
        put_header(storage, name, storage.create(name), &FileHeader { kind, ..header })?;
    }
    Ok(())
}

/// Writes a file that consists of its header alone, durably.
fn put_header(
    storage: &dyn Storage,
    name: &str,
    file: io::Result<Arc<dyn StoreFile>>,
    header: &FileHeader,
) -> Result<()> {
    file.and_then(|file| file.write_all_at(&header.encode(), 0).and_then(|()| file.sync()))
        .and_then(|()| storage.sync_names(""))
        .map_err(|error| StoreError::io("create", name, error))
}

/// What is missing of a store.
enum Unfinished {
    /// There is no `FRAZIL`: creation starts over.
    Nothing,
    /// `FRAZIL` was being written when the power failed; this is the header it should have.
    StoreFile(FileHeader),
}

/// What is missing of the store; none if `FRAZIL` is whole, or damaged otherwise than by a crash.
fn unfinished(storage: &dyn Storage) -> Result<Option<Unfinished>> {
    let names = storage.list("").map_err(|error| StoreError::io("list", "", error))?;
    if !names.iter().any(|name| name == STORE_FILE) {
        refuse_foreign(storage, &names)?;
        return Ok(Some(Unfinished::Nothing));
    }
    // Whatever else is wrong with the files, opening the store reports it better.
    Ok(interrupted_store_file(storage).unwrap_or(None).map(Unfinished::StoreFile))
}

/// The header that `FRAZIL` should have, if a crash left it cut short or with zeros in it. The
/// journal became durable before it, and nothing is appended to the journal until `FRAZIL` is
/// durable too.
fn interrupted_store_file(storage: &dyn Storage) -> io::Result<Option<FileHeader>> {
    let (file, journal) = (storage.open(STORE_FILE, false)?, storage.open(JOURNAL_FILE, false)?);
    let len = file.len_bytes()?;
    if len > FILE_HEADER_LEN as u64 || journal.len_bytes()? != FILE_HEADER_LEN as u64 {
        return Ok(None);
    }
    let (mut bytes, mut found) = ([0; FILE_HEADER_LEN], vec![0; len as usize]);
    journal.read_exact_at(&mut bytes, 0)?;
    file.read_exact_at(&mut found, 0)?;
    let Ok(header) = FileHeader::decode(&bytes, FileKind::Journal, JOURNAL_FILE) else {
        return Ok(None);
    };
    let header = FileHeader { kind: FileKind::Store, ..header };
    let expected = header.encode();
    let cut_short = found != expected
        && found.iter().zip(expected).all(|(byte, expected)| *byte == 0 || *byte == expected);
    Ok(cut_short.then_some(header))
}

fn random_uuid() -> Result<[u8; 16]> {
    use std::io::Read;
    let mut uuid = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut uuid))
        .map_err(|error| StoreError::io("read", "/dev/urandom", error))?;
    Ok(uuid)
}

pub(crate) fn read_store_header(storage: &dyn Storage) -> Result<FileHeader> {
    let not_a_store = |found: String| StoreError::NotAStore {
        path: storage.describe(),
        expected: "the file FRAZIL with a store header",
        found,
    };
    let file = match storage.open(STORE_FILE, false) {
        Ok(file) => file,
        Err(error)
            if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) =>
        {
            return Err(not_a_store("no such file".into()));
        }
        Err(error) => return Err(StoreError::io("open", STORE_FILE, error)),
    };
    let mut bytes = [0; FILE_HEADER_LEN];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => FileHeader::decode(&bytes, FileKind::Store, STORE_FILE),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            Err(not_a_store("a file shorter than its header".into()))
        }
        Err(error) => Err(StoreError::io("read", STORE_FILE, error)),
    }
}

pub(crate) fn journal_start(storage: &dyn Storage, uuid: [u8; 16]) -> Result<Cursor> {
    let file = storage
        .open(JOURNAL_FILE, false)
        .map_err(|error| StoreError::io("open", JOURNAL_FILE, error))?;
    Ok(Cursor::start(&journal::read_header(file.as_ref(), uuid)?))
}
