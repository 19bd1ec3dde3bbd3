//! The part of HTTP/1.1 that a control socket needs: one request per connection, its body read
//! whole.
//!
//! Each request is read by a thread of its own until a deadline, so a client that stalls delays
//! only itself.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The most bytes a request's line and headers may have.
const MAX_HEAD_LEN: usize = 8 << 10;
/// The most bytes a request's body may have.
pub(super) const MAX_BODY_LEN: usize = 1 << 10;
/// The most headers a request may have.
const MAX_HEADERS: usize = 64;
/// How long a client may keep sending, after its answer, before the connection is closed.
const DRAIN_PATIENCE: Duration = Duration::from_millis(500);

/// A complete request.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub method: String,
    /// Without the query.
    pub path: String,
    pub body: Vec<u8>,
}

/// Why no request was received.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoRequest {
    /// The client went away, or took too long.
    Gone,
    /// The request was malformed: the client is told so with this status and message.
    Refused(u16, String),
}

/// A request's line and headers.
struct Head {
    len: usize,
    method: String,
    path: String,
    body_len: usize,
    expects_continue: bool,
}

/// Reads one request from `stream`, by `deadline`.
pub(super) fn receive(stream: &UnixStream, deadline: Instant) -> Result<Request, NoRequest> {
    let mut bytes = Vec::new();
    let head = loop {
        if let Some(head) = parse_head(&bytes)? {
            break head;
        }
        if bytes.len() >= MAX_HEAD_LEN {
            let what = format!("request: expected a head of at most {MAX_HEAD_LEN} bytes");
            return Err(NoRequest::Refused(431, what));
        }
        read_some(stream, deadline, MAX_HEAD_LEN - bytes.len(), &mut bytes)?;
    };
    let mut body = bytes.split_off(head.len);
    if head.expects_continue && body.len() < head.body_len {
        say(stream, b"HTTP/1.1 100 Continue\r\n\r\n").map_err(|_| NoRequest::Gone)?;
    }
    while body.len() < head.body_len {
        read_some(stream, deadline, head.body_len - body.len(), &mut body)?;
    }
    // Anything after the body would be a second request; the answer says `Connection: close`.
    body.truncate(head.body_len);
    Ok(Request { method: head.method, path: head.path, body })
}

/// Sends an answer and closes `stream`.
pub(super) fn answer(stream: &UnixStream, status: u16, content_type: &str, body: &[u8]) {
    let head = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: {content_type}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        reason(status),
        body.len()
    );
    // A client that went away needs no answer.
    if say(stream, head.as_bytes()).and_then(|()| say(stream, body)).is_err() {
        return;
    }
    // Closing the connection with unread bytes would discard the answer before the client reads it.
    let _gone = stream.shutdown(Shutdown::Write);
    let deadline = Instant::now() + DRAIN_PATIENCE;
    let mut unread = Vec::new();
    while read_some(stream, deadline, 64 << 10, &mut unread).is_ok() {
        unread.clear();
    }
}

fn say(mut stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    stream.write_all(bytes)
}

/// Waits for bytes and reads those available, at most `max`.
fn read_some(
    mut stream: &UnixStream,
    deadline: Instant,
    max: usize,
    out: &mut Vec<u8>,
) -> Result<(), NoRequest> {
    let mut buffer = [0; 4096];
    let wanted = max.min(buffer.len());
    loop {
        // A timeout of zero is an error.
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_read_timeout(Some(left)).map_err(|_| NoRequest::Gone)?;
        match stream.read(&mut buffer[..wanted]) {
            Ok(0) => return Err(NoRequest::Gone),
            Ok(len) if Instant::now() < deadline => {
                out.extend_from_slice(&buffer[..len]);
                return Ok(());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(_) | Err(_) => return Err(NoRequest::Gone),
        }
    }
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>, NoRequest> {
    let bad = |what: String| NoRequest::Refused(400, what);
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut parsed = httparse::Request::new(&mut headers);
    let len = match parsed.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(bad(format!("expected an HTTP/1.1 request, found {error}"))),
    };
    let (mut body_len, mut expects_continue) = (None, false);
    for header in parsed.headers.iter() {
        let value = String::from_utf8_lossy(header.value);
        match header.name.to_ascii_lowercase().as_str() {
            "content-length" => {
                let found = value.trim().parse::<usize>().ok();
                if found.is_none() || body_len.is_some_and(|known| Some(known) != found) {
                    return Err(bad(format!("Content-Length: expected one number, found {value}")));
                }
                body_len = found;
            }
            "transfer-encoding" => {
                let what = format!("expected a Content-Length, found Transfer-Encoding: {value}");
                return Err(NoRequest::Refused(411, what));
            }
            "expect" => expects_continue = value.eq_ignore_ascii_case("100-continue"),
            _ => {}
        }
    }
    let body_len = body_len.unwrap_or(0);
    if body_len > MAX_BODY_LEN {
        let what = format!("body: expected at most {MAX_BODY_LEN} bytes, found {body_len}");
        return Err(NoRequest::Refused(413, what));
    }
    let path = parsed.path.unwrap_or_default();
    Ok(Some(Head {
        len,
        method: parsed.method.unwrap_or_default().to_owned(),
        path: path.split('?').next().unwrap_or_default().to_owned(),
        body_len,
        expects_continue,
    }))
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        411 => "Length Required",
        413 => "Content Too Large",
        431 => "Request Header Fields Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    fn receive_parts(parts: &[&[u8]], patience: Duration) -> Result<Request, NoRequest> {
        let (client, server) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for part in parts {
                    // The request may be refused before all of it was sent.
                    let _refused = say(&client, part);
                    std::thread::sleep(Duration::from_millis(2));
                }
                // The client stays connected, but silent.
                std::thread::sleep(patience.min(Duration::from_millis(200)));
            });
            receive(&server, Instant::now() + patience)
        })
    }

    #[test]
    fn a_request_is_whole_wherever_it_was_cut() {
        let text = b"POST /checkpoints?x=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n{  }";
        let whole =
            Request { method: "POST".into(), path: "/checkpoints".into(), body: b"{  }".into() };
        for cut in 0..text.len() {
            let (one, two) = text.split_at(cut);
            assert_eq!(receive_parts(&[one, two], SOON).as_ref(), Ok(&whole), "cut at {cut}");
        }
    }

    #[test]
    fn what_is_no_request_is_refused_by_its_name() {
        let long = vec![b'a'; 2 * MAX_HEAD_LEN];
        for (text, status) in [
            (&b"POST / HTTP/1.1\r\nContent-Length: 1025\r\n\r\n"[..], 413),
            (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 411),
            (b"\0\0\0", 400),
            (&long, 431),
        ] {
            match receive_parts(&[text], SOON) {
                Err(NoRequest::Refused(found, _)) => assert_eq!(found, status),
                other => panic!("expected {status}, found {other:?}"),
            }
        }
    }

    #[test]
    fn a_client_that_stalls_or_leaves_is_given_up() {
        let short = Duration::from_millis(50);
        for half in [&b""[..], b"GET /vm", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"] {
            assert_eq!(receive_parts(&[half], short), Err(NoRequest::Gone));
        }
    }

    #[test]
    fn an_answer_arrives_though_its_request_was_not_read_to_the_end() {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(&[b'x'; 10_000]).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(move || answer(&server, 413, "text/plain", b"too long"));
            let mut found = String::new();
            client.read_to_string(&mut found).unwrap();
            assert!(found.starts_with("HTTP/1.1 413 Content Too Large\r\n"), "{found}");
            assert!(found.ends_with("\r\n\r\ntoo long"), "{found}");
            drop(client);
        });
    }
}
