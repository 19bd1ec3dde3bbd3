//! The server side. Nothing a client does may stop the VM: bodies are small and bounded, each
//! request has a thread of its own, and there are only so many of them.

use std::io::Read;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use tiny_http::{Header, Method, Request, Response};

use super::api::{ApiError, Done, RunState, VmStatus, WorkloadStatus, WorkloadVerified};
use super::metrics;
use super::register::make_private_socket;
use crate::checkpoint::{CheckpointReport, CheckpointRequest};
use crate::error::{Result, VmmError};
use crate::vm::Vm;

/// Bodies up to this long are read whole before the request reaches us, so a client that stalls
/// keeps nobody waiting but itself.
const MAX_BODY_LEN: usize = 1024;
/// Requests served at once; a checkpoint's lasts as long as the checkpoint.
const MAX_REQUESTS: usize = 32;
/// How long requests in flight may delay the server's end.
const LAST_ANSWERS_PATIENCE: Duration = Duration::from_secs(2);

/// Called after each checkpoint that a request asked for.
pub type OnEvent = Arc<dyn Fn(&Result<CheckpointReport>) + Send + Sync>;

/// Serves one VM's control socket until dropped.
pub struct Server {
    listener: Arc<tiny_http::Server>,
    socket: PathBuf,
    active: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Server").finish_non_exhaustive()
    }
}

