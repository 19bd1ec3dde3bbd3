//! Pagers in processes of their own.
//!
//! A user's seat (userfaultfd and counters), the memory and the marks of filled pages are all file
//! descriptors, so another process can serve the user. The user's process keeps them too. If the
//! pager dies, another one continues: the marks tell what is filled, and waiting threads are woken
//! to fault again. The user only sees a delay.
//!
//! There are two kinds. [`serve_one`] serves one user, which starts the pager's process and
//! replaces it when it dies. [`ImageServer`] has memory that many users share and can only read. If
//! it dies, each user serves itself from the store, with private copies of pages not filled by
//! then.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::channel::{Channel, Message, VERSION};
use super::{Extent, Image, OnFailure, Pager, PagerError, PagerOptions, PagerStats, Replay, Seat};
use crate::snapshot::RegionReader;
use crate::store::{Store, StoreOptions};

/// How long a pager may take to start serving.
const READY_PATIENCE: Duration = Duration::from_secs(20);
/// How often a pager checks whether the image is complete.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After this many failed starts in a row, no other pager is started.
const FAILED_STARTS_MAX: u32 = 3;

fn remote_error(source: io::Error) -> PagerError {
    PagerError::Memory { op: "talk to another process", source }
}

fn invalid(what: &str) -> PagerError {
    remote_error(io::Error::new(io::ErrorKind::InvalidData, what.to_owned()))
}

/// Serves the user at the other end of `socket` until it is gone or its image is complete: the main
/// function of an external pager's process.
///
/// # Errors
/// What failed. The other end is told of failures of the pager.
pub fn serve_one(socket: OwnedFd) -> Result<(), PagerError> {
    let channel = Arc::new(Channel::new(socket));
    let Some((message, fds)) = channel.receive().map_err(remote_error)? else { return Ok(()) };
    let started = start_for(message, fds, on_failure(&channel));
    let pager = started.inspect_err(|error| tell_failure(&channel, error))?;
    begin(&channel, &pager)?;
    serve_until_complete(&channel, &pager).map(drop)
}

/// Tells the user that faults are answered, then starts replay and background fill.
fn begin(channel: &Channel, pager: &Pager) -> Result<(), PagerError> {
    let replays = pager.options().replay == Replay::Before;
    channel.send(&Message::Ready { replays }, &[]).map_err(remote_error)?;
    pager.begin().inspect_err(|error| tell_failure(channel, error))?;
    if replays {
        channel.send(&Message::Replayed, &[]).map_err(remote_error)?;
    }
    Ok(())
}

fn on_failure(channel: &Arc<Channel>) -> OnFailure {
    let channel = Arc::clone(channel);
    Box::new(move |error| tell_failure(&channel, error))
}

/// Tells the other end that a page cannot be served: it stops its guest, then releases the threads
/// waiting for pages.
fn tell_failure(channel: &Channel, error: &PagerError) {
    // If the other end is gone, there is nobody to tell.
    let _gone = channel.send(&Message::Failed { error: error.to_string() }, &[]);
}

fn start_for(
    message: Message,
    fds: Vec<OwnedFd>,
    on_failure: OnFailure,
) -> Result<Pager, PagerError> {
    let Message::Serve { version, store, snapshot, region, extents, mappings, options } = message
    else {
        return Err(invalid("expected a region to serve"));
    };
    let ([memory, filled, uffd, counters], VERSION) = (
        <[OwnedFd; 4]>::try_from(fds).map_err(|_| invalid("expected four file descriptors"))?,
        version,
    ) else {
        return Err(invalid("expected a message from this version of frazil"));
    };
    let of = |source| PagerError::Store { region: region.clone(), page: 0, source };
    let store = Store::open(&store, StoreOptions::default()).map_err(of)?;
    // The snapshot may have been forgotten since the user was resumed from it; the user pins it.
    let snapshot = store.pin_held(snapshot).map_err(of)?;
    let reader = snapshot.region(&region).map_err(of)?;
    let image = Image::take_over(reader, &File::from(memory), &extents, File::from(filled))?;
    let seat = Seat::of(uffd, &mappings, File::from(counters))?;
    Pager::start_answering(Arc::new(image), seat, options, on_failure)
}

