//! The operations on NVIDIA GPUs, with kernels of our own. Builds and links without CUDA.
//!
//! [`driver`] wraps the CUDA driver, [`kernels`] has one module per file of `kernels/`: what a
//! kernel takes, checked and typed. The kernels are compiled ahead of time (`cargo xtask kernels`)
//! and embedded; libcuda is loaded at run time. [`selftest`] compares each kernel with plain
//! arithmetic on the machine at hand.

mod backend;
pub mod driver;
mod error;
pub mod kernels;
mod linear;
pub mod selftest;

pub use backend::{CudaConfig, CudaExecutor, Overlap, WeightFormat};
pub use error::CudaError;
pub use kernels::KvDtype;
pub use linear::{Linear, PackedPart};
