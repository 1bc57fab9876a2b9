//! The operations on the CPU: the oracle for every GPU kernel, and a serving backend.
//!
//! [`CpuExecutor`] runs batches on a step thread; [`linear`] multiplies with (quantised) weights;
//! the other modules are the rest of a step: attention over the paged KV cache, elementwise
//! operations, sampling. A value's bits depend on its own sequence only: neither on the batch, nor
//! on threads, nor on the instruction set.

mod attention;
mod common_key;
mod error;
mod estimate;
mod executor;
mod kv;
pub mod linear;
mod masks;
mod math;
mod ops;
mod philox;
mod pool;
mod rope;
mod sampler;
pub mod selftest;
mod slots;
mod step;
mod weights;

use attention::MAX_HEAD_DIM;
pub use error::CpuError;
pub use estimate::{Estimate, KvEstimate};
pub use executor::{CpuConfig, CpuExecutor, CpuMode};
pub use kv::KvDtype;
pub use pool::ThreadPool;
