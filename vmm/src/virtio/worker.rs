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

/// Tells a worker's thread whether it is to end.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending(Arc<AtomicBool>);

impl Ending {
    pub(super) fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Worker {
    /// Starts a thread that does `work`, which is to return once its `Ending` is wanted; `doorbell`
    /// is rung then.
    ///
    /// # Errors
    /// [`VmmError::Host`](crate::VmmError::Host) if the thread cannot be started, or cannot be
    /// confined to its `role`.
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
            // If the thread panicked, the panic hook has said so.
            let _ended = thread.join();
        }
    }
}

/// Rings a doorbell. This fails only if it has been rung very often without being heard.
pub(super) fn ring(doorbell: &EventFd) {
    let _rung = doorbell.write(1);
}

/// Creates a doorbell, to be waited for or, with `EFD_NONBLOCK`, polled.
///
/// # Errors
/// [`VmmError::Host`](crate::VmmError::Host) if it cannot be created.
pub(super) fn doorbell(flags: i32) -> Result<Arc<EventFd>> {
    event(flags).map(Arc::new)
}

/// Calls `serve` whenever the doorbell of `device` rings, until the thread is to end.
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
                tracing::error!(device, %error, "a virtio device can no longer be notified");
                return;
            }
        }
        if ending.is_wanted() {
            return;
        }
        serve();
    }
}
