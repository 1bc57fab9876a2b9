use half::bf16;

use crate::CudaError;
use crate::driver::{Device, Slice, Stream};
use crate::kernels::{Form, GemmHopper, GemmPortable, Packed, PackedHopper, Path, Product};

/// Elements of a quantised matrix that are unpacked at a time: they stay near the L2 cache's size, and
/// are enough for a product that keeps all tensor cores busy.
const TILE: usize = 32 << 20;

/// Bytes that memory moves in a cycle of Hopper's SMs.
const BYTES_PER_CYCLE: usize = 1700;

/// The most tokens for which the portable kernels are faster without unpacking.
const PORTABLE_TOKENS: usize = 64;

/// Rows of a quantised matrix, all in one form. A handle.
#[derive(Debug, Clone, Copy)]
pub struct PackedPart {
    /// Their form.
    pub form: Form,
    /// How many.
    pub rows: usize,
    /// [`Form::bytes`] of them.
    pub data: Slice<u8>,
}

/// Matrix products with the kernels that suit the GPU.
///
/// An output's bits depend on its inputs alone: not on the number of tokens, nor on the SMs that the
/// stream has, nor on whether quantised weights are unpacked first. All kernels round weights to bfloat16
/// in the same way and add 16 products at a time, in the order of k, by instructions that give the same
/// bits (measured on Hopper; elsewhere all kernels use one and the same instruction).
pub struct Linear {
    hopper: Option<Hopper>,
    portable: GemmPortable,
    packed: Packed,
}

struct Hopper {
    gemm: GemmHopper,
    packed: PackedHopper,
}

impl Linear {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device, path: Path) -> Result<Self, CudaError> {
        let hopper = match path {
            Path::Portable => None,
            Path::Hopper => Some(Hopper {
                gemm: GemmHopper::load(device)?,
                packed: PackedHopper::load(device)?,
            }),
        };
        Ok(Self {
            hopper,
            portable: GemmPortable::load(device)?,
            packed: Packed::load(device)?,
        })
    }

    /// The kernels for quantised weights.
    pub fn packed(&self) -> &Packed {
        &self.packed
    }

    /// Computes a product.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// As [`GemmHopper::launch`] says.
    ///
    /// # Panics
    /// As [`GemmHopper::launch`].
    pub unsafe fn launch(&self, stream: &Stream, product: &Product) -> Result<(), CudaError> {
        // SAFETY: the caller vouches for what both ask for.
        unsafe {
            match &self.hopper {
                Some(hopper) => hopper.gemm.launch(stream, product),
                None => self.portable.launch(stream, product),
            }
        }
    }

    /// Scratch memory of a product with a quantised matrix: what is unpacked at a time.
    pub fn scratch_len(rows: usize, cols: usize) -> usize {
        rows.next_multiple_of(Form::ROWS).min(tile_rows(cols)) * cols
    }

    /// Computes a product with quantised weights, which lie one part after the other, in the place of its
    /// own. For many tokens they are unpacked, piece by piece, into `scratch`; see
    /// [`scratch_len`](Self::scratch_len).
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// As [`Packed::multiply`] says; and nothing else uses `scratch` until the product is computed.
    ///
    /// # Panics
    /// As [`Packed::multiply`] and [`GemmHopper::launch`]; if `scratch` is too small.
    pub unsafe fn launch_packed(
        &self,
        stream: &Stream,
        parts: &[PackedPart],
        product: &Product,
        scratch: Slice<bf16>,
    ) -> Result<(), CudaError> {
        // SAFETY: the caller vouches for what both ask for.
        unsafe {
            match self.unpacks(stream, parts, product) {
                false => self.multiply(stream, parts, product),
                true => self.unpack_and_multiply(stream, parts, product, scratch),
            }
        }
    }

    /// Whether it is faster to unpack the weights first.
    fn unpacks(&self, stream: &Stream, parts: &[PackedPart], product: &Product) -> bool {
        let Some(hopper) = &self.hopper else {
            return product.tokens > PORTABLE_TOKENS;
        };
        let read: usize = parts.iter().map(|part| part.data.len()).sum();
        let written = 2 * product.outputs * product.inputs;
        let unpack = (read + written) / BYTES_PER_CYCLE;
        let unpacked = unpack + hopper.gemm.cycles(stream, product);
        let mut first = 0;
        let packed = parts.iter().map(|part| {
            let product = product.part(first..first + part.rows);
            first += part.rows;
            hopper.packed.cycles(stream, &product)
        });
        packed.sum::<usize>() > unpacked
    }

    /// Without unpacking.
    ///
    /// # Errors
    /// As [`launch_packed`](Self::launch_packed).
    ///
    /// # Safety
    /// As [`launch_packed`](Self::launch_packed).
    pub unsafe fn multiply(
        &self,
        stream: &Stream,
        parts: &[PackedPart],
        product: &Product,
    ) -> Result<(), CudaError> {
        let mut first = 0;
        for part in parts {
            let product = product.part(first..first + part.rows);
            // SAFETY: the caller vouches for what both ask for.
            unsafe {
                match &self.hopper {
                    Some(hopper) => hopper.packed.multiply(stream, part, &product)?,
                    None => self.packed.multiply(stream, part, &product)?,
                }
            }
            first += part.rows;
        }
        Ok(())
    }

    /// Always unpacking.
    ///
    /// # Errors
    /// As [`launch_packed`](Self::launch_packed).
    ///
    /// # Safety
    /// As [`launch_packed`](Self::launch_packed).
    pub unsafe fn unpack_and_multiply(
        &self,
        stream: &Stream,
        parts: &[PackedPart],
        product: &Product,
        scratch: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let (cols, step) = (product.inputs, tile_rows(product.inputs));
        let rows: usize = parts.iter().map(|part| part.rows).sum();
        for start in (0..rows).step_by(step) {
            let tile = start..rows.min(start + step);
            let mut first = 0;
            for part in parts {
                // Where the part and the tile overlap.
                let [from, to] =
                    [tile.start, tile.end].map(|row| row.clamp(first, first + part.rows));
                if from < to {
                    let inside = [from, to].map(|row| row - first);
                    let out = scratch.range((from - start) * cols..(to - start) * cols);
                    // SAFETY: the caller vouches for what it asks for.
                    unsafe {
                        self.packed
                            .unpack(stream, part, inside[0]..inside[1], cols, out)?
                    };
                }
                first += part.rows;
            }
            let product = Product {
                weights: scratch.range(0..tile.len() * cols),
                fresh_weights: true,
                ..product.part(tile)
            };
            // SAFETY: as above.
            unsafe { self.launch(stream, &product)? };
        }
        Ok(())
    }
}

/// Rows that are unpacked at a time.
fn tile_rows(cols: usize) -> usize {
    (TILE / cols / Form::ROWS).max(1) * Form::ROWS
}
