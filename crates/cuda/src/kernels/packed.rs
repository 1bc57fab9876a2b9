use std::ffi::CStr;

use half::bf16;
use spate_model::GgmlType;

use super::gemm::{Output, Product};
use super::image;
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream};

/// A record: rows, columns.
const RECORD: [usize; 2] = [16, 64];

/// A kernel of `gemm_skinny_packed.cu`: how many tokens it takes, the warps of its largest block, and the
/// stages of its ring.
struct Skinny {
    tokens: usize,
    warps: usize,
    depth: usize,
}

const SKINNY: [Skinny; 2] = [
    Skinny {
        tokens: 8,
        warps: 4,
        depth: 16,
    },
    Skinny {
        tokens: Packed::MAX_TOKENS,
        warps: 8,
        depth: 6,
    },
];

impl Skinny {
    /// Warps of a block: as many as leave a block for nearly every SM, as they share the tokens.
    fn warps(&self, outputs: usize, sms: u32) -> usize {
        let rows = outputs.div_ceil(RECORD[0]);
        let mut warps = self.warps;
        while warps > 1 && rows / warps < sms as usize * 7 / 8 {
            warps /= 2;
        }
        warps
    }

    fn shared_bytes(&self, form: Form, warps: usize, tokens: usize) -> u32 {
        let tokens = tokens.next_multiple_of(8) * RECORD[1] * size_of::<bf16>();
        (self.depth * (warps * form.record() + tokens)) as u32
    }
}

/// Blocks that fit on an SM, at most.
const BLOCKS_PER_SM: u32 = 4;

/// Threads of a block of the other kernels.
const THREADS: u32 = 256;

/// How the GPU keeps a quantised matrix: see kernels/include/packed.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// 4 bits, a scale per 32.
    Four,
    /// 4 bits, a scale and a minimum per 32.
    FourMin,
    /// 5 bits, a scale per 32.
    Five,
    /// 5 bits, a scale and a minimum per 32.
    FiveMin,
    /// 6 bits, a scale per 16.
    Six,
    /// 8 bits, a scale per 32.
    Eight,
}

/// What the kernels of a form are called, and bytes of its record.
const FORMS: [(Form, [&CStr; 3], usize); 6] = [
    (
        Form::Four,
        [c"unpack_4", c"gemm_packed_4_8", c"gemm_packed_4_64"],
        512 + 64,
    ),
    (
        Form::FourMin,
        [
            c"unpack_4_min",
            c"gemm_packed_4_min_8",
            c"gemm_packed_4_min_64",
        ],
        512 + 128,
    ),
    (
        Form::Five,
        [c"unpack_5", c"gemm_packed_5_8", c"gemm_packed_5_64"],
        512 + 128 + 64,
    ),
    (
        Form::FiveMin,
        [
            c"unpack_5_min",
            c"gemm_packed_5_min_8",
            c"gemm_packed_5_min_64",
        ],
        512 + 128 + 128,
    ),
    (
        Form::Six,
        [c"unpack_6", c"gemm_packed_6_8", c"gemm_packed_6_64"],
        512 + 256 + 128,
    ),
    (
        Form::Eight,
        [c"unpack_8", c"gemm_packed_8_8", c"gemm_packed_8_64"],
        512 + 512 + 64,
    ),
];

const FORMATS: [(GgmlType, Form, &CStr); 8] = [
    (GgmlType::Q4_0, Form::Four, c"pack_q4_0"),
    (GgmlType::Q4_1, Form::FourMin, c"pack_q4_1"),
    (GgmlType::Q4K, Form::FourMin, c"pack_q4_k"),
    (GgmlType::Q5_0, Form::Five, c"pack_q5_0"),
    (GgmlType::Q5_1, Form::FiveMin, c"pack_q5_1"),
    (GgmlType::Q5K, Form::FiveMin, c"pack_q5_k"),
    (GgmlType::Q6K, Form::Six, c"pack_q6_k"),
    (GgmlType::Q8_0, Form::Eight, c"pack_q8_0"),
];

impl Form {
    /// How matrices of a format of GGML are kept; `None` for the formats that the kernels don't know.
    pub fn of(ty: GgmlType) -> Option<Self> {
        let known = FORMATS.iter().find(|(format, ..)| *format == ty);
        known.map(|(_, form, _)| *form)
    }

    /// Memory for a matrix.
    pub fn bytes(self, rows: usize, cols: usize) -> usize {
        records(rows, cols) * self.record()
    }

    fn record(self) -> usize {
        FORMS[self as usize].2
    }
}

fn records(rows: usize, cols: usize) -> usize {
    rows.div_ceil(RECORD[0]) * cols.div_ceil(RECORD[1])
}

/// The struct `Args` of gemm_skinny_packed.cu.
#[derive(Clone, Copy)]
#[repr(C)]
struct Args {
    x: u64,
    weights: u64,
    out: u64,
    out_f32: u64,
    bias: u64,
    tokens: u32,
    outputs: u32,
    k: u32,
    padding: u32,
}

// SAFETY: numbers without gaps between them; the kernel declares the same.
unsafe impl Plain for Args {}

/// Quantised weights.
pub struct Packed {
    pack: Vec<Kernel>,
    unpack: Vec<Kernel>,
    /// For at most 8 and at most 64 tokens.
    multiply: Vec<[Kernel; 2]>,
}

