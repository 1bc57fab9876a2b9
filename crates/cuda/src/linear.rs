use half::bf16;

use crate::CudaError;
use crate::driver::{Device, Slice, Stream};
use crate::kernels::{Form, GemmHopper, GemmPortable, Packed, PackedHopper, Path, Product};

/// Elements of a quantised matrix that are unpacked at a time: they stay near the L2 cache's size, and
/// are enough for a product that keeps all tensor cores busy.
const TILE: usize = 32 << 20;

/// The most tokens for which the portable kernels are faster without unpacking. Hopper's always are.
const PORTABLE_TOKENS: usize = 64;

/// Of so few tokens and so many outputs Hopper, too, computes products with the portable kernel, whose many
/// small tiles wait for memory less.
const FEW_TOKENS: usize = 8;
const MANY_OUTPUTS: usize = 16 << 10;

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

impl PackedPart {
    /// Panics if a product can't be computed with it in the place of the product's own weights.
    pub(crate) fn check(&self, product: &Product) {
        product.check_activations();
        let (outputs, inputs) = (product.outputs, product.inputs);
        assert!(outputs == self.rows && inputs.is_multiple_of(32));
        assert!(self.data.len() >= self.form.bytes(outputs, inputs));
    }
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

    /// Whether products of bfloat16 weights can have a [`Product::gate`].
    pub(crate) fn can_gate(&self) -> bool {
        self.hopper.is_some()
    }

    /// Hopper's kernels, for measurements.
    pub(crate) fn hopper(&self) -> Option<&GemmHopper> {
        self.hopper.as_ref().map(|hopper| &hopper.gemm)
    }

    /// Hopper's kernels for quantised weights.
    pub(crate) fn packed_hopper(&self) -> Option<&PackedHopper> {
        self.hopper.as_ref().map(|hopper| &hopper.packed)
    }

    /// Scratch memory of a product with a quantised matrix: what is unpacked at a time, if anything is.
    pub fn scratch_len(path: Path, rows: usize, cols: usize) -> usize {
        match path {
            Path::Portable => rows.next_multiple_of(Form::ROWS).min(tile_rows(cols)) * cols,
            Path::Hopper => 0,
        }
    }

    /// Computes a product with quantised weights, which lie one part after the other, in the place of its
    /// own. Where that is faster they are unpacked, piece by piece, into `scratch`; see
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
            match self.hopper.is_some() || product.tokens <= PORTABLE_TOKENS {
                true => self.multiply(stream, parts, product),
                false => self.unpack_and_multiply(stream, parts, product, scratch),
            }
        }
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
        each_part(parts, product, |part, product| {
            // SAFETY: the caller vouches for what both ask for.
            unsafe {
                match &self.hopper {
                    Some(hopper) if !suits_portable(product) => {
                        hopper.packed.multiply(stream, part, product)
                    }
                    _ => self.packed.multiply(stream, part, product),
                }
            }
        })
    }

    /// With one of Hopper's tiles, for tests. The rest as [`multiply`](Self::multiply).
    pub(crate) unsafe fn multiply_with(
        &self,
        tile: usize,
        stream: &Stream,
        parts: &[PackedPart],
        product: &Product,
    ) -> Result<(), CudaError> {
        let hopper = self.packed_hopper().expect("tiles are Hopper's");
        each_part(parts, product, |part, product| {
            // SAFETY: the caller vouches for it.
            unsafe { hopper.multiply_with(tile, stream, part, product) }
        })
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

/// Calls `multiply` for each part of a matrix, with its share of the product.
fn each_part(
    parts: &[PackedPart],
    product: &Product,
    mut multiply: impl FnMut(&PackedPart, &Product) -> Result<(), CudaError>,
) -> Result<(), CudaError> {
    let mut first = 0;
    for part in parts {
        multiply(part, &product.part(first..first + part.rows))?;
        first += part.rows;
    }
    Ok(())
}

fn suits_portable(product: &Product) -> bool {
    product.tokens <= FEW_TOKENS && product.outputs >= MANY_OUTPUTS
}

/// Rows that are unpacked at a time.
fn tile_rows(cols: usize) -> usize {
    (TILE / cols / Form::ROWS).max(1) * Form::ROWS
}
