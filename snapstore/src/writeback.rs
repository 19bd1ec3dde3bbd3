//! Syncs what was written in the background, while more is being written.
//!
//! If all of a large checkpoint were synced at its end, the disk would be idle until then, and the
//! cores from then on.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};

use crate::error::{Result, StoreError};
use crate::storage::StoreFile;

/// Bytes written to a file after which a background sync is requested.
pub(crate) const WRITE_BACK_LEN: u64 = 8 << 20;

/// A file to be synced, and its name for messages.
type Request = (String, Arc<dyn StoreFile>);

/// A thread that syncs files, started with the first request.
#[derive(Debug, Default)]
pub(crate) struct WriteBack {
    running: Option<(Sender<Request>, JoinHandle<Result<()>>)>,
}

impl WriteBack {
    /// Syncs `file` in the background, unless another sync is still going on.
    pub fn request(&mut self, name: &str, file: &Arc<dyn StoreFile>) {
        if self.running.is_none() {
            let (sender, files) = bounded::<Request>(1);
            let sync_all = move || {
                files.into_iter().try_for_each(|(name, file)| {
                    file.sync().map_err(|error| StoreError::io("sync", name, error))
                })
            };
            // If no thread can be started, the sync at the end does it all.
            let thread = std::thread::Builder::new().name("frazil-sync".into()).spawn(sync_all);
            self.running = thread.ok().map(|thread| (sender, thread));
        }
        if let Some((sender, _)) = &self.running {
            // Full: the next request covers these bytes too. Closed: `finish` has the error.
            let _covered_later = sender.try_send((name.to_owned(), Arc::clone(file)));
        }
    }

    /// Waits until all requested syncs are done.
    ///
    /// # Errors
    /// The first failure of a sync: then nothing is known of what was written since the sync before
    /// it, even if a later one succeeds.
    pub fn finish(&mut self) -> Result<()> {
        let Some((sender, thread)) = self.running.take() else { return Ok(()) };
        drop(sender);
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
