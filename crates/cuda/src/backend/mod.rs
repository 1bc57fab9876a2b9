//! The executor: weights, slots, lanes and the operations of a step.

mod estimate;
mod executor;
mod graphs;
mod kv;
mod lane;
mod loader;
mod masks;
mod ops;
mod pace;
mod packer;
mod ring;
mod slots;
mod step;

pub use estimate::Estimate;
pub use executor::{CudaConfig, CudaExecutor, Overlap};
pub use loader::WeightFormat;
