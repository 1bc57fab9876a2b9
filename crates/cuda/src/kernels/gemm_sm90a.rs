use std::ffi::CStr;

use spate_model::Activation;

use super::gemm::{Output, Product, Side};
use super::image;
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream, TensorMap};

/// Elements of a row of a box: the widest that wgmma's swizzle allows.
const SLICE: usize = 64;

/// Clusters along the tokens that are done together before the next tile of outputs.
const GROUP: u32 = 8;

/// A way to cut the product into tiles. They differ in speed only: see gemm_sm90a.cuh, whose
/// `GemmShape` has the same parameters.
#[derive(Debug)]
struct Tile {
    entry: &'static CStr,
    weights: Side,
    warpgroups: u32,
    /// Rows of `b`.
    bn: u32,
    /// Slices of 64 k in a stage.
    slices: u32,
    stages: u32,
    cluster: u32,
}

/// Weights as rows of `a`.
const fn skinny(
    entry: &'static CStr,
    warpgroups: u32,
    bn: u32,
    [slices, stages]: [u32; 2],
    cluster: u32,
) -> Tile {
    Tile {
        entry,
        weights: Side::A,
        warpgroups,
        bn,
        slices,
        stages,
        cluster,
    }
}

/// Tokens as rows of `a`.
const fn wide(entry: &'static CStr, warpgroups: u32, bn: u32, stages: u32, cluster: u32) -> Tile {
    Tile {
        entry,
        weights: Side::B,
        warpgroups,
        bn,
        slices: 1,
        stages,
        cluster,
    }
}

/// Of the first so many tiles the narrowest with room for all tokens is best.
const FEW: usize = 4;

const TILES: [Tile; GemmHopper::TILES] = [
    skinny(c"gemm_skinny_bf16_64x8", 1, 8, [2, 11], 1),
    skinny(c"gemm_skinny_bf16_64x16", 1, 16, [2, 10], 1),
    skinny(c"gemm_skinny_bf16_64x32", 1, 32, [2, 8], 1),
    skinny(c"gemm_skinny_bf16_64x64", 1, 64, [2, 6], 1),
    skinny(c"gemm_skinny_bf16_64x64_c2", 1, 64, [2, 6], 2),
    skinny(c"gemm_skinny_bf16_64x80", 1, 80, [2, 5], 1),
    skinny(c"gemm_skinny_bf16_64x96", 1, 96, [2, 5], 1),
    skinny(c"gemm_skinny_bf16_64x96_s1", 1, 96, [1, 10], 1),
    skinny(c"gemm_skinny_bf16_64x128", 1, 128, [1, 8], 1),
    skinny(c"gemm_skinny_bf16_64x128_s2", 1, 128, [2, 4], 1),
    skinny(c"gemm_skinny_bf16_64x128_c2", 1, 128, [1, 8], 2),
    skinny(c"gemm_skinny_bf16_64x160", 1, 160, [1, 7], 1),
    skinny(c"gemm_skinny_bf16_64x192", 1, 192, [1, 6], 1),
    skinny(c"gemm_skinny_bf16_64x192_c2", 1, 192, [1, 6], 2),
    skinny(c"gemm_skinny_bf16_64x256", 1, 256, [1, 5], 1),
    skinny(c"gemm_skinny_bf16_128x96", 2, 96, [1, 7], 1),
    skinny(c"gemm_skinny_bf16_128x128", 2, 128, [1, 6], 1),
    skinny(c"gemm_skinny_bf16_128x144", 2, 144, [1, 5], 1),
    skinny(c"gemm_skinny_bf16_128x160", 2, 160, [1, 5], 1),
    skinny(c"gemm_skinny_bf16_128x176", 2, 176, [1, 4], 1),
    skinny(c"gemm_skinny_bf16_128x192", 2, 192, [1, 4], 1),
    skinny(c"gemm_skinny_bf16_128x192_c2", 2, 192, [1, 4], 2),
    skinny(c"gemm_skinny_bf16_128x256", 2, 256, [1, 4], 1),
    wide(c"gemm_bf16_64x160", 1, 160, 6, 1),
    wide(c"gemm_bf16_64x192", 1, 192, 6, 1),
    wide(c"gemm_bf16_64x192_c2", 1, 192, 6, 2),
    wide(c"gemm_bf16_64x256", 1, 256, 5, 1),
    wide(c"gemm_bf16_128x96", 2, 96, 7, 2),
    wide(c"gemm_bf16_128x96_c1", 2, 96, 7, 1),
    wide(c"gemm_bf16_128x128", 2, 128, 6, 2),
    wide(c"gemm_bf16_128x128_c1", 2, 128, 6, 1),
    wide(c"gemm_bf16_128x144_c1", 2, 144, 5, 1),
    wide(c"gemm_bf16_128x160_c1", 2, 160, 5, 1),
    wide(c"gemm_bf16_128x192", 2, 192, 4, 2),
    wide(c"gemm_bf16_128x192_c1", 2, 192, 4, 1),
    wide(c"gemm_bf16_128x224", 2, 224, 4, 2),
    wide(c"gemm_bf16_128x224_c1", 2, 224, 4, 1),
    wide(c"gemm_bf16_128x240_c1", 2, 240, 4, 1),
    wide(c"gemm_bf16_128x256", 2, 256, 4, 2),
    wide(c"gemm_bf16_128x256_c1", 2, 256, 4, 1),
];

