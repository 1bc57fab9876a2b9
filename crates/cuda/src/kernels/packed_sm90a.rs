use super::gemm::{Output, Product};
use super::image;
use super::packed::{FORMS, Form, named};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream, TensorMap};
use crate::linear::PackedPart;

/// Columns of a slice.
const SLICE: usize = 64;

/// A way to cut the product into tiles. They differ in speed only: see gemm_packed_sm90a.cu, whose
/// `PackedShape` has the same parameters.
#[derive(Debug)]
struct Tile {
    tokens: u32,
    warpgroups: u32,
    slices: u32,
    stages: u32,
    /// Nanoseconds for a slice when 1, 2, … blocks share an SM, as many as fit: measured on the H100 with
    /// 4-bit weights; the other forms are at most a fifth slower.
    times: &'static [usize],
}

const fn tile(
    tokens: u32,
    warpgroups: u32,
    [slices, stages]: [u32; 2],
    times: &'static [usize],
) -> Tile {
    Tile {
        tokens,
        warpgroups,
        slices,
        stages,
        times,
    }
}

const TILES: [Tile; PackedHopper::TILES] = [
    tile(16, 1, [2, 6], &[290, 510]),
    tile(64, 1, [2, 4], &[320, 460]),
    tile(64, 2, [1, 5], &[580, 900]),
    tile(128, 2, [1, 7], &[650]),
    tile(256, 2, [1, 5], &[740]),
];

impl Tile {
    fn threads(&self) -> u32 {
        let trades_registers = self.warpgroups * self.tokens > 256;
        128 * self.warpgroups + if trades_registers { 128 } else { 32 }
    }

    /// The box of the output that a warpgroup stores at once: tokens, outputs.
    fn out_box(&self) -> [u32; 2] {
        [self.tokens.min(64), 64]
    }

    fn shared_bytes(&self, form: Form) -> u32 {
        let piece = form.bytes(Form::ROWS, SLICE) as u32;
        let stage = self.slices * (self.tokens * 128 + self.warpgroups * piece);
        let boxes = self.warpgroups * self.out_box()[0] * 128;
        self.stages * stage.next_multiple_of(1024) + boxes + 2 * 8 * self.stages
    }

    /// Blocks that have something to do.
    fn count(&self, tokens: usize, outputs: usize) -> usize {
        let rows = Form::ROWS * self.warpgroups as usize;
        outputs.div_ceil(rows) * tokens.div_ceil(self.tokens as usize)
    }

    /// Nanoseconds for 64 k of all tiles.
    fn cost(&self, tokens: usize, outputs: usize, sms: u32) -> usize {
        let (count, sms, most) = (self.count(tokens, outputs), sms as usize, self.times.len());
        let (rounds, rest) = (count / (sms * most), count % (sms * most));
        let last = match rest.div_ceil(sms) {
            0 => 0,
            blocks => self.times[blocks - 1],
        };
        rounds * self.times[most - 1] + last
    }

    /// The fastest. Several chunks of 16 tokens never are.
    fn choose(tokens: usize, outputs: usize, sms: u32) -> usize {
        let first = usize::from(tokens > TILES[0].tokens as usize);
        let tiles = first..TILES.len();
        let best = tiles.min_by_key(|&tile| TILES[tile].cost(tokens, outputs, sms));
        best.expect("there are tiles")
    }
}

/// The struct `PackedGemmArgs` of gemm_packed_sm90a.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    x: TensorMap,
    out: TensorMap,
    weights: u64,
    out_f32: u64,
    bias: u64,
    tokens: u32,
    outputs: u32,
    k: u32,
    stride: u32,
    padding: [u64; 3],
}

// SAFETY: numbers without gaps between them; the kernel declares the same.
unsafe impl Plain for Args {}

/// Products with quantised weights on Hopper (compute capability 9.0).
pub struct PackedHopper {
    /// By form, then as [`TILES`].
    kernels: Vec<Vec<Kernel>>,
}

