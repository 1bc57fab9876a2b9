use std::ffi::CStr;

use spate_model::Activation;

use super::gemm::{Output, Product, Side};
use super::image;
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream, TensorMap};

/// Elements of a row of a box: the widest that wgmma's swizzle allows.
const SLICE: usize = 64;

/// The most that a block can have.
const SHARED_BYTES: u32 = 227 << 10;

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
    /// For 64 k when every SM has one: measured on the H100 under load, which is not at its highest clock then.
    nanoseconds: usize,
}

/// Weights as rows of `a`.
const fn skinny(
    entry: &'static CStr,
    warpgroups: u32,
    bn: u32,
    [slices, stages]: [u32; 2],
    nanoseconds: usize,
) -> Tile {
    Tile {
        entry,
        weights: Side::A,
        warpgroups,
        bn,
        slices,
        stages,
        cluster: 1,
        nanoseconds,
    }
}

/// Tokens as rows of `a`.
const fn wide(entry: &'static CStr, bn: u32, stages: u32, nanoseconds: usize) -> Tile {
    Tile {
        entry,
        weights: Side::B,
        warpgroups: 2,
        bn,
        slices: 1,
        stages,
        cluster: 2,
        nanoseconds,
    }
}

/// The first so many are for few tokens.
const FEW: usize = 4;

/// From this one on pairs of blocks share their weights, which was measured to pay for more tokens than these.
const SHARED: usize = 13;
const SHARED_TOKENS: usize = 1536;

