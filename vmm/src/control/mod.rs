//! Controlling a running VM from outside: an HTTP/1.1 server on a Unix socket, its client, and
//! the register of the VMs running on this host.
//!
//! `openapi.json` beside this file describes the requests; tests keep it in step with the server.

pub mod api;
mod client;
mod http;
mod metrics;
mod register;
mod server;

pub use client::Client;
pub use register::{Registration, VmRecord, find, list, memory_socket, runtime_folder};
pub use server::{OnEvent, Server};

/// The OpenAPI description, as served at `GET /openapi.json`.
pub const OPENAPI: &str = include_str!("openapi.json");
