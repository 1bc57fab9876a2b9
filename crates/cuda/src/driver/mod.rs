//! The CUDA driver, as far as Spate needs it: small owned types over `cudarc`'s raw bindings.
//!
//! libcuda is loaded when the first [`Device`] is opened. All types keep their device alive. A
//! thread must [`Device::bind`] before it launches or copies.

mod device;
mod graph;
mod launch;
mod memory;
mod module;
mod partition;
mod stream;
mod tensor_map;

pub use device::{Device, Peaks, device_count, is_installed};
pub use graph::Graph;
pub use launch::{Arguments, Parameter, Shape};
pub use memory::{Arena, Pinned, Plain, Slice};
pub use module::{Image, Kernel, Module};
pub use partition::Partition;
pub use stream::{Event, Priority, Stream};
pub use tensor_map::TensorMap;
