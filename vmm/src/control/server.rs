//! The server side. No client may hold up the VM: requests are small, each is read and answered by
//! a thread of its own, and every resource has a limit.

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use frazil_snapstore::StoreError;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::api::{
    ApiError, CancelReport, Done, RunState, VmStatus, WorkloadStatus, WorkloadVerified,
};
use super::http::{self, NoRequest, Request};
use super::metrics;
use crate::checkpoint::{CheckpointReport, CheckpointRequest};
use crate::error::{Result, VmmError};
use crate::private_socket;
use crate::rewind::RewindRequest;
use crate::vm::Vm;

/// The most connections whose request has not arrived yet; another one closes the oldest of them.
const MAX_WAITING: usize = 128;
/// How long a request may take to arrive.
const REQUEST_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client may take to read its answer.
const ANSWER_PATIENCE: Duration = Duration::from_secs(10);
/// How long requests in flight may delay the end of the server.
const LAST_ANSWERS_PATIENCE: Duration = Duration::from_secs(2);

/// Called with the result of each checkpoint that a request asked for.
pub type OnEvent = Arc<dyn Fn(&Result<CheckpointReport>) + Send + Sync>;

/// Serves one VM's control socket until dropped.
pub struct Server {
    socket: PathBuf,
    stop: Arc<OwnedFd>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// What a request may have to wait for. Each class has its own limit on requests served at once, so
/// whatever hangs, the VM can still be queried and stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    /// May take any time: checkpoints, for instance, wait for each other.
    Long,
    /// Waits for something in the VM to be over: a checkpoint being cancelled, a paused guest being
    /// inspected.
    Turn,
    /// Reads guest memory, which may have to be loaded from the store first.
    Memory,
    /// Is answered at once.
    AtOnce,
}

impl Class {
    const ALL: [Self; 4] = [Self::Long, Self::Turn, Self::Memory, Self::AtOnce];

    fn of(request: &Request) -> Self {
        match request.method.as_str() {
            "POST" => Self::Long,
            "PUT" if request.path != "/vm/stop" => Self::Turn,
            "GET" if request.path == "/workload" => Self::Memory,
            _ => Self::AtOnce,
        }
    }

    /// How many requests are served at once, and how the refusal of another describes them.
    fn limit(self) -> (usize, &'static str) {
        match self {
            Self::Long => (8, "checkpoints, rewinds and memory checks are running or waiting"),
            Self::Turn => (8, "requests are waiting for the VM"),
            Self::Memory => (8, "requests are reading the guest's memory"),
            Self::AtOnce => (32, "requests are being served"),
        }
    }
}

/// What the server's threads share.
struct Shared {
    vm: Arc<Vm>,
    on_checkpoint: OnEvent,
    waiting: Waiting,
    /// Number of requests being served, for each [`Class`].
    active: [AtomicUsize; Class::ALL.len()],
}

impl Shared {
    /// Counts a request; None if its class is at its limit.
    fn enter(&self, class: Class) -> Option<Serving<'_>> {
        Serving::enter(&self.active[class as usize], class.limit().0)
    }

    fn is_serving(&self) -> bool {
        self.active.iter().any(|active| active.load(Ordering::Acquire) > 0)
    }
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// Serves `vm` at `socket`, for this user only. Replaces a socket that a dead process left
    /// behind.
    ///
    /// # Errors
    /// [`VmmError::Host`] if `socket` cannot be listened on, or the thread cannot be started.
    pub fn start(vm: Arc<Vm>, socket: &Path, on_checkpoint: OnEvent) -> Result<Self> {
        let cannot =
            |source| VmmError::Host { op: format!("listen on {}", socket.display()), source };
        // Nonblocking: a client may be gone again between the poll and the accept.
        let listener = private_socket::listen(socket).map_err(cannot)?;
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|error| cannot(error.into()))?;
        let stop = Arc::new(stop);
        let shared = Arc::new(Shared {
            vm,
            on_checkpoint,
            waiting: Waiting::default(),
            active: std::array::from_fn(|_| AtomicUsize::new(0)),
        });
        let (stopped, serving) = (Arc::clone(&stop), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("frazil-api".into())
            .spawn(move || serve(&listener, &stopped, &serving))
            .map_err(VmmError::host("start the API thread"))?;
        Ok(Self { socket: socket.to_owned(), stop, shared, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The socket is ours, or binding it would have failed.
        let _gone = std::fs::remove_file(&self.socket);
        // A full eventfd wakes the thread too.
        let _full = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _joined = thread.join();
        }
        // The request that ended the VM still has to be answered.
        let until = Instant::now() + LAST_ANSWERS_PATIENCE;
        while self.shared.is_serving() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.shared.waiting.close_all();
    }
}