impl PackedHopper {
    pub(crate) const TILES: usize = 5;

    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("gemm_packed_sm90a"))?;
        let kernel = |(form, name): (Form, &str), tile: &Tile| {
            let (tokens, warpgroups) = (tile.tokens, tile.warpgroups);
            let entry = format!("gemm_packed_{name}_{tokens}x{warpgroups}");
            let kernel = named(&module, entry)?;
            kernel.allow_shared_bytes(tile.shared_bytes(form))?;
            Ok(kernel)
        };
        let kernels = FORMS.iter().map(|&(form, name, _)| {
            let kernels = TILES.iter().map(|tile| kernel((form, name), tile));
            kernels.collect::<Result<_, CudaError>>()
        });
        Ok(Self {
            kernels: kernels.collect::<Result<_, _>>()?,
        })
    }

    /// As [`Packed::multiply`](super::Packed::multiply).
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// As [`Packed::multiply`](super::Packed::multiply).
    ///
    /// # Panics
    /// As [`Packed::multiply`](super::Packed::multiply); if a bfloat16 result has `outputs` that are no
    /// multiple of 8.
    pub unsafe fn multiply(
        &self,
        stream: &Stream,
        part: &PackedPart,
        product: &Product,
    ) -> Result<(), CudaError> {
        let tile = Tile::choose(product.tokens, product.outputs, stream.sms());
        // SAFETY: the caller vouches for it.
        unsafe { self.multiply_with(tile, stream, part, product) }
    }

    /// With one of [`TILES`](Self::TILES) ways to cut it into tiles, for tests.
    pub(crate) unsafe fn multiply_with(
        &self,
        which: usize,
        stream: &Stream,
        part: &PackedPart,
        product: &Product,
    ) -> Result<(), CudaError> {
        part.check(product);
        let Product {
            tokens,
            outputs,
            inputs,
            ..
        } = *product;
        let tile = &TILES[which];
        let x_box = [tile.tokens, SLICE as u32];
        let (out, out_f32) = match product.out {
            Output::Bf16(out) => {
                let shape = [tokens, outputs];
                let map = TensorMap::new(out, shape, product.stride, tile.out_box())?;
                (map, Slice::null())
            }
            Output::F32(out) => (TensorMap::UNUSED, out),
        };
        let args = Args {
            x: TensorMap::new(product.x, [tokens, inputs], inputs, x_box)?,
            out,
            weights: part.data.address(),
            out_f32: out_f32.address(),
            bias: product.bias.map_or(0, |bias| bias.address()),
            tokens: tokens as u32,
            outputs: outputs as u32,
            k: inputs as u32,
            stride: product.stride as u32,
            padding: [0; 3],
        };
        let most = stream.sms() as usize * tile.times.len();
        let blocks = tile.count(tokens, outputs).min(most) as u32;
        let shape = Shape::new(blocks, tile.threads()).shared_bytes(tile.shared_bytes(part.form));
        let kernel = &self.kernels[part.form as usize][which];
        // SAFETY: the struct is the kernel's, the lengths were checked, the caller vouches for the
        // rest.
        unsafe { kernel.launch(stream, shape, &(args,)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_tile_fits_into_an_sm() {
        for tile in &TILES {
            for (form, ..) in FORMS {
                let bytes = tile.shared_bytes(form) + 1024;
                let all = bytes as usize * tile.times.len();
                assert!(all <= 228 * 1024, "{form:?} {tile:?}");
            }
        }
    }

    /// The fastest in measurements on the H100 (kernels/README.md).
    #[test]
    fn the_fastest_tile_is_chosen() {
        let chosen = |tokens, outputs| {
            let tile = &TILES[Tile::choose(tokens, outputs, 132)];
            (tile.tokens, tile.warpgroups)
        };
        assert_eq!(chosen(1, 4096), (16, 1));
        assert_eq!(chosen(32, 4096), (64, 1));
        assert_eq!(chosen(256, 4096), (64, 1));
        assert_eq!(chosen(512, 4096), (128, 2));
        assert_eq!(chosen(1024, 4096), (256, 2));
        assert_eq!(chosen(16, 28672), (64, 2));
        assert_eq!(chosen(128, 28672), (128, 2));
        assert_eq!(chosen(512, 28672), (256, 2));
    }
}
