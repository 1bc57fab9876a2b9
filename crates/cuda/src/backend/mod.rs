//! The executor: weights, slots, lanes and the operations of a step.

mod executor;
mod graphs;
mod kv;
mod lane;
mod loader;
mod masks;
mod ops;
mod packer;
mod ring;
mod slots;
mod step;

pub use executor::{CudaConfig, CudaExecutor, Overlap};
pub use loader::WeightFormat;
