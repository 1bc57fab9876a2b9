//! The operations on the CPU: the oracle for every GPU kernel, and a serving backend.

pub mod linear;
mod pool;

pub use pool::ThreadPool;