impl Tile {
    fn bm(&self) -> u32 {
        64 * self.warpgroups
    }

    fn threads(&self) -> u32 {
        let trades_registers = self.warpgroups * self.bn > 256;
        128 * self.warpgroups + if trades_registers { 128 } else { 32 }
    }

    /// The box of the output that a warpgroup stores at once: tokens, outputs. With gates there are half as
    /// many outputs.
    fn out_box(&self, gated: bool) -> [u32; 2] {
        let outputs = self.bn / if gated { 2 } else { 1 };
        match self.weights {
            Side::A => [self.box_tokens(), if gated { 32 } else { 64 }],
            Side::B if outputs.is_multiple_of(64) => [64, 64],
            Side::B if outputs.is_multiple_of(32) => [64, 32],
            Side::B => [64, 16],
        }
    }

    /// All of a few tokens, otherwise a half or a quarter of them.
    fn box_tokens(&self) -> u32 {
        match self.bn {
            ..=64 => self.bn,
            bn if bn <= 128 || !bn.is_multiple_of(32) => bn / 2,
            bn => bn / 4,
        }
    }

    fn shared_bytes(&self) -> u32 {
        let stage = self.slices * (self.bm() + self.bn) * 2 * SLICE as u32;
        let boxes = match self.weights {
            Side::A if self.box_tokens() == self.bn => 1,
            _ => 2,
        };
        let [tokens, outputs] = self.out_box(false);
        let barriers = 2 * 8 * self.stages;
        self.stages * stage + self.warpgroups * boxes * 2 * tokens * outputs + barriers
    }

    /// Whether gates and ups can be in turn in a block's part of the weights.
    fn can_gate(&self) -> bool {
        self.weights == Side::A || self.bn.is_multiple_of(32)
    }

    /// Clusters of blocks that have something to do.
    fn tiles(&self, tokens: usize, outputs: usize) -> usize {
        let (a, b) = match self.weights {
            Side::A => (outputs, tokens),
            Side::B => (tokens, outputs),
        };
        a.div_ceil((self.bm() * self.cluster) as usize) * b.div_ceil(self.bn as usize)
    }

    /// Cycles for 64 k of all tiles, if nothing but the tensor cores and shared memory limits them.
    fn cycles(&self, tokens: usize, outputs: usize, sms: u32) -> usize {
        let (warpgroups, bn) = (self.warpgroups as usize, self.bn as usize);
        // 64 x bn x 64 operations at 4096 a cycle, or the bytes that wgmma reads and TMA writes at 128.
        let tensor = 2 * warpgroups * bn;
        let shared = warpgroups * (64 + bn) + self.bm() as usize + bn;
        let at_once = (sms / self.cluster).max(1) as usize;
        self.tiles(tokens, outputs).div_ceil(at_once) * tensor.max(shared)
    }

