use half::bf16;
use spate_model::RopePairing;

use super::{KvShape, VEC, image, striding_grid};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Shape, Slice, Stream};

/// In place of a token's place in the cache: it has none (padding).
pub const NOWHERE: u32 = u32::MAX;

/// Elements of a head that one thread holds.
const PER_THREAD: usize = 2 * VEC;

const THREADS: u32 = 128;

/// Everything about positions: rotation angles of a step, and their application.
pub struct Rope {
    rotations: Kernel,
    append: Kernel,
    append_packed: Kernel,
}

/// Parameters of [`Rope::append`] that a model fixes.
#[derive(Debug, Clone, Copy)]
pub struct QkNormRopeAppend {
    /// Query heads.
    pub heads: u32,
    /// The cache.
    pub shape: KvShape,
    /// Which elements of a head form a rotated pair.
    pub pairing: RopePairing,
    /// Rotated pairs of a head.
    pub pairs: u32,
    /// Epsilon of the heads' norms.
    pub eps: f32,
}

impl Rope {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("rope"))?;
        Ok(Self {
            rotations: module.kernel(c"rope_rotations")?,
            append: module.kernel(c"qk_norm_rope_append")?,
            append_packed: module.kernel(c"qk_norm_rope_append_packed")?,
        })
    }

    /// Whether heads of this shape can be rotated by [`append`](Self::append).
    pub fn supports(head_dim: usize, rotated: usize) -> bool {
        head_dim.is_multiple_of(PER_THREAD)
            && head_dim <= 32 * PER_THREAD
            && rotated.is_multiple_of(PER_THREAD)
            && rotated <= head_dim
    }

    /// Cosines and sines, times `magnitude`, of `position * rate`: `rotations` is
    /// `[positions][rates][2]`.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If `rotations` is too small.
    pub unsafe fn rotations(
        &self,
        stream: &Stream,
        positions: Slice<u32>,
        rates: Slice<f64>,
        magnitude: f32,
        rotations: Slice<f32>,
    ) -> Result<(), CudaError> {
        let work = positions.len() * rates.len();
        assert!(rotations.len() >= 2 * work);
        let shape = Shape::new(striding_grid(work, THREADS, stream.sms()), THREADS);
        let (n, pairs) = (positions.len() as u32, rates.len() as u32);
        let arguments = (positions, rates, magnitude, n, pairs, rotations);
        // SAFETY: the types are those of rope.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe { self.rotations.launch(stream, shape, &arguments) }
    }

    /// Normalises query and key heads (if there are norms), rotates both, writes keys and values to
    /// the cache of `layer`.
    ///
    /// `qkv`: `[places, (heads + 2 * kv_heads) * head_dim]`; `norms`: the queries' and the keys',
    /// `[head_dim]` each; `rotations`: as [`rotations`](Self::rotations) made them; `common`: taken
    /// from every rotated key, `[kv_heads, head_dim]`, which changes no attention; `places`: one per token, `block * block_size + offset` or [`NOWHERE`]; `cache`: as [`KvShape`] says. A cache of codes
    /// has the elements of keys in another order, and perhaps rotated; queries are changed alike.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Places and the layer are inside the cache, no place occurs twice; all memory is alive until
    /// the kernel has run.
    ///
    /// # Panics
    /// If the heads are not [supported](Self::supports) or a buffer is too small.
    pub unsafe fn append(
        &self,
        stream: &Stream,
        model: &QkNormRopeAppend,
        layer: usize,
        norms: Option<(Slice<f32>, Slice<f32>)>,
        rotations: Slice<f32>,
        common: Option<Slice<f32>>,
        places: Slice<u32>,
        qkv: Slice<bf16>,
        cache: Slice<u8>,
    ) -> Result<(), CudaError> {
        let QkNormRopeAppend { heads, shape, .. } = *model;
        let (tokens, pairs, dim) = (places.len(), model.pairs as usize, shape.head_dim as usize);
        let all_heads = (heads + 2 * shape.kv_heads) as usize;
        assert!(Self::supports(dim, 2 * pairs));
        assert!(qkv.len() >= tokens * all_heads * dim && rotations.len() >= 2 * tokens * pairs);
        assert!(cache.len() >= (layer + 1) * shape.layer_bytes());
        assert!(common.is_none_or(|common| common.len() == shape.kv_heads as usize * dim));
        assert!(norms.is_none_or(|(q, k)| q.len() == dim && k.len() == dim));
        let group = (dim / PER_THREAD).next_power_of_two();
        let grid = (tokens * all_heads * group).div_ceil(THREADS as usize);
        let (q_norm, k_norm) = norms.unwrap_or((Slice::null(), Slice::null()));
        let interleaved = u8::from(model.pairing == RopePairing::Interleaved);
        let arguments = (
            qkv,
            q_norm,
            k_norm,
            model.eps,
            rotations,
            model.pairs,
            interleaved,
            common.unwrap_or(Slice::null()),
            places,
            shape,
            layer as u32,
            heads,
            tokens as u32,
            group as u32,
            cache,
        );
        let kernel = match shape.is_packed() {
            true => &self.append_packed,
            false => &self.append,
        };
        // SAFETY: the types are those of rope.cu (a C++ bool is a byte of 0 or 1), the lengths were
        // checked, the caller vouches for the rest.
        unsafe { kernel.launch(stream, Shape::new(grid as u32, THREADS), &arguments) }
    }
}