impl Packed {
    /// The most tokens that [`Packed::multiply`] takes. For more, unpack.
    pub const MAX_TOKENS: usize = 64;

    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let convert = Module::load(device, &image!("packed"))?;
        let gemm = Module::load(device, &image!("gemm_skinny_packed"))?;
        let multiply = FORMS.iter().map(|(form, [_, few, many], _)| {
            let kernels = [gemm.kernel(few)?, gemm.kernel(many)?];
            for (kernel, skinny) in kernels.iter().zip(&SKINNY) {
                let most = skinny.shared_bytes(*form, skinny.warps, skinny.tokens);
                kernel.allow_shared_bytes(most)?;
            }
            Ok(kernels)
        });
        let pack = FORMATS.iter().map(|(_, _, entry)| convert.kernel(entry));
        let unpack = FORMS
            .iter()
            .map(|(_, [entry, ..], _)| convert.kernel(entry));
        Ok(Self {
            pack: pack.collect::<Result<_, _>>()?,
            unpack: unpack.collect::<Result<_, _>>()?,
            multiply: multiply.collect::<Result<_, CudaError>>()?,
        })
    }

    /// Packs a matrix `[rows, cols]` as a GGUF file has it.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If there is no [`Form`] for the type, `cols` is not whole blocks of it, or a buffer is too
    /// small.
    pub unsafe fn pack(
        &self,
        stream: &Stream,
        ty: GgmlType,
        raw: Slice<u8>,
        [rows, cols]: [usize; 2],
        out: Slice<u8>,
    ) -> Result<(), CudaError> {
        let known = FORMATS.iter().position(|(format, ..)| *format == ty);
        let at = known.expect("the caller asked Form::of");
        let row_bytes = ty.row_bytes(cols).expect("rows are whole blocks");
        assert!(raw.len() >= rows * row_bytes && out.len() >= FORMATS[at].1.bytes(rows, cols));
        let arguments = (raw, rows as u32, cols as u32, out);
        // SAFETY: the types are those of packed.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe { self.pack[at].launch(stream, warp_per_record(rows, cols), &arguments) }
    }

    /// `out = packed`, `[rows, cols]`, rounded to nearest.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If a buffer is too small.
    pub unsafe fn unpack(
        &self,
        stream: &Stream,
        form: Form,
        packed: Slice<u8>,
        [rows, cols]: [usize; 2],
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        assert!(packed.len() >= form.bytes(rows, cols) && out.len() >= rows * cols);
        let arguments = (packed, rows as u32, cols as u32, out);
        let kernel = &self.unpack[form as usize];
        // SAFETY: as above.
        unsafe { kernel.launch(stream, warp_per_record(rows, cols), &arguments) }
    }

    /// Computes a product of at most [`Packed::MAX_TOKENS`] tokens with packed weights in the place of
    /// its own.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run. The weights were complete before the kernel that
    /// precedes this one in the stream was launched.
    ///
    /// # Panics
    /// If there are more tokens, `inputs` is not a multiple of 32, or a buffer is too small.
    pub unsafe fn multiply(
        &self,
        stream: &Stream,
        form: Form,
        packed: Slice<u8>,
        product: &Product,
    ) -> Result<(), CudaError> {
        let Product {
            tokens,
            outputs,
            inputs,
            ..
        } = *product;
        assert!(tokens <= Self::MAX_TOKENS && inputs.is_multiple_of(32));
        assert!(packed.len() >= form.bytes(outputs, inputs) && product.x.len() >= tokens * inputs);
        assert!(product.bias.is_none_or(|bias| bias.len() >= outputs));
        let (out, out_f32, len) = match product.out {
            Output::Bf16(out) => (out.address(), 0, out.len()),
            Output::F32(out) => (0, out.address(), out.len()),
        };
        assert!(len >= tokens * outputs);
        let args = Args {
            x: product.x.address(),
            weights: packed.address(),
            out,
            out_f32,
            bias: product.bias.map_or(0, |bias| bias.address()),
            tokens: tokens as u32,
            outputs: outputs as u32,
            k: inputs as u32,
            padding: 0,
        };
        let which = usize::from(tokens > SKINNY[0].tokens);
        let (skinny, kernel) = (&SKINNY[which], &self.multiply[form as usize][which]);
        let warps = skinny.warps(outputs, stream.sms());
        let blocks = outputs.div_ceil(RECORD[0] * warps);
        let grid = blocks.min((stream.sms() * BLOCKS_PER_SM) as usize) as u32;
        let shape = Shape::new(grid, 32 * warps as u32);
        let shape = shape.shared_bytes(skinny.shared_bytes(form, warps, tokens));
        // SAFETY: as above.
        unsafe { kernel.launch(stream, shape, &(args,)) }
    }
}

fn warp_per_record(rows: usize, cols: usize) -> Shape {
    let warps = THREADS as usize / 32;
    Shape::new(records(rows, cols).div_ceil(warps) as u32, THREADS)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `form as usize` indexes the table.
    #[test]
    fn forms_are_listed_in_their_order() {
        for (i, (form, ..)) in FORMS.iter().enumerate() {
            assert_eq!(*form as usize, i);
        }
    }

    #[test]
    fn packed_matrices_are_little_larger_than_files() {
        for (ty, form, _) in FORMATS {
            let [rows, cols] = [4096, 14336];
            let file = rows * ty.row_bytes(cols).expect("whole blocks");
            let share = form.bytes(rows, cols) as f64 / file as f64;
            assert!((0.99..1.12).contains(&share), "{ty}: {share}");
        }
    }
}