/// Waits until the image is complete; returns false if the user is gone first.
fn serve_until_complete(channel: &Channel, pager: &Pager) -> Result<bool, PagerError> {
    while !pager.stats().complete {
        // A pager gets no further messages, so the connection has ended.
        if channel.wait(LOOK_EVERY).map_err(remote_error)? {
            return Ok(false);
        }
        pager.let_go_if_complete();
    }
    let _gone = channel.send(&Message::Complete, &[]);
    Ok(true)
}

/// Serves one image to all users that connect, each until it is gone.
#[derive(Debug)]
pub struct ImageServer {
    image: Arc<Image>,
    /// The memory and the marks of filled pages, opened read-only.
    offered: [File; 2],
    options: PagerOptions,
    connections: Mutex<Connections>,
}

/// The number of connections so far, and the current ones.
type Connections = (u64, BTreeMap<u64, Connection>);

#[derive(Debug)]
struct Connection {
    channel: Arc<Channel>,
    seated: bool,
}

impl ImageServer {
    /// Creates a server of `image`. From here on, file permissions keep other processes from
    /// opening the memory for writing.
    ///
    /// # Errors
    /// [`PagerError::Memory`] if the memory cannot be opened read-only.
    pub fn new(image: Arc<Image>, options: PagerOptions) -> Result<Self, PagerError> {
        let offer = |file: &File| read_only(file).map_err(remote_error);
        let offered = [offer(image.memory())?, offer(image.filled_file())?];
        // Page tables for all of the image in every clone would be most of the memory clones take.
        let options = PagerOptions { maps_ahead: false, ..options };
        Ok(Self { image, offered, options, connections: Mutex::default() })
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the connections to all users, which then serve themselves.
    pub fn hang_up(&self) {
        self.connections().1.values().for_each(|connection| connection.channel.close());
    }

    /// Number of connected users.
    #[must_use]
    pub fn users(&self) -> usize {
        self.connections().1.len()
    }

    /// Number of connected users that have not sent their seat yet.
    #[must_use]
    pub fn unseated_users(&self) -> usize {
        self.connections().1.values().filter(|connection| !connection.seated).count()
    }

    /// Serves the user at the other end of `socket` until it is gone. A user that sends nonsense is
    /// not served, without harm to others.
    ///
    /// # Errors
    /// What failed. The user is told of failures of its pager.
    pub fn serve(&self, socket: OwnedFd) -> Result<(), PagerError> {
        let channel = Arc::new(Channel::new(socket));
        let connected = self.connect(&channel);
        let region = self.image.region();
        let offer = Message::Offer {
            version: VERSION,
            snapshot: region.snapshot(),
            region: region.name().to_owned(),
            extents: self.image.extents().to_vec(),
        };
        let [memory, filled] = &self.offered;
        channel.send(&offer, &[memory.as_fd(), filled.as_fd()]).map_err(remote_error)?;
        if !channel.wait(READY_PATIENCE).map_err(remote_error)? {
            return Err(invalid("a connected user does not send its mappings"));
        }
        let Some((message, fds)) = channel.receive().map_err(remote_error)? else { return Ok(()) };
        let seated = self.seat(message, fds, on_failure(&channel));
        let pager = seated.inspect_err(|error| tell_failure(&channel, error))?;
        connected.mark_seated();
        begin(&channel, &pager)?;
        if serve_until_complete(&channel, &pager)? {
            drop(pager);
            // Keep the connection, by which users are counted, until the user is gone.
            while !channel.wait(Duration::from_hours(1)).map_err(remote_error)? {}
        }
        Ok(())
    }

    fn connect(&self, channel: &Arc<Channel>) -> Connected<'_> {
        let mut connections = self.connections();
        connections.0 += 1;
        let number = connections.0;
        let connection = Connection { channel: Arc::clone(channel), seated: false };
        connections.1.insert(number, connection);
        Connected { server: self, number }
    }

