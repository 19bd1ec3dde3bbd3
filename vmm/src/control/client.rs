//! The client side: one request per connection.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::api::ApiError;
use super::register::VmRecord;
use crate::error::{Result, VmmError};

/// The most bytes that an answer may have.
const MAX_ANSWER_LEN: u64 = 16 << 20;

/// A client of one VM's control socket.
#[derive(Clone, Debug)]
pub struct Client {
    record: VmRecord,
    patience: Option<Duration>,
}

impl Client {
    /// A client of the VM that `record` names. A VM that is silent for `patience` counts as dead;
    /// None sets no limit, for checkpoints that take long.
    #[must_use]
    pub fn new(record: VmRecord, patience: Option<Duration>) -> Self {
        Self { record, patience }
    }

    /// Sends `GET path` and returns the answer.
    ///
    /// # Errors
    /// [`VmmError::NoSuchVm`] if the VM cannot be reached; [`VmmError::NotNow`] with the VM's
    /// message if it refused the request.
    pub fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.request("GET", path, &[])
    }

    /// Sends `PUT path`, without a body, and returns the answer.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn put<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        self.request("PUT", path, &[])
    }

    /// Sends `POST path` with `body` as JSON, and returns the answer.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).map_err(|error| VmmError::Config(error.to_string()))?;
        self.request("POST", path, &body)
    }

    fn request<T: DeserializeOwned>(&self, method: &str, path: &str, body: &[u8]) -> Result<T> {
        let (status, answer) =
            self.exchange(method, path, body).map_err(|error| VmmError::NoSuchVm {
                name: self.record.name.clone(),
                found: format!(
                    "its control socket {} failed: {error}",
                    self.record.socket.display()
                ),
            })?;
        if (200..300).contains(&status) {
            return serde_json::from_slice(&answer)
                .map_err(|error| VmmError::NotNow(format!("the VM's answer to {method} {path} does not parse ({error}): is it another version of frazil?")));
        }
        let message = serde_json::from_slice::<ApiError>(&answer).map_or_else(
            |_| format!("the VM answered {method} {path} with status {status}"),
            |answer| answer.error,
        );
        Err(VmmError::NotNow(message))
    }

    fn exchange(&self, method: &str, path: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
        let mut stream = UnixStream::connect(&self.record.socket)?;
        stream.set_read_timeout(self.patience)?;
        stream.set_write_timeout(self.patience)?;
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: frazil\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        )?;
        stream.write_all(body)?;
        let mut answer = Vec::new();
        stream.take(MAX_ANSWER_LEN).read_to_end(&mut answer)?;
        parse_answer(&answer)
    }
}

fn parse_answer(answer: &[u8]) -> io::Result<(u16, Vec<u8>)> {
    let bad = |what: &str| {
        io::Error::new(io::ErrorKind::InvalidData, format!("expected an HTTP answer, found {what}"))
    };
    if answer.is_empty() {
        return Err(bad("none: the VM ended before it answered"));
    }
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut parsed = httparse::Response::new(&mut headers);
    match parsed.parse(answer) {
        Ok(httparse::Status::Complete(head_len)) => {
            let status = parsed.code.ok_or_else(|| bad("no status"))?;
            let len = parsed
                .headers
                .iter()
                .find(|header| header.name.eq_ignore_ascii_case("content-length"));
            let len = len
                .and_then(|header| std::str::from_utf8(header.value).ok()?.parse::<usize>().ok());
            let body = &answer[head_len..];
            match len {
                Some(len) if len == body.len() => Ok((status, body.to_vec())),
                Some(len) => Err(bad(&format!("{} of {len} bytes of body", body.len()))),
                None => Err(bad("no Content-Length")),
            }
        }
        Ok(httparse::Status::Partial) => Err(bad("an incomplete head")),
        Err(error) => Err(bad(&error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_parse_or_say_what_is_wrong() {
        let good = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}";
        assert_eq!(parse_answer(good).unwrap(), (200, b"{}".to_vec()));
        for cut in 0..good.len() {
            assert!(parse_answer(&good[..cut]).is_err(), "cut at {cut}");
        }
        assert!(parse_answer(b"SSH-2.0-OpenSSH\r\n\r\n").is_err());
    }
}
