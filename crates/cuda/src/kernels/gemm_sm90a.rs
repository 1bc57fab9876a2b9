use std::ffi::CStr;

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
    /// Cycles for 64 k, whichever of tensor cores and shared memory takes longer.
    cycles: usize,
}

const fn few(entry: &'static CStr, bn: u32, slices: u32, stages: u32) -> Tile {
    // 64 x bn x 64 operations at 4096 a cycle, or the bytes that wgmma reads and TMA writes at 128.
    let (tensor, shared) = (2 * bn as usize, 2 * (64 + bn as usize));
    Tile {
        entry,
        weights: Side::A,
        warpgroups: 1,
        bn,
        slices,
        stages,
        cluster: 1,
        cycles: if tensor > shared { tensor } else { shared },
    }
}

const fn many(entry: &'static CStr, bn: u32, stages: u32) -> Tile {
    let (tensor, shared) = (4 * bn as usize, 2 * (64 + bn as usize) + 128 + bn as usize);
    Tile {
        entry,
        weights: Side::B,
        warpgroups: 2,
        bn,
        slices: 1,
        stages,
        cluster: 2,
        cycles: if tensor > shared { tensor } else { shared },
    }
}

/// For few tokens, weights as rows of `a`; by the number of tokens.
const FEW: [Tile; 5] = [
    few(c"gemm_skinny_bf16_8", 8, 2, 11),
    few(c"gemm_skinny_bf16_16", 16, 2, 10),
    few(c"gemm_skinny_bf16_32", 32, 2, 8),
    few(c"gemm_skinny_bf16_64", 64, 2, 6),
    few(c"gemm_skinny_bf16_128", 128, 1, 8),
];

/// For many tokens.
const MANY: [Tile; 4] = [
    many(c"gemm_bf16_128x256", 256, 4),
    many(c"gemm_bf16_128x224", 224, 4),
    many(c"gemm_bf16_128x192", 192, 4),
    many(c"gemm_bf16_128x128", 128, 6),
];

impl Tile {
    fn bm(&self) -> u32 {
        64 * self.warpgroups
    }

    fn threads(&self) -> u32 {
        let trades_registers = self.warpgroups * self.bn > 256;
        128 * self.warpgroups + if trades_registers { 128 } else { 32 }
    }

    /// The box of the output that a warpgroup stores at once: tokens, outputs.
    fn out_box(&self) -> [u32; 2] {
        match self.weights {
            Side::A => [self.bn, 64],
            Side::B if self.bn.is_multiple_of(64) => [64, 64],
            Side::B => [64, 32],
        }
    }

    fn shared_bytes(&self) -> u32 {
        let stage = self.slices * (self.bm() + self.bn) * 2 * SLICE as u32;
        let boxes = match self.weights {
            Side::A => 1,
            Side::B => 2,
        };
        let [tokens, outputs] = self.out_box();
        let barriers = 2 * 8 * self.stages;
        self.stages * stage + self.warpgroups * boxes * 2 * tokens * outputs + barriers
    }

    /// Clusters of blocks that have something to do.
    fn tiles(&self, tokens: usize, outputs: usize) -> usize {
        let (a, b) = match self.weights {
            Side::A => (outputs, tokens),
            Side::B => (tokens, outputs),
        };
        a.div_ceil((self.bm() * self.cluster) as usize) * b.div_ceil(self.bn as usize)
    }

    /// Cycles for 64 k of all tiles.
    fn cost(&self, tokens: usize, outputs: usize, sms: u32) -> usize {
        let at_once = (sms / self.cluster).max(1) as usize;
        self.tiles(tokens, outputs).div_ceil(at_once) * self.cycles
    }

    /// Up to 64 tokens the weights' way from memory is what takes long, and the narrowest tile with
    /// room for all tokens is best. Above, the tile that leaves the fewest tensor cores idle.
    fn choose(tokens: usize, outputs: usize, sms: u32) -> &'static Tile {
        if let Some(tile) = FEW[..4].iter().find(|tile| tokens <= tile.bn as usize) {
            return tile;
        }
        let tiles = MANY.iter().chain(&FEW[4..]);
        let costs = tiles.min_by_key(|tile| tile.cost(tokens, outputs, sms));
        costs.expect("there are tiles for many tokens")
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
    padding: [u32; 7],
}