    /// Up to 64 tokens the weights' way from memory is what takes long, and the narrowest tile with
    /// room for all tokens is best. Above, the tile that leaves the fewest tensor cores idle.
    fn choose(tokens: usize, outputs: usize, gated: bool, sms: u32) -> usize {
        let mut few = TILES[..FEW].iter();
        if let Some(tile) = few.position(|tile| tokens <= tile.bn as usize) {
            return tile;
        }
        let tiles = (FEW..TILES.len()).filter(|&tile| !gated || TILES[tile].can_gate());
        let best = tiles.min_by_key(|&tile| TILES[tile].cycles(tokens, outputs, sms));
        best.expect("there are tiles for many tokens")
    }
}

/// The struct `GemmArgs` of gemm_sm90a.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    a: TensorMap,
    b: TensorMap,
    out: TensorMap,
    out_f32: u64,
    bias: u64,
    rows_a: u32,
    rows_b: u32,
    k: u32,
    group: u32,
    stride: u32,
    gate: u32,
    padding: [u32; 6],
}

// SAFETY: numbers without gaps between them; the kernel declares the same.
unsafe impl Plain for Args {}

/// The product on Hopper (compute capability 9.0).
pub struct GemmHopper {
    /// One for each of [`TILES`].
    kernels: Vec<Kernel>,
}

impl GemmHopper {
    /// How many tiles there are.
    pub(crate) const TILES: usize = 40;