    fn seat(
        &self,
        message: Message,
        fds: Vec<OwnedFd>,
        on_failure: OnFailure,
    ) -> Result<Pager, PagerError> {
        let Message::Sit { mappings } = message else {
            return Err(invalid("expected a user's mappings"));
        };
        let [uffd, counters] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|_| invalid("expected two file descriptors"))?;
        let seat = Seat::of(uffd, &mappings, File::from(counters))?;
        Pager::start_answering(Arc::clone(&self.image), seat, self.options, on_failure)
    }
}

/// A guard for the entry of a connected user.
struct Connected<'a> {
    server: &'a ImageServer,
    number: u64,
}

impl Connected<'_> {
    fn mark_seated(&self) {
        if let Some(connection) = self.server.connections().1.get_mut(&self.number) {
            connection.seated = true;
        }
    }
}

impl Drop for Connected<'_> {
    fn drop(&mut self) {
        self.server.connections().1.remove(&self.number);
    }
}

/// Reopens `file` read-only, after removing the permission to write for everyone.
fn read_only(file: &File) -> io::Result<File> {
    use std::os::fd::AsRawFd;

    rustix::fs::fchmod(file, rustix::fs::Mode::RUSR)?;
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// The image that an [`ImageServer`] offers, on the user's side.
#[derive(Debug)]
pub struct Offer {
    channel: Channel,
    memory: File,
    filled: File,
    extents: Vec<Extent>,
}

impl Offer {
    /// Receives the offer of the server at the other end of `socket`, which must be of `region`.
    ///
    /// # Errors
    /// [`PagerError::Memory`] if it is of something else, or the server does not answer.
    pub fn receive(socket: OwnedFd, region: &RegionReader) -> Result<Self, PagerError> {
        let channel = Channel::new(socket);
        if !channel.wait(READY_PATIENCE).map_err(remote_error)? {
            return Err(invalid("the shared-memory server does not answer"));
        }
        let Some(received) = channel.receive().map_err(remote_error)? else {
            let kind = io::ErrorKind::UnexpectedEof;
            let ended = io::Error::new(kind, "the shared-memory server has ended");
            return Err(remote_error(ended));
        };
        let (Message::Offer { version: VERSION, snapshot, region: name, extents }, fds) = received
        else {
            return Err(invalid("the shared-memory server runs another version of frazil"));
        };
        if (snapshot, name.as_str()) != (region.snapshot(), region.name()) {
            return Err(invalid("the shared-memory server serves another snapshot"));
        }
        let [memory, filled] =
            <[OwnedFd; 2]>::try_from(fds).map_err(|_| invalid("expected two file descriptors"))?;
        let (memory, filled) = (File::from(memory), File::from(filled));
        Ok(Self { channel, memory, filled, extents })
    }

    /// The memory, to be mapped `MAP_PRIVATE`.
    #[must_use]
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Has the server serve `seat`, whose mappings must be of [`Self::memory`].
    ///
    /// # Errors
    /// What failed in the server or this process.
    pub fn accept(
        self,
        region: RegionReader,
        seat: Seat,
        on_failure: OnFailure,
    ) -> Result<RemotePager, PagerError> {
        let image = Image::join(region, &self.memory, &self.extents, self.filled)?;
        let [uffd, counters] = seat.descriptors()?;
        let message = Message::Sit { mappings: seat.mappings().to_vec() };
        self.channel.send(&message, &[uffd.as_fd(), counters.as_fd()]).map_err(remote_error)?;
        if self.channel.wait_ready(READY_PATIENCE).map_err(remote_error)? {
            self.channel.wait_replayed().map_err(remote_error)?;
        }
        let options = PagerOptions {
            background_fill: false,
            replay: Replay::Off,
            record: None,
            maps_ahead: false,
            ..PagerOptions::default()
        };
        let remote = Remote::new(Arc::new(image), seat, options, on_failure, None);
        RemotePager::watch(remote, self.channel)
    }
}

/// Starts the process of a pager, which inherits the socket and calls [`serve_one`].
pub type StartPager = Box<dyn Fn(OwnedFd) -> io::Result<Child> + Send + Sync>;

/// A pager in another process, on the user's side: watched, and replaced when it dies.
#[derive(Debug)]
pub struct RemotePager {
    remote: Arc<Remote>,
    watcher: Option<JoinHandle<()>>,
}

struct Remote {
    image: Arc<Image>,
    seat: Seat,
    options: PagerOptions,
    on_failure: Arc<OnFailure>,
    failure: OnceLock<Arc<PagerError>>,
    /// How to start another pager, and the store's folder for it. If none, this process takes over
    /// when the pager dies.
    start: Option<(StartPager, std::path::PathBuf)>,
    stopping: AtomicBool,
    /// The connection, to be closed so that the pager ends.
    channel: Mutex<Option<Channel>>,
    /// This process's own pager, once it has taken over.
    own: Mutex<Option<Pager>>,
    deaths: AtomicU64,
    /// The pager's process, if this one started it.
    process: Mutex<Option<Child>>,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remote").field("seat", &self.seat).finish_non_exhaustive()
    }
}

