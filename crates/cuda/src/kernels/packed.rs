use std::ffi::{CStr, CString};
use std::ops::Range;

use half::bf16;
use spate_model::GgmlType;

use super::gemm::{Output, Product};
use super::{image, striding_grid};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream};
use crate::linear::PackedPart;

/// A record: rows, columns.
const RECORD: [usize; 2] = [16, 64];

/// Records of a piece, which lie one below the other.
const PIECE: usize = Form::ROWS / RECORD[0];

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
        tokens: 64,
        warps: 8,
        depth: 6,
    },
];

impl Skinny {
    /// Blocks that have something to do.
    fn blocks(&self, tokens: usize, outputs: usize, warps: usize) -> usize {
        outputs.div_ceil(RECORD[0] * warps) * tokens.div_ceil(self.tokens)
    }

    /// Warps of a block: as many as leave a block for nearly every SM, as they share the tokens.
    fn warps(&self, tokens: usize, outputs: usize, sms: u32) -> usize {
        let mut warps = self.warps;
        while warps > 1 && self.blocks(tokens, outputs, warps) < sms as usize * 7 / 8 {
            warps /= 2;
        }
        warps
    }

    fn shared_bytes(&self, form: Form, warps: usize, tokens: usize) -> u32 {
        let round = self.tokens.min(16);
        let tokens = tokens.min(self.tokens).next_multiple_of(round);
        let tokens = tokens * RECORD[1] * size_of::<bf16>();
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

/// What a form's kernels are called after, and bytes of its record.
pub(super) const FORMS: [(Form, &str, usize); 6] = [
    (Form::Four, "4", 512 + 64),
    (Form::FourMin, "4_min", 512 + 128),
    (Form::Five, "5", 512 + 128 + 64),
    (Form::FiveMin, "5_min", 512 + 128 + 128),
    (Form::Six, "6", 512 + 256 + 128),
    (Form::Eight, "8", 512 + 512 + 64),
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
    /// Rows that are packed together: stretches of a matrix begin at multiples.
    pub const ROWS: usize = 64;

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
    rows.div_ceil(Form::ROWS) * PIECE * cols.div_ceil(RECORD[1])
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
    stride: u32,
}

// SAFETY: numbers without gaps between them; the kernel declares the same.
unsafe impl Plain for Args {}

/// Makes what the GPU keeps of what files have.
pub struct Pack {
    pack: Vec<Kernel>,
    /// From float16 and float32.
    round: [Kernel; 2],
}

impl Pack {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("packed"))?;
        let pack = FORMATS.iter().map(|(_, _, entry)| module.kernel(entry));
        Ok(Self {
            pack: pack.collect::<Result<_, _>>()?,
            round: [module.kernel(c"round_f16")?, module.kernel(c"round_f32")?],
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
        let shape = warp_per_record(rows, cols).after_previous();
        // SAFETY: the types are those of packed.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe { self.pack[at].launch(stream, shape, &arguments) }
    }

    /// Rounds numbers of 16 or 32 bits to bfloat16.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If the type is another one or `raw` is too small.
    pub unsafe fn round(
        &self,
        stream: &Stream,
        ty: GgmlType,
        raw: Slice<u8>,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let kernel = match ty {
            GgmlType::F16 => &self.round[0],
            GgmlType::F32 => &self.round[1],
            other => panic!("{other} is not rounded"),
        };
        assert!(raw.len() >= out.len() * ty.block_bytes());
        let grid = striding_grid(out.len(), THREADS, stream.sms());
        let shape = Shape::new(grid, THREADS).after_previous();
        // SAFETY: as above.
        unsafe { kernel.launch(stream, shape, &(raw, out.len() as u64, out)) }
    }
}

/// Quantised weights in use.
pub struct Packed {
    unpack: Vec<Kernel>,
    embed: Vec<Kernel>,
    /// As [`SKINNY`].
    multiply: Vec<[Kernel; 2]>,
}

impl Packed {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let convert = Module::load(device, &image!("packed"))?;
        let gemm = Module::load(device, &image!("gemm_skinny_packed"))?;
        let multiply = FORMS.iter().map(|(form, name, _)| {
            let entry = |skinny: &Skinny| format!("gemm_packed_{name}_{}", skinny.tokens);
            let kernels = [
                named(&gemm, entry(&SKINNY[0]))?,
                named(&gemm, entry(&SKINNY[1]))?,
            ];
            for (kernel, skinny) in kernels.iter().zip(&SKINNY) {
                let most = skinny.shared_bytes(*form, skinny.warps, skinny.tokens);
                kernel.allow_shared_bytes(most)?;
            }
            Ok(kernels)
        });
        let of_forms = |prefix: &str| {
            let entries = FORMS.iter().map(|(_, name, _)| format!("{prefix}_{name}"));
            let kernels = entries.map(|entry| named(&convert, entry));
            kernels.collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            unpack: of_forms("unpack")?,
            embed: of_forms("embed")?,
            multiply: multiply.collect::<Result<_, CudaError>>()?,
        })
    }

