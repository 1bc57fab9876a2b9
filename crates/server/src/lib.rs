//! The OpenAI wire: routes, validation, server-sent events, errors, metrics.
//!
//! The way of a generation request through this crate:
//!
//! 1. `serve` owns the connections and their limits; `routes` finds the handler, inside `access_log`
//!    (an id and one log line a request) and `auth` (deny by default).
//! 2. `body` reads the request within bounds of size and time, `json` parses it strictly, `validate`
//!    (with `messages` for chats) makes the one `ValidatedRequest` that all endpoints share.
//! 3. `prepare` takes a place in the queue first, then renders and tokenizes on worker threads, then
//!    submits to the engine.
//! 4. `generation` turns the engine's events into text; `sse` streams them as chunks, or the route
//!    collects them into one response. Dropping either aborts what still runs.
//!
//! Nothing here knows of KV blocks or steps.

mod access_log;
mod app;
mod auth;
mod body;
mod config;
mod dto;
mod errors;
mod fields;
mod generation;
mod json;
mod messages;
mod metrics;
mod prepare;
mod routes;
mod serve;
mod sse;
mod validate;

pub use app::{App, SamplingDefaults, ServedModel};
pub use config::ServerConfig;
pub use serve::{ServerError, serve};
