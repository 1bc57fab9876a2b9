use std::ffi::CStr;
use std::ops::Range;

use half::bf16;
use spate_model::Activation;

use super::{VEC, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream};

/// `out = x weights^T + bias`.
#[derive(Clone, Copy)]
pub struct Product {
    /// Rows of `x` and `out`.
    pub tokens: usize,
    /// Rows of `weights`.
    pub outputs: usize,
    /// Width of `x`.
    pub inputs: usize,
    /// `[tokens, inputs]`.
    pub x: Slice<bf16>,
    /// `[outputs, inputs]`.
    pub weights: Slice<bf16>,
    /// Whether the kernel before this one in the stream writes the weights. Otherwise they are read
    /// while it still runs.
    pub fresh_weights: bool,
    /// Of weights that are gates, then as many ups: `out = activation(gate) * up`, where both are rounded to
    /// bfloat16 before. Hopper's kernels only.
    pub gate: Option<Activation>,
    /// `[outputs]`.
    pub bias: Option<Slice<f32>>,
    /// `[tokens, stride]`, of which the first [`width`](Self::width) columns are written.
    pub out: Output,
    /// Width of the rows of `out`: outputs may be a part of what is computed from `x`.
    pub stride: usize,
}

/// Where a product goes.
#[derive(Clone, Copy)]
pub enum Output {
    /// Rounded to bfloat16.
    Bf16(Slice<bf16>),
    /// As it was accumulated.
    F32(Slice<f32>),
}

impl Product {
    /// Width of the result: `outputs`, or half of them with gates.
    pub fn width(&self) -> usize {
        self.outputs / if self.gate.is_some() { 2 } else { 1 }
    }

    pub(super) fn check(&self) {
        assert!(self.weights.len() >= self.outputs * self.inputs);
        self.check_activations();
    }

    pub(crate) fn check_activations(&self) {
        let (tokens, outputs, inputs) = (self.tokens, self.outputs, self.inputs);
        assert!(tokens > 0 && outputs > 0 && inputs > 0);
        assert!(inputs.is_multiple_of(VEC) && self.x.len() >= tokens * inputs);
        assert!(self.bias.is_none_or(|bias| bias.len() >= outputs));
        let width = self.width();
        assert!(self.stride >= width);
        let len = (tokens - 1) * self.stride + width;
        match self.out {
            Output::Bf16(out) => {
                assert!(width.is_multiple_of(VEC) && self.stride.is_multiple_of(VEC));
                assert!(self.gate.is_none() || outputs.is_multiple_of(2));
                assert!(out.len() >= len);
            }
            Output::F32(out) => assert!(self.gate.is_none() && out.len() >= len),
        }
    }

    /// The same for some of the outputs, of whose weights only the others are left out.
    pub(crate) fn part(&self, outputs: Range<usize>) -> Self {
        Self {
            outputs: outputs.len(),
            bias: self.bias.map(|bias| bias.range(outputs.clone())),
            out: match self.out {
                Output::Bf16(out) => Output::Bf16(out.range(outputs.start..out.len())),
                Output::F32(out) => Output::F32(out.range(outputs.start..out.len())),
            },
            ..*self
        }
    }
}

/// One of the two operands of a product `a b^T`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    A,
    B,
}

/// A way to cut the product into tiles. They differ in speed only: see gemm_bf16.cu.
struct Tile {
    entry: &'static CStr,
    weights: Side,
    /// Rows of `a` and of `b`.
    size: [usize; 2],
    warps: u32,
    stages: u32,
    /// Blocks that fit on an SM of 164 KiB.
    blocks_per_sm: u32,
}

/// By the number of tokens that they are for.
const TILES: [Tile; 3] = [
    Tile {
        entry: c"gemm_bf16_weights_16",
        weights: Side::A,
        size: [64, 16],
        warps: 4,
        stages: 6,
        blocks_per_sm: 2,
    },
    Tile {
        entry: c"gemm_bf16_weights_64",
        weights: Side::A,
        size: [64, 64],
        warps: 4,
        stages: 5,
        blocks_per_sm: 2,
    },
    Tile {
        entry: c"gemm_bf16_tokens",
        weights: Side::B,
        size: [128, 128],
        warps: 8,
        stages: 3,
        blocks_per_sm: 1,
    },
];

impl Tile {
    fn choose(tokens: usize) -> usize {
        match tokens {
            ..=16 => 0,
            17..=64 => 1,
            _ => 2,
        }
    }

    fn shared_bytes(&self) -> u32 {
        let rows = (self.size[0] + self.size[1]) as u32;
        self.stages * rows * 128
    }
}

/// The struct `Args` of gemm_bf16.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    a: u64,
    b: u64,
    out: u64,
    out_f32: u64,
    bias: u64,
    rows_a: u32,
    rows_b: u32,
    k: u32,
    stride: u32,
}

// SAFETY: numbers without gaps between them; the kernel declares the same.
unsafe impl Plain for Args {}

/// The product on any GPU.
pub struct GemmPortable {
    kernels: Vec<Kernel>,
}

impl GemmPortable {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("gemm_bf16"))?;
        let kernels = TILES.iter().map(|tile| {
            let kernel = module.kernel(tile.entry)?;
            kernel.allow_shared_bytes(tile.shared_bytes())?;
            Ok(kernel)
        });
        Ok(Self {
            kernels: kernels.collect::<Result<_, CudaError>>()?,
        })
    }

    /// Computes a product.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If `inputs`, or `outputs` of a bfloat16 result, is not a multiple of 8, or a buffer is too
    /// small.
    pub unsafe fn launch(&self, stream: &Stream, product: &Product) -> Result<(), CudaError> {
        product.check();
        let chosen = Tile::choose(product.tokens);
        let (tile, kernel) = (&TILES[chosen], &self.kernels[chosen]);
        let (mut a, mut b) = (
            (product.x.address(), product.tokens),
            (product.weights.address(), product.outputs),
        );
        if tile.weights == Side::A {
            std::mem::swap(&mut a, &mut b);
        }
        let (out, out_f32) = match product.out {
            Output::Bf16(out) => (out.address(), 0),
            Output::F32(out) => (0, out.address()),
        };
        let args = Args {
            a: a.0,
            b: b.0,
            out,
            out_f32,
            bias: product.bias.map_or(0, |bias| bias.address()),
            rows_a: a.1 as u32,
            rows_b: b.1 as u32,
            k: product.inputs as u32,
            stride: product.stride as u32,
        };
        let tiles = a.1.div_ceil(tile.size[0]) * b.1.div_ceil(tile.size[1]);
        let grid = tiles.min((stream.sms() * tile.blocks_per_sm) as usize) as u32;
        let shape = Shape::new(grid, 32 * tile.warps).shared_bytes(tile.shared_bytes());
        // SAFETY: the struct is the kernel's, the lengths were checked, the caller vouches for the
        // rest.
        unsafe { kernel.launch(stream, shape, &(args,)) }
    }
}