    /// Whether the GPU has what the kernels need.
    pub fn fits(device: &Device) -> bool {
        device.capability() == (9, 0)
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let skinny = Module::load(device, &image!("gemm_skinny_bf16_sm90a"))?;
        let wide = Module::load(device, &image!("gemm_bf16_sm90a"))?;
        let kernels = TILES.iter().map(|tile| {
            let kernel = match tile.weights {
                Side::A => skinny.kernel(tile.entry)?,
                Side::B => wide.kernel(tile.entry)?,
            };
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
    /// All memory is alive until the kernel has run. The weights were complete before the kernel that
    /// precedes this one in the stream was launched, unless they are said to be fresh.
    ///
    /// # Panics
    /// If `inputs`, or `outputs` of a bfloat16 result, is not a multiple of 8, or a buffer is too
    /// small.
    pub unsafe fn launch(&self, stream: &Stream, product: &Product) -> Result<(), CudaError> {
        let (tokens, outputs) = (product.tokens, product.outputs);
        let tile = Tile::choose(tokens, outputs, product.gate.is_some(), stream.sms());
        // SAFETY: the caller vouches for it.
        unsafe { self.launch_with(tile, stream, product) }
    }

    /// With one of the tiles, for tests and measurements. The rest as [`launch`](Self::launch).
    pub(crate) unsafe fn launch_with(
        &self,
        tile: usize,
        stream: &Stream,
        product: &Product,
    ) -> Result<(), CudaError> {
        product.check();
        let (tile, kernel) = (&TILES[tile], &self.kernels[tile]);
        let args = Self::args(tile, product)?;
        let clusters = tile.tiles(product.tokens, product.outputs);
        let clusters = clusters.min((stream.sms() / tile.cluster).max(1) as usize) as u32;
        let shape = Shape::new(clusters * tile.cluster, tile.threads());
        let mut shape = shape.shared_bytes(tile.shared_bytes());
        if product.fresh_weights {
            shape = shape.after_previous();
        }
        // SAFETY: the struct is the kernel's, the lengths were checked, the caller vouches for the
        // rest.
        unsafe { kernel.launch(stream, shape, &(args,)) }
    }

    /// Whether a tile can compute products with gates.
    pub(crate) fn can_gate(tile: usize) -> bool {
        TILES[tile].can_gate()
    }

    /// The tile's name; how much longer it should take than the one that would be chosen.
    pub(crate) fn tile(tile: usize, product: &Product, sms: u32) -> (&'static str, f64) {
        let (tokens, outputs) = (product.tokens, product.outputs);
        let chosen = Tile::choose(tokens, outputs, product.gate.is_some(), sms);
        let cycles = |tile: usize| TILES[tile].cycles(tokens, outputs, sms) as f64;
        let name = TILES[tile].entry.to_str().expect("a C identifier");
        (name, cycles(tile) / cycles(chosen))
    }

    fn args(tile: &Tile, product: &Product) -> Result<Args, CudaError> {
        let gate = product.gate;
        let tokens = |box_rows| {
            let shape = [product.tokens, product.inputs];
            TensorMap::new(product.x, shape, product.inputs, [box_rows, SLICE as u32])
        };
        let weights = |box_rows| {
            let shape = [product.outputs, product.inputs];
            match gate {
                Some(_) => TensorMap::gates(product.weights, shape, box_rows),
                None => TensorMap::new(
                    product.weights,
                    shape,
                    product.inputs,
                    [box_rows, SLICE as u32],
                ),
            }
        };
        let (a_rows, b_rows) = (tile.bm(), tile.bn / tile.cluster);
        let (a, b, rows_a, rows_b) = match tile.weights {
            Side::A => (
                weights(a_rows)?,
                tokens(b_rows)?,
                product.outputs,
                product.tokens,
            ),
            Side::B => (
                tokens(a_rows)?,
                weights(b_rows)?,
                product.tokens,
                product.outputs,
            ),
        };
        let (out, out_f32) = match product.out {
            Output::Bf16(out) => {
                let shape = [product.tokens, product.width()];
                let out_box = tile.out_box(gate.is_some());
                let out = TensorMap::new(out, shape, product.stride, out_box)?;
                (out, Slice::null())
            }
            Output::F32(out) => (TensorMap::UNUSED, out),
        };
        Ok(Args {
            a,
            b,
            out,
            out_f32: out_f32.address(),
            bias: product.bias.map_or(0, |bias| bias.address()),
            rows_a: rows_a as u32,
            rows_b: rows_b as u32,
            k: product.inputs as u32,
            // With few tokens, the blocks that read the same weights are neighbours in time.
            group: if tile.weights == Side::A { 1 } else { GROUP },
            stride: product.stride as u32,
            gate: match gate {
                None => 0,
                Some(Activation::Silu) => 1,
                Some(Activation::GeluTanh) => 2,
            },
            padding: [0; 6],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(tokens: usize, outputs: usize) -> &'static str {
        let tile = Tile::choose(tokens, outputs, false, 132);
        let entry = TILES[tile].entry.to_str();
        entry.expect("a C identifier").trim_start_matches("gemm_")
    }

    /// The fastest in measurements on the H100 (kernels/README.md).
    #[test]
    fn the_fastest_tile_is_chosen() {
        assert_eq!(chosen(1, 4096), "skinny_bf16_8");
        assert_eq!(chosen(9, 28672), "skinny_bf16_16");
        assert_eq!(chosen(64, 128_256), "skinny_bf16_64");
        assert_eq!(chosen(128, 28672), "skinny_bf16_128");
        assert_eq!(chosen(256, 4096), "skinny_bf16_128");
        assert_eq!(chosen(256, 6144), "bf16_128x128");
        assert_eq!(chosen(256, 28672), "bf16_128x224");
        assert_eq!(chosen(512, 6144), "bf16_128x192");
        assert_eq!(chosen(512, 28672), "bf16_128x224");
        assert_eq!(chosen(1024, 6144), "bf16_128x192");
        assert_eq!(chosen(2048, 6144), "bf16_128x256");
        assert_eq!(chosen(4096, 28672), "bf16_128x256");
        assert_eq!(chosen(4096, 4096), "bf16_128x256");
    }

    #[test]
    fn every_tile_fits_into_an_sm() {
        for tile in &TILES {
            assert!(tile.shared_bytes() <= 227 * 1024, "{tile:?}");
        }
    }
}
