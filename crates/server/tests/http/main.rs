//! The server end to end: real sockets, the real engine and scheduler, a simulated executor.
#![allow(clippy::unwrap_used)]

mod fault_connections;
mod fault_engine;
mod fault_requests;
mod fields;
mod harness;
mod operation;
mod shapes;
