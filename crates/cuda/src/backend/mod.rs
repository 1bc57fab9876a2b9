//! The executor: weights, slots, lanes and the operations of a step.

mod executor;
mod lane;
mod loader;
mod ops;
mod packer;
mod slots;
mod step;

pub use executor::{CudaConfig, CudaExecutor};
pub use loader::WeightFormat;