const TILES: [Tile; GemmHopper::TILES] = [
    skinny(c"gemm_skinny_bf16_64x8", 1, 8, [2, 11], 110),
    skinny(c"gemm_skinny_bf16_64x16", 1, 16, [2, 10], 115),
    skinny(c"gemm_skinny_bf16_64x32", 1, 32, [2, 8], 150),
    skinny(c"gemm_skinny_bf16_64x64", 1, 64, [2, 6], 175),
    skinny(c"gemm_skinny_bf16_64x96", 1, 96, [1, 10], 215),
    skinny(c"gemm_skinny_bf16_64x128", 1, 128, [1, 8], 247),
    skinny(c"gemm_skinny_bf16_64x160", 1, 160, [1, 7], 262),
    skinny(c"gemm_skinny_bf16_64x192", 1, 192, [1, 6], 285),
    skinny(c"gemm_skinny_bf16_64x256", 1, 256, [1, 5], 358),
    skinny(c"gemm_skinny_bf16_128x128", 2, 128, [1, 6], 362),
    skinny(c"gemm_skinny_bf16_128x144", 2, 144, [1, 6], 400),
    skinny(c"gemm_skinny_bf16_128x160", 2, 160, [1, 5], 440),
    skinny(c"gemm_skinny_bf16_128x192", 2, 192, [1, 5], 540),
    wide(c"gemm_bf16_128x192", 192, 5, 552),
    wide(c"gemm_bf16_128x224", 224, 4, 625),
    wide(c"gemm_bf16_128x256", 256, 4, 715),
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
        let [tokens, outputs] = self.out_box(false);
        let barriers = 2 * 8 * self.stages;
        let bytes = |boxes| {
            let boxes = self.warpgroups * boxes * 2 * tokens * outputs;
            self.stages * stage + boxes + barriers
        };
        // Two boxes where there is room for them, unless one holds all.
        match self.weights {
            Side::A if tokens == self.bn => bytes(1),
            _ if bytes(2) > SHARED_BYTES => bytes(1),
            _ => bytes(2),
        }
    }

    /// Clusters of blocks that have something to do.
    fn tiles(&self, tokens: usize, outputs: usize) -> usize {
        let (a, b) = match self.weights {
            Side::A => (outputs, tokens),
            Side::B => (tokens, outputs),
        };
        a.div_ceil((self.bm() * self.cluster) as usize) * b.div_ceil(self.bn as usize)
    }

    /// Nanoseconds for 64 k of all tiles, if memory does not limit them.
    fn cost(&self, tokens: usize, outputs: usize, sms: u32) -> usize {
        let at_once = (sms / self.cluster).max(1) as usize;
        self.tiles(tokens, outputs).div_ceil(at_once) * self.nanoseconds
    }

    /// Up to 64 tokens the weights' way from memory is what takes long, and the narrowest tile with
    /// room for all tokens is best. Above, the one that is fastest if each SM computes as many.
    fn choose(tokens: usize, outputs: usize, sms: u32) -> usize {
        let mut few = TILES[..FEW].iter();
        if let Some(tile) = few.position(|tile| tokens <= tile.bn as usize) {
            return tile;
        }
        let many = match tokens {
            ..=SHARED_TOKENS => FEW - 1..TILES.len(),
            _ => SHARED..TILES.len(),
        };
        let best = many.min_by_key(|&tile| TILES[tile].cost(tokens, outputs, sms));
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
    pub(crate) const TILES: usize = 16;

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
        let tile = Tile::choose(tokens, outputs, stream.sms());
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

    /// The tile's name; how much longer it should take than the one that would be chosen.
    pub(crate) fn tile(tile: usize, product: &Product, sms: u32) -> (&'static str, f64) {
        let (tokens, outputs) = (product.tokens, product.outputs);
        let cost = |tile: usize| TILES[tile].cost(tokens, outputs, sms) as f64;
        let name = TILES[tile].entry.to_str().expect("a C identifier");
        (name, cost(tile) / cost(Tile::choose(tokens, outputs, sms)))
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
        let few = |rows: u32, of: usize| of.min(rows as usize) as u32;
        let (rows_a, rows_b) = match tile.weights {
            Side::A => (product.outputs, product.tokens),
            Side::B => (product.tokens, product.outputs),
        };
        // Rows out of range are not read, but the parts of a cluster's blocks stay whole.
        let box_a = few(tile.bm(), rows_a);
        let box_b = match tile.cluster {
            1 => few(tile.bn, rows_b),
            blocks => tile.bn / blocks,
        };
        let (a, b) = match tile.weights {
            Side::A => (weights(box_a)?, tokens(box_b)?),
            Side::B => (tokens(box_a)?, weights(box_b)?),
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
        let tile = Tile::choose(tokens, outputs, 132);
        let entry = TILES[tile].entry.to_str();
        entry.expect("a C identifier").trim_start_matches("gemm_")
    }

    /// The fastest in measurements on the H100 (kernels/README.md).
    #[test]
    fn the_fastest_tile_is_chosen() {
        assert_eq!(chosen(1, 4096), "skinny_bf16_64x8");
        assert_eq!(chosen(9, 28672), "skinny_bf16_64x16");
        assert_eq!(chosen(64, 128_256), "skinny_bf16_64x64");
        assert_eq!(chosen(72, 6144), "skinny_bf16_64x96");
        assert_eq!(chosen(128, 6144), "skinny_bf16_64x128");
        assert_eq!(chosen(128, 28672), "skinny_bf16_128x128");
        assert_eq!(chosen(256, 4096), "skinny_bf16_64x128");
        assert_eq!(chosen(256, 28672), "bf16_128x224");
        assert_eq!(chosen(320, 4096), "skinny_bf16_64x160");
        assert_eq!(chosen(512, 4096), "skinny_bf16_64x256");
        assert_eq!(chosen(512, 6144), "bf16_128x192");
        assert_eq!(chosen(512, 28672), "bf16_128x224");
        assert_eq!(chosen(520, 4096), "skinny_bf16_128x144");
        assert_eq!(chosen(640, 28672), "skinny_bf16_128x160");
        assert_eq!(chosen(768, 4096), "skinny_bf16_128x192");
        assert_eq!(chosen(4096, 4096), "bf16_128x256");
        assert_eq!(chosen(8192, 28672), "bf16_128x256");
    }

    #[test]
    fn every_tile_fits_into_an_sm() {
        for tile in &TILES {
            assert!(tile.shared_bytes() <= SHARED_BYTES, "{tile:?}");
        }
    }
}