/// Connections whose request has not arrived yet, the oldest first.
#[derive(Default)]
struct Waiting(Mutex<VecDeque<Arc<UnixStream>>>);

impl Waiting {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Arc<UnixStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, stream: &Arc<UnixStream>) {
        let mut waiting = self.lock();
        waiting.push_back(Arc::clone(stream));
        if waiting.len() > MAX_WAITING {
            waiting.pop_front().iter().for_each(close);
        }
    }

    fn remove(&self, stream: &Arc<UnixStream>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, stream));
    }

    fn close_all(&self) {
        self.lock().drain(..).for_each(|stream| close(&stream));
    }
}

/// Shuts a connection down: its thread then reads the end of the stream and drops it.
fn close(stream: &Arc<UnixStream>) {
    let _gone = stream.shutdown(Shutdown::Both);
}

fn serve(listener: &UnixListener, stop: &OwnedFd, shared: &Arc<Shared>) {
    loop {
        let mut fds = [PollFd::new(listener, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "the control socket can no longer be served");
                return;
            }
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        match listener.accept() {
            Ok((stream, _)) => spawn_connection(stream, shared),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => {
                // Out of file descriptors, say: some may be closed soon.
                tracing::warn!(%error, "cannot accept a connection");
                std::thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn spawn_connection(stream: UnixStream, shared: &Arc<Shared>) {
    let stream = Arc::new(stream);
    shared.waiting.add(&stream);
    let (connection, serving) = (Arc::clone(&stream), Arc::clone(shared));
    let spawned = std::thread::Builder::new()
        .name("frazil-request".into())
        .spawn(move || serve_connection(&connection, &serving));
    if let Err(error) = spawned {
        // Its client sees the connection close.
        tracing::warn!(%error, "cannot serve a request");
        shared.waiting.remove(&stream);
    }
}

fn serve_connection(stream: &Arc<UnixStream>, shared: &Arc<Shared>) {
    let received = stream
        .set_write_timeout(Some(ANSWER_PATIENCE))
        .map_err(|_| NoRequest::Gone)
        .and_then(|()| http::receive(stream, Instant::now() + REQUEST_PATIENCE));
    match received {
        Ok(request) => {
            let class = Class::of(&request);
            if let Some(_serving) = shared.enter(class) {
                // Its request has arrived: it must not be closed to make room any more.
                shared.waiting.remove(stream);
                handle(stream, &request, shared);
            } else {
                let (most, what) = class.limit();
                let error = format!("{most} {what} already: try again");
                respond(stream, 503, &ApiError { error });
            }
        }
        Err(NoRequest::Refused(status, error)) => respond(stream, status, &ApiError { error }),
        Err(NoRequest::Gone) => {}
    }
    shared.waiting.remove(stream);
}

/// Counts a request while it is served, however that ends.
struct Serving<'a>(&'a AtomicUsize);

impl<'a> Serving<'a> {
    fn enter(count: &'a AtomicUsize, most: usize) -> Option<Self> {
        let entered = Self(count);
        (count.fetch_add(1, Ordering::Relaxed) < most).then_some(entered)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

fn handle(stream: &UnixStream, request: &Request, shared: &Shared) {
    match route(request, &shared.vm, &shared.on_checkpoint) {
        Ok(Body::Json(value)) => respond(stream, 200, &value),
        Ok(Body::Metrics(text)) => {
            http::answer(stream, 200, metrics::CONTENT_TYPE, text.as_bytes());
        }
        Err((status, error)) => respond(stream, status, &ApiError { error }),
    }
}

/// The body of a successful answer.
enum Body {
    Json(Value),
    /// In Prometheus's text format.
    Metrics(String),
}

type Answer<T = Body> = std::result::Result<T, (u16, String)>;

/// Every route, as method and path; `openapi.json` lists the same ones.
pub(super) const ROUTES: [(&str, &str); 13] = [
    ("GET", "/vm"),
    ("PUT", "/vm/pause"),
    ("PUT", "/vm/continue"),
    ("PUT", "/vm/stop"),
    ("POST", "/checkpoints"),
    ("PUT", "/checkpoints/cancel"),
    ("GET", "/checkpoints/progress"),
    ("GET", "/checkpoints/statistics"),
    ("POST", "/rewind"),
    ("GET", "/workload"),
    ("POST", "/workload/verify"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
];

fn route(request: &Request, vm: &Vm, on_checkpoint: &OnEvent) -> Answer {
    let (method, path) = (request.method.as_str(), request.path.as_str());
    match (method, path) {
        ("GET", "/vm") => to_json(&VmStatus::of(vm)),
        ("PUT", "/vm/pause") => {
            conflict(vm.pause()).and_then(|()| to_json(&Done { state: RunState::Paused }))
        }
        ("PUT", "/vm/continue") => {
            conflict(vm.go()).and_then(|()| to_json(&Done { state: RunState::Running }))
        }
        ("PUT", "/vm/stop") => {
            vm.stop();
            to_json(&Done { state: RunState::Ended })
        }
        ("POST", "/checkpoints") => checkpoint(&request.body, vm, on_checkpoint),
        ("PUT", "/checkpoints/cancel") => {
            to_json(&CancelReport { cancelled: vm.cancel_checkpoint() })
        }
        ("GET", "/checkpoints/progress") => to_json(&vm.checkpoint_progress()),
        ("GET", "/checkpoints/statistics") => to_json(&vm.checkpoint_statistics()),
        ("POST", "/rewind") => rewind(&request.body, vm),
        ("GET", "/workload") => {
            conflict(vm.workload()).and_then(|view| to_json(&WorkloadStatus::from(&view)))
        }
        ("POST", "/workload/verify") => {
            conflict(vm.verify_workload()).and_then(|found| to_json(&WorkloadVerified::from(found)))
        }
        ("GET", "/metrics") => Ok(Body::Metrics(metrics::of(vm))),
        ("GET", "/openapi.json") => serde_json::from_str(super::OPENAPI)
            .map(Body::Json)
            .map_err(|error| (500, error.to_string())),
        _ if ROUTES.iter().any(|(_, known)| *known == path) => {
            Err((405, format!("{method} is not allowed on {path}; see /openapi.json")))
        }
        _ => Err((404, format!("there is nothing at {path}; see /openapi.json"))),
    }
}

/// Parses a request's body; an empty body stands for the default.
fn parse<T: DeserializeOwned + Default>(body: &[u8], what: &str) -> Answer<T> {
    if body.is_empty() {
        return Ok(T::default());
    }
    serde_json::from_slice(body)
        .map_err(|error| (400, format!("body: expected a {what} request, found: {error}")))
}

fn rewind(body: &[u8], vm: &Vm) -> Answer {
    let RewindRequest { snapshot } = parse(body, "rewind")?;
    conflict(vm.rewind_to(snapshot.as_deref())).and_then(|report| to_json(&report))
}

fn checkpoint(body: &[u8], vm: &Vm, on_checkpoint: &OnEvent) -> Answer {
    let request: CheckpointRequest = parse(body, "checkpoint")?;
    let taken = vm.checkpoint(&request);
    on_checkpoint(&taken);
    conflict(taken).and_then(|report| to_json(&report))
}

fn conflict<T>(result: Result<T>) -> Answer<T> {
    result.map_err(|error| match error {
        VmmError::NotNow(_) | VmmError::Config(_) | VmmError::Store(StoreError::Cancelled(_)) => {
            (409, error.to_string())
        }
        VmmError::Store(StoreError::Invalid(_) | StoreError::AmbiguousRef { .. }) => {
            (400, error.to_string())
        }
        VmmError::Store(StoreError::UnknownRef { .. }) => (404, error.to_string()),
        other => (500, other.to_string()),
    })
}

fn to_json(value: &impl Serialize) -> Answer {
    serde_json::to_value(value)
        .map(Body::Json)
        .map_err(|error| (500, format!("cannot encode the answer: {error}")))
}

fn respond(stream: &UnixStream, status: u16, answer: &impl Serialize) {
    let body = serde_json::to_vec(answer).unwrap_or_default();
    http::answer(stream, status, "application/json", &body);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_api_description_lists_every_route_and_no_other() {
        let document: Value = serde_json::from_str(super::super::OPENAPI).unwrap();
        let mut described: Vec<(String, String)> = document["paths"]
            .as_object()
            .unwrap()
            .iter()
            .flat_map(|(path, methods)| {
                methods
                    .as_object()
                    .unwrap()
                    .keys()
                    .map(move |method| (method.to_uppercase(), path.clone()))
            })
            .collect();
        let mut routes: Vec<(String, String)> = ROUTES
            .iter()
            .map(|(method, path)| ((*method).to_owned(), (*path).to_owned()))
            .collect();
        described.sort();
        routes.sort();
        assert_eq!(described, routes);
    }
}