impl Server {
    /// Listens on `socket`, for this user only. A socket that a process left behind is replaced.
    ///
    /// # Errors
    /// [`VmmError::Host`] if it cannot be listened on.
    pub fn start(vm: Arc<Vm>, socket: &Path, on_checkpoint: OnEvent) -> Result<Self> {
        let cannot =
            |source| VmmError::Host { op: format!("listen on {}", socket.display()), source };
        if std::os::unix::net::UnixStream::connect(socket).is_ok() {
            return Err(cannot(std::io::Error::new(
                std::io::ErrorKind::AddrInUse,
                "another process listens there",
            )));
        }
        match std::fs::symlink_metadata(socket) {
            Ok(found) if found.file_type().is_socket() => {
                std::fs::remove_file(socket).map_err(cannot)?;
            }
            Ok(_) => {
                let kind = std::io::ErrorKind::AlreadyExists;
                return Err(cannot(std::io::Error::new(kind, "what is there is no socket")));
            }
            Err(_nothing_there) => {}
        }
        let server = tiny_http::Server::http_unix(socket)
            .map_err(|error| cannot(std::io::Error::other(error)))?;
        make_private_socket(socket).map_err(cannot)?;
        let server = Arc::new(server);
        let listener = Arc::clone(&server);
        let active = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&active);
        let thread = std::thread::Builder::new()
            .name("frazil-api".into())
            .spawn(move || serve(&listener, &vm, &on_checkpoint, &counter))
            .map_err(VmmError::host("start the API thread"))?;
        Ok(Self { listener: server, socket: socket.to_owned(), active, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Ours: it could not have been bound otherwise.
        let _gone = std::fs::remove_file(&self.socket);
        self.listener.unblock();
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the panic hook.
            let _joined = thread.join();
        }
        // The request that ended the VM still wants its answer.
        let until = Instant::now() + LAST_ANSWERS_PATIENCE;
        while self.active.load(Ordering::Acquire) > 0 && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn serve(
    server: &tiny_http::Server,
    vm: &Arc<Vm>,
    on_checkpoint: &OnEvent,
    active: &Arc<AtomicUsize>,
) {
    // `recv` fails only when the server is unblocked to end.
    while let Ok(request) = server.recv() {
        if active.fetch_add(1, Ordering::Relaxed) >= MAX_REQUESTS {
            active.fetch_sub(1, Ordering::Relaxed);
            let answer = ApiError {
                error: format!("{MAX_REQUESTS} requests are being served already: try again"),
            };
            respond(request, 503, &answer);
            continue;
        }
        let (vm, on_checkpoint, done) =
            (Arc::clone(vm), Arc::clone(on_checkpoint), Arc::clone(active));
        let spawned = std::thread::Builder::new().name("frazil-request".into()).spawn(move || {
            let _done = Served(done);
            handle(request, &vm, &on_checkpoint);
        });
        if let Err(error) = spawned {
            // The request went with the thread; its client sees the connection close.
            tracing::warn!(%error, "cannot serve a request");
            active.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// Counts a request out, however it ends.
struct Served(Arc<AtomicUsize>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

fn handle(mut request: Request, vm: &Vm, on_checkpoint: &OnEvent) {
    let answer = body(&mut request).and_then(|body| route(&request, &body, vm, on_checkpoint));
    match answer {
        Ok(Body::Json(value)) => respond(request, 200, &value),
        Ok(Body::Metrics(text)) => send(request, 200, metrics::CONTENT_TYPE, text.into_bytes()),
        Err((status, error)) => respond(request, status, &ApiError { error }),
    }
}

/// What a request that succeeded is answered with.
enum Body {
    Json(Value),
    /// In Prometheus's text format.
    Metrics(String),
}

type Answer<T = Body> = std::result::Result<T, (u16, String)>;

fn body(request: &mut Request) -> Answer<Vec<u8>> {
    match (request.body_length(), request.method()) {
        (None | Some(0), Method::Get | Method::Put) => return Ok(Vec::new()),
        (Some(len), _) if len <= MAX_BODY_LEN => {}
        (Some(len), _) => {
            return Err((413, format!("body: expected at most {MAX_BODY_LEN} bytes, found {len}")));
        }
        (None, _) => return Err((411, "expected a Content-Length header, found none".into())),
    }
    let mut bytes = Vec::new();
    let mut reader = request.as_reader().take(MAX_BODY_LEN as u64);
    reader
        .read_to_end(&mut bytes)
        .map_err(|error| (400, format!("cannot read the body: {error}")))?;
    Ok(bytes)
}

/// Every route, as method and path. `openapi.json` has the same ones.
pub(super) const ROUTES: [(&str, &str); 11] = [
    ("GET", "/vm"),
    ("PUT", "/vm/pause"),
    ("PUT", "/vm/continue"),
    ("PUT", "/vm/stop"),
    ("POST", "/checkpoints"),
    ("GET", "/checkpoints/progress"),
    ("GET", "/checkpoints/statistics"),
    ("GET", "/workload"),
    ("POST", "/workload/verify"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
];

fn route(request: &Request, body: &[u8], vm: &Vm, on_checkpoint: &OnEvent) -> Answer {
    let method = request.method().to_string();
    let path = request.url().split('?').next().unwrap_or_default().to_owned();
    match (method.as_str(), path.as_str()) {
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
        ("POST", "/checkpoints") => checkpoint(body, vm, on_checkpoint),
        ("GET", "/checkpoints/progress") => to_json(&vm.checkpoint_progress()),
        ("GET", "/checkpoints/statistics") => to_json(&vm.checkpoint_statistics()),
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
            Err((405, format!("{method} is not for {path}; see /openapi.json")))
        }
        _ => Err((404, format!("nothing is at {path}; see /openapi.json"))),
    }
}

fn checkpoint(body: &[u8], vm: &Vm, on_checkpoint: &OnEvent) -> Answer {
    let request: CheckpointRequest = if body.is_empty() {
        CheckpointRequest::default()
    } else {
        serde_json::from_slice(body).map_err(|error| {
            (400, format!("body: expected a checkpoint request, found: {error}"))
        })?
    };
    let taken = vm.checkpoint(&request);
    on_checkpoint(&taken);
    conflict(taken).and_then(|report| to_json(&report))
}

fn conflict<T>(result: Result<T>) -> Answer<T> {
    result.map_err(|error| match error {
        VmmError::NotNow(_) | VmmError::Config(_) => (409, error.to_string()),
        other => (500, other.to_string()),
    })
}

fn to_json(value: &impl Serialize) -> Answer {
    serde_json::to_value(value)
        .map(Body::Json)
        .map_err(|error| (500, format!("cannot encode the answer: {error}")))
}

fn respond(request: Request, status: u16, answer: &impl Serialize) {
    let body = serde_json::to_vec(&json!(answer)).unwrap_or_default();
    send(request, status, "application/json", body);
}

fn send(request: Request, status: u16, content_type: &str, body: Vec<u8>) {
    let kind = Header::from_bytes("Content-Type", content_type).expect("a valid header");
    // A client that went away needs no answer.
    let _gone =
        request.respond(Response::from_data(body).with_status_code(status).with_header(kind));
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