    /// `out = rows of part`, `[rows, cols]`, rounded to nearest.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If the rows don't begin at a multiple of [`Form::ROWS`] or a buffer is too small.
    pub unsafe fn unpack(
        &self,
        stream: &Stream,
        part: &PackedPart,
        rows: Range<usize>,
        cols: usize,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        assert!(rows.start.is_multiple_of(Form::ROWS) && rows.end <= part.rows);
        assert!(out.len() >= rows.len() * cols);
        let ends = [rows.start, rows.end].map(|row| part.form.bytes(row, cols));
        let packed = part.data.range(ends[0]..ends[1]);
        let arguments = (packed, rows.len() as u32, cols as u32, out);
        let kernel = &self.unpack[part.form as usize];
        let shape = warp_per_record(rows.len(), cols);
        // SAFETY: as above.
        unsafe { kernel.launch(stream, shape, &arguments) }
    }

    /// As [`Embed::launch`](super::Embed::launch), with rows of a quantised table.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Ids and slots are in range; all memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If `width` is not a multiple of 32 or a buffer is too small.
    pub unsafe fn embed(
        &self,
        stream: &Stream,
        tokens: Slice<u32>,
        last: Slice<i32>,
        table: &PackedPart,
        scale: f32,
        width: usize,
        out: Slice<bf16>,
    ) -> Result<(), CudaError> {
        assert!(width.is_multiple_of(32) && out.len() >= tokens.len() * width);
        assert!(table.data.len() >= table.form.bytes(table.rows, width));
        let threads = (width / 16).next_multiple_of(32).min(256) as u32;
        let shape = Shape::new(tokens.len() as u32, threads);
        let arguments = (tokens, last, table.data, scale, width as u32, out);
        // SAFETY: as above.
        unsafe { self.embed[table.form as usize].launch(stream, shape, &arguments) }
    }

    /// Computes a product with packed weights in the place of its own.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// All memory is alive until the kernel has run. The weights were complete before the kernel that
    /// precedes this one in the stream was launched.
    ///
    /// # Panics
    /// If the part has other rows than `outputs`, `inputs` is not a multiple of 32, or a buffer is too
    /// small.
    pub unsafe fn multiply(
        &self,
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
        let (out, out_f32) = match product.out {
            Output::Bf16(out) => (out.address(), 0),
            Output::F32(out) => (0, out.address()),
        };
        let args = Args {
            x: product.x.address(),
            weights: part.data.address(),
            out,
            out_f32,
            bias: product.bias.map_or(0, |bias| bias.address()),
            tokens: tokens as u32,
            outputs: outputs as u32,
            k: inputs as u32,
            stride: product.stride as u32,
        };
        let which = usize::from(tokens > SKINNY[0].tokens);
        let (skinny, kernel) = (&SKINNY[which], &self.multiply[part.form as usize][which]);
        let warps = skinny.warps(tokens, outputs, stream.sms());
        let blocks = skinny.blocks(tokens, outputs, warps);
        let grid = blocks.min((stream.sms() * BLOCKS_PER_SM) as usize) as u32;
        let shape = Shape::new(grid, 32 * warps as u32);
        let shape = shape.shared_bytes(skinny.shared_bytes(part.form, warps, tokens));
        // SAFETY: as above.
        unsafe { kernel.launch(stream, shape, &(args,)) }
    }
}

/// A kernel whose name is put together.
pub(super) fn named(module: &Module, entry: String) -> Result<Kernel, CudaError> {
    module.kernel(&CString::new(entry).expect("names have no zeros"))
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