impl RemotePager {
    /// Starts a pager process with `start` and has it serve `image`, from the store in folder
    /// `store`, to the user in `seat`.
    ///
    /// # Errors
    /// What failed in that process or in starting it.
    pub fn start(
        image: Image,
        store: &Path,
        seat: Seat,
        options: PagerOptions,
        start: StartPager,
        on_failure: OnFailure,
    ) -> Result<Self, PagerError> {
        let start = Some((start, store.to_owned()));
        let remote = Remote::new(Arc::new(image), seat, options, on_failure, start);
        let (channel, replays) = remote.hand_over()?;
        if replays {
            channel.wait_replayed().map_err(remote_error)?;
        }
        Self::watch(remote, channel)
    }

    fn watch(remote: Remote, channel: Channel) -> Result<Self, PagerError> {
        *remote.lock_channel() = Some(channel.try_clone().map_err(remote_error)?);
        let remote = Arc::new(remote);
        let watched = Arc::clone(&remote);
        let watcher = std::thread::Builder::new()
            .name("frazil-pager".into())
            .spawn(move || watched.watch(channel))
            .map_err(|source| PagerError::Memory { op: "start a thread", source })?;
        Ok(Self { remote, watcher: Some(watcher) })
    }

    /// What all the pagers together have done so far.
    #[must_use]
    pub fn stats(&self) -> PagerStats {
        self.remote.seat.stats(&self.remote.image)
    }

    /// Number of pagers that have died.
    #[must_use]
    pub fn deaths(&self) -> u64 {
        self.remote.deaths.load(Ordering::Relaxed)
    }

    /// The id of the pager's process, if this process started it.
    #[must_use]
    pub fn process(&self) -> Option<u32> {
        self.remote.lock_process().as_ref().map(Child::id)
    }

    /// Why the memory is no longer served, if it is not.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<PagerError>> {
        self.remote.failure.get().cloned()
    }
}

impl Drop for RemotePager {
    fn drop(&mut self) {
        self.remote.stopping.store(true, Ordering::Release);
        self.remote.lock_channel().iter().for_each(Channel::close);
        if let Some(watcher) = self.watcher.take() {
            // The panic hook has reported a panic.
            let _joined = watcher.join();
        }
        self.remote.end_process();
        *self.remote.own.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Others may hold the userfaultfd a moment longer; release waiting threads now.
        let _unregistered = self.remote.seat.let_go();
    }
}

impl Remote {
    fn new(
        image: Arc<Image>,
        seat: Seat,
        options: PagerOptions,
        on_failure: OnFailure,
        start: Option<(StartPager, std::path::PathBuf)>,
    ) -> Self {
        let (failure, stopping, channel, own) = Default::default();
        let (deaths, process) = (AtomicU64::default(), Mutex::default());
        Self {
            image,
            seat,
            options,
            on_failure: Arc::new(on_failure),
            failure,
            start,
            stopping,
            channel,
            own,
            deaths,
            process,
        }
    }

