use std::ops::Range;

use crate::{Activation, Checkpoint, GgmlType, ModelError, TensorInfo};

/// Makes a backend's own form of the weights out of a file's.
///
/// Called from several threads at once.
pub trait Loader: Sync {
    /// A linear map, or several that read the same input with their outputs one after another.
    type Matrix: Send;
    /// A float32 vector.
    type Vector: Send;
    /// Why it failed, such as no memory left.
    type Error: Send;

    /// Takes a linear map over.
    ///
    /// # Errors
    /// When the backend has no room for it.
    fn matrix(&self, source: MatrixSource<'_>) -> Result<Self::Matrix, Self::Error>;

    /// Takes a vector over.
    ///
    /// # Errors
    /// When the backend has no room for it.
    fn vector(&self, source: &[f32]) -> Result<Self::Vector, Self::Error>;
}

/// A linear map as it comes from the file.
pub struct MatrixSource<'a> {
    /// Input width.
    pub cols: usize,
    /// Stacked: the output is the parts' outputs one after another.
    pub parts: Vec<MatrixPart<'a>>,
    /// Added to the output; as long as all parts have rows.
    pub bias: Option<Vec<f32>>,
}

/// `rows x cols` elements, row-major, in a block format.
///
/// They are still in the file: a backend reads them to where it wants them, as much at a time as it
/// has room for.
pub struct MatrixPart<'a> {
    /// Format.
    pub ggml_type: GgmlType,
    /// Output width.
    pub rows: usize,
    /// Size of the elements.
    pub bytes: usize,
    pub(crate) model: &'a dyn Checkpoint,
    pub(crate) tensor: &'a TensorInfo,
    /// First byte of the tensor.
    pub(crate) start: usize,
}

impl MatrixPart<'_> {
    /// Fills `out` with the elements' bytes from `start` on.
    ///
    /// # Errors
    /// When the file can't be read.
    ///
    /// # Panics
    /// If there are fewer bytes.
    pub fn read_at(&self, start: usize, out: &mut [u8]) -> Result<(), ModelError> {
        assert!(start <= self.bytes && out.len() <= self.bytes - start);
        self.model.read_at(self.tensor, self.start + start, out)
    }

    /// All the elements' bytes.
    ///
    /// # Errors
    /// When the file can't be read.
    pub fn read(&self) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; self.bytes];
        self.read_at(0, &mut bytes)?;
        Ok(bytes)
    }
}

/// The fused operations that a transformer is made of.
///
/// A `Step` holds what a batch looks like — its tokens, their positions, the KV blocks, which
/// positions want logits — in the backend's own form; the transformer only passes it along. An
/// `Act` is a float matrix `[tokens, width]` allocated once with room for the largest step. All
/// operations work on the first `tokens` rows, in order, and allocate nothing.
///
/// A token's values must not depend on the other tokens of the step, bit for bit, except through
/// the KV cache of its own sequence.
pub trait Ops {
    /// See [`Loader::Matrix`].
    type Matrix;
    /// See [`Loader::Vector`].
    type Vector;
    /// Activations.
    type Act;
    /// A batch.
    type Step;
    /// A lost device. Backends that can't fail say [`std::convert::Infallible`].
    type Error;

    /// Makes an activation buffer of a given width.
    ///
    /// # Errors
    /// When there is no room for it.
    fn alloc(&mut self, width: usize) -> Result<Self::Act, Self::Error>;

    /// `out[t] = scale * table[token(t)]`.
    ///
    /// # Errors
    /// When the device is lost; so for all operations.
    fn embed(
        &mut self,
        step: &Self::Step,
        table: &Self::Matrix,
        scale: f32,
        out: &mut Self::Act,
    ) -> Result<(), Self::Error>;

    /// `residual += delta`, then `out = residual / rms(residual) * norm` (Zhang & Sennrich 2019).
    /// A delta with a norm of its own is normalised in the same way before.
    ///
    /// # Errors
    /// When the device is lost.
    fn add_rms_norm(
        &mut self,
        step: &Self::Step,
        delta: Option<(&Self::Act, Option<&Self::Vector>)>,
        residual: &mut Self::Act,
        norm: &Self::Vector,
        out: &mut Self::Act,
    ) -> Result<(), Self::Error>;

    /// `out = x * matrix^T (+ bias)`.
    ///
    /// # Errors
    /// When the device is lost.
    fn linear(
        &mut self,
        step: &Self::Step,
        matrix: &Self::Matrix,
        x: &Self::Act,
        out: &mut Self::Act,
    ) -> Result<(), Self::Error>;

    /// `out = activation(gate) * up`, where the outputs of [`linear`](Self::linear) are gate, then up.
    ///
    /// # Errors
    /// When the device is lost.
    fn gated_linear(
        &mut self,
        step: &Self::Step,
        matrix: &Self::Matrix,
        activation: Activation,
        x: &Self::Act,
        out: &mut Self::Act,
    ) -> Result<(), Self::Error>;

    /// Splits each row of `qkv` into query, key and value heads; normalises each query and key head
    /// when `norms` (query's, key's) are given; rotates both as [`crate::ModelConfig::rope`] says of
    /// `layer`; writes keys and values to the KV cache of `layer`. The queries stay in place.
    ///
    /// # Errors
    /// When the device is lost.
    fn qk_norm_rope_append(
        &mut self,
        step: &Self::Step,
        layer: usize,
        norms: Option<(&Self::Vector, &Self::Vector)>,
        qkv: &mut Self::Act,
    ) -> Result<(), Self::Error>;

    /// Causal attention of the queries in `qkv` over the KV cache of `layer`, as far back as
    /// [`crate::ModelConfig::window`] lets it see; `out` is `[tokens, heads * head_dim]`.
    ///
    /// # Errors
    /// When the device is lost.
    fn attention(
        &mut self,
        step: &Self::Step,
        layer: usize,
        qkv: &Self::Act,
        out: &mut Self::Act,
    ) -> Result<(), Self::Error>;

    /// Marks the step's rows whose last position is not finite in `x` as failed: attention carries a
    /// fault of any earlier position there.
    ///
    /// # Errors
    /// When the device is lost.
    fn check(&mut self, step: &mut Self::Step, x: &Self::Act) -> Result<(), Self::Error>;

    /// Tiles into which the positions that want logits are cut: logits are as wide as the
    /// vocabulary, so only one tile of them exists at a time.
    fn logit_tiles(&self, step: &Self::Step) -> Range<usize>;

    /// Computes one tile of logits, `x[position] * head^T`, into a buffer of the backend.
    ///
    /// # Errors
    /// When the device is lost.
    fn logits(
        &mut self,
        step: &Self::Step,
        tile: usize,
        head: &Self::Matrix,
        x: &Self::Act,
    ) -> Result<(), Self::Error>;

    /// Chooses tokens and computes logprobs from the tile that [`Ops::logits`] made, and keeps the
    /// results in `step`.
    ///
    /// # Errors
    /// When the device is lost.
    fn sample(&mut self, step: &mut Self::Step, tile: usize) -> Result<(), Self::Error>;
}
