//! A device's own thread, which works when its doorbell rings.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use super::event;
use crate::confine::{self, Role};
use crate::error::Result;

/// A thread that ends when this is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    doorbell: Arc<EventFd>,
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// Tells a worker's thread that it is to end.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending(Arc<AtomicBool>);

impl Ending {
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Worker {
    /// Starts a thread that does `work` until that returns or its `Ending` is wanted, of which
    /// `doorbell` tells it.
    ///
    /// # Errors
    /// [`VmmError::Host`](crate::VmmError::Host) if there is no thread to be had, or it cannot be confined to its `role`.
    pub(super) fn start(
        name: &str,
        role: Role,
        doorbell: &Arc<EventFd>,
        work: impl FnOnce(&EventFd, &Ending) + Send + 'static,
    ) -> Result<Self> {
        let ending = Arc::new(AtomicBool::new(false));
        let (own_doorbell, own_ending) = (Arc::clone(doorbell), Ending(Arc::clone(&ending)));
        let thread =
            confine::spawn(format!("fz-{name}"), role, move || work(&own_doorbell, &own_ending))?;
        Ok(Self { doorbell: Arc::clone(doorbell), ending, thread: Some(thread) })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Release);
        ring(&self.doorbell);
        if let Some(thread) = self.thread.take() {
            // It says itself why it panicked.
            let _ended = thread.join();
        }
    }
}

/// Rings a doorbell. That fails only when it has been rung very often and not been heard.
pub(super) fn ring(doorbell: &EventFd) {
    let _rung = doorbell.write(1);
}

/// A doorbell that whoever hears it waits for, or, with `EFD_NONBLOCK`, polls.
///
/// # Errors
/// [`VmmError::Host`](crate::VmmError::Host).
pub(super) fn doorbell(flags: i32) -> Result<Arc<EventFd>> {
    event(flags).map(Arc::new)
}

/// Waits for the doorbell of `device` again and again, and serves what there is then.
pub(super) fn serve_when_rung(
    device: &str,
    doorbell: &EventFd,
    ending: &Ending,
    mut serve: impl FnMut(),
) {
    loop {
        match doorbell.read() {
            Ok(_rings) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::error!(device, %error, "a virtio device does not hear its doorbell");
                return;
            }
        }
        if ending.is_wanted() {
            return;
        }
        serve();
    }
}