// SAFETY: numbers without gaps between them; the kernel declares the same.
unsafe impl Plain for Args {}

/// The product on Hopper (compute capability 9.0).
pub struct GemmHopper {
    few: Vec<Kernel>,
    many: Vec<Kernel>,
}

impl GemmHopper {
    /// Whether the GPU has what the kernels need.
    pub fn fits(device: &Device) -> bool {
        device.capability() == (9, 0)
    }

    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let few = Module::load(device, &image!("gemm_skinny_bf16_sm90a"))?;
        let many = Module::load(device, &image!("gemm_bf16_sm90a"))?;
        Ok(Self {
            few: kernels(&few, &FEW)?,
            many: kernels(&many, &MANY)?,
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
        product.check();
        let tile = Tile::choose(product.tokens, product.outputs, stream.sms());
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
        unsafe { self.kernel(tile).launch(stream, shape, &(args,)) }
    }

    /// Cycles that a product takes, not counting the weights' way from memory.
    pub(crate) fn cycles(&self, stream: &Stream, product: &Product) -> usize {
        let (tokens, outputs, sms) = (product.tokens, product.outputs, stream.sms());
        let tile = Tile::choose(tokens, outputs, sms);
        tile.cost(tokens, outputs, sms) * product.inputs.div_ceil(SLICE)
    }

    fn kernel(&self, tile: &Tile) -> &Kernel {
        let (tiles, kernels) = match tile.weights {
            Side::A => (&FEW[..], &self.few),
            Side::B => (&MANY[..], &self.many),
        };
        let at = tiles.iter().position(|other| other.entry == tile.entry);
        &kernels[at.expect("tiles are chosen from these tables")]
    }

    fn args(tile: &Tile, product: &Product) -> Result<Args, CudaError> {
        let mut a = (product.x, product.tokens);
        let mut b = (product.weights, product.outputs);
        if tile.weights == Side::A {
            std::mem::swap(&mut a, &mut b);
        }
        let operand = |(matrix, rows), box_rows| {
            let shape = [rows, product.inputs];
            TensorMap::new(matrix, shape, product.inputs, [box_rows, SLICE as u32])
        };
        let (out, out_f32) = match product.out {
            Output::Bf16(out) => {
                let shape = [product.tokens, product.outputs];
                let out = TensorMap::new(out, shape, product.stride, tile.out_box())?;
                (out, Slice::null())
            }
            Output::F32(out) => (TensorMap::UNUSED, out),
        };
        Ok(Args {
            a: operand(a, tile.bm())?,
            b: operand(b, tile.bn / tile.cluster)?,
            out,
            out_f32: out_f32.address(),
            bias: product.bias.map_or(0, |bias| bias.address()),
            rows_a: a.1 as u32,
            rows_b: b.1 as u32,
            k: product.inputs as u32,
            // With few tokens, the blocks that read the same weights are neighbours in time.
            group: if tile.weights == Side::A { 1 } else { GROUP },
            stride: product.stride as u32,
            padding: [0; 7],
        })
    }
}

fn kernels(module: &Module, tiles: &[Tile]) -> Result<Vec<Kernel>, CudaError> {
    let load = |tile: &Tile| {
        let kernel = module.kernel(tile.entry)?;
        kernel.allow_shared_bytes(tile.shared_bytes())?;
        Ok(kernel)
    };
    tiles.iter().map(load).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(tokens: usize, outputs: usize) -> &'static str {
        let entry = Tile::choose(tokens, outputs, 132).entry.to_str();
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
        for tile in FEW.iter().chain(&MANY) {
            assert!(tile.shared_bytes() <= 227 * 1024, "{tile:?}");
        }
    }
}
