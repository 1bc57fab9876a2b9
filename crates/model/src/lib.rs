//! Model configuration, weight files and the forward pass, written once over a dozen fused operations.
//!
//! A [`Checkpoint`] is a model on disk, such as a [`Gguf`] file: [`ModelConfig`] says what kind of
//! transformer it holds, [`Weights::load`] hands its tensors to a backend's [`Loader`], and
//! [`Transformer`] drives the backend's [`Ops`]. Nothing here knows a device.

mod checkpoint;
mod config;
mod data_file;
mod dummy;
mod error;
mod gguf;
mod hf;
mod ops;
pub mod quant;
mod rope;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod transformer;
mod weights;

pub use checkpoint::{Checkpoint, TensorInfo};
pub use config::{ARCHITECTURES, Activation, LocalLayers, ModelConfig};
pub use dummy::DummyModel;
pub use error::ModelError;
pub use gguf::{Array, Gguf, Metadata, Value};
pub use hf::{GenerationDefaults, HfDirectory, HfModel, PICKLE_EXTENSIONS, pickle_error};
pub use ops::{Loader, MatrixPart, MatrixSource, Ops};
pub use quant::GgmlType;
pub use rope::{Rope, RopePairing, RopeScaling, Rotation, long_rope_magnitude, yarn_magnitude};
pub use transformer::Transformer;
pub use weights::{LayerWeights, LoadError, Weights, check_tensors};