    fn lock_channel(&self) -> MutexGuard<'_, Option<Channel>> {
        self.channel.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_process(&self) -> MutexGuard<'_, Option<Child>> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the pager that this process started, if any, and waits until it is gone: two pagers
    /// that fill the same memory would undo the guest's writes.
    fn end_process(&self) {
        if let Some(mut child) = self.lock_process().take() {
            // It may be gone already.
            let _gone = child.kill();
            let _waited = child.wait();
        }
    }

    /// Starts a pager process and sends it everything; also returns whether it replays a working
    /// set first.
    fn hand_over(&self) -> Result<(Channel, bool), PagerError> {
        self.end_process();
        let handed = self.start_and_send();
        if handed.is_err() {
            self.end_process();
        }
        handed
    }

    fn start_and_send(&self) -> Result<(Channel, bool), PagerError> {
        let Some((start, store)) = &self.start else {
            return Err(invalid("no other pager can be started"));
        };
        let (channel, theirs) = Channel::pair().map_err(remote_error)?;
        *self.lock_process() = Some(start(theirs).map_err(remote_error)?);
        let region = self.image.region();
        let serve = Message::Serve {
            version: VERSION,
            store: store.clone(),
            snapshot: region.snapshot(),
            region: region.name().to_owned(),
            extents: self.image.extents().to_vec(),
            mappings: self.seat.mappings().to_vec(),
            options: self.options,
        };
        let [uffd, counters] = self.seat.descriptors()?;
        let (memory, filled) = (self.image.memory().as_fd(), self.image.filled_file().as_fd());
        let sent = channel.send(&serve, &[memory, filled, uffd.as_fd(), counters.as_fd()]);
        let replays = sent.and_then(|()| channel.wait_ready(READY_PATIENCE));
        Ok((channel, replays.map_err(remote_error)?))
    }

    /// The body of the watching thread: replaces the pager whenever it dies, until the image is
    /// complete or a page cannot be served.
    fn watch(&self, mut channel: Channel) {
        loop {
            match channel.receive() {
                Ok(Some((Message::Complete, _))) => return self.end_process(),
                Ok(Some((Message::Failed { error }, _))) => {
                    self.fail(PagerError::Remote { error });
                    channel.close();
                    return self.end_process();
                }
                Ok(Some(_)) => continue,
                Ok(None) | Err(_) => {}
            }
            if self.stopping.load(Ordering::Acquire) || self.seat.stats(&self.image).complete {
                return;
            }
            self.deaths.fetch_add(1, Ordering::Relaxed);
            tracing::warn!("the pager has died; another one takes over");
            match self.replace() {
                Some(other) => channel = other,
                None => return self.serve_here(),
            }
        }
    }

    fn replace(&self) -> Option<Channel> {
        for _ in 0..FAILED_STARTS_MAX {
            if self.start.is_none() || self.stopping.load(Ordering::Acquire) {
                break;
            }
            match self.hand_over().and_then(|(channel, _replays)| {
                *self.lock_channel() = Some(channel.try_clone().map_err(remote_error)?);
                Ok(channel)
            }) {
                Ok(channel) => {
                    if self.stopping.load(Ordering::Acquire) {
                        channel.close();
                    }
                    return Some(channel);
                }
                Err(error) => tracing::warn!(%error, "cannot start another pager"),
            }
        }
        None
    }

    /// Starts a pager in this process, since there is no other.
    fn serve_here(&self) {
        self.end_process();
        if self.stopping.load(Ordering::Acquire) {
            return;
        }
        let told = Arc::clone(&self.on_failure);
        let served = self.seat.try_clone().and_then(|seat| {
            let on_failure: OnFailure = Box::new(move |error| told(error));
            Pager::serve(Arc::clone(&self.image), seat, self.options, on_failure)
        });
        match served {
            Ok(pager) => *self.own.lock().unwrap_or_else(PoisonError::into_inner) = Some(pager),
            Err(error) => self.fail(error),
        }
    }

    fn fail(&self, error: PagerError) {
        tracing::error!(%error, "the pager failed");
        let error = Arc::new(error);
        let _first = self.failure.set(Arc::clone(&error));
        (self.on_failure)(&error);
        if let Err(error) = self.seat.let_go() {
            tracing::error!(%error, "threads waiting for a page may hang");
        }
    }
}
