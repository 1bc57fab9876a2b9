use std::cell::Cell;

use half::{bf16, f16};
use spate_model::GgmlType;
use spate_model::quant::dequantize;

use super::lab::{Lab, Report, distance};
use crate::driver::{Slice, Stream};
use crate::kernels::{Form, LAST, Output, Pack, PackedHopper, Path, Product};
use crate::{CudaError, Linear, PackedPart};

/// Rounding of weights to bfloat16.
const LIMIT: f64 = 3e-3;

const CASES: usize = 6;

/// A format, and where a block of it has its half-precision numbers.
type Format = (GgmlType, &'static [usize]);

const FORMATS: [Format; 8] = [
    (GgmlType::Q4_0, &[0]),
    (GgmlType::Q4_1, &[0, 2]),
    (GgmlType::Q4K, &[0, 2]),
    (GgmlType::Q5_0, &[0]),
    (GgmlType::Q5_1, &[0, 2]),
    (GgmlType::Q5K, &[0, 2]),
    (GgmlType::Q6K, &[208]),
    (GgmlType::Q8_0, &[0]),
];

/// The kernels of this GPU, best first, and what they are called.
fn paths(lab: &Lab) -> Result<Vec<(&'static str, Linear)>, CudaError> {
    let device = lab.device();
    let mut paths = vec![("mma.sync", Linear::load(device, Path::Portable)?)];
    if Path::best(device) == Path::Hopper {
        paths.insert(0, ("wgmma", Linear::load(device, Path::Hopper)?));
    }
    Ok(paths)
}

pub(super) fn packed(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let (paths, pack) = (paths(lab)?, Pack::load(lab.device())?);
    let mut reports = Vec::new();
    for format in FORMATS {
        let (mut unpacked, mut embedded) = (Vec::new(), Vec::new());
        let (mut products, mut differ) = (Vec::new(), Vec::new());
        for _ in 0..CASES {
            lab.clear()?;
            let case = Case::random(lab, &pack, format)?;
            let table = case.unpack(lab, &paths[0].1)?;
            unpacked.push(distance(&table, &case.weights));
            embedded.push(case.embed(lab, &paths[0].1, &table)?);
            case.products(lab, &paths, &table, &mut products, &mut differ)?;
        }
        let ty = format.0;
        reports.push(lab.report(&format!("packed {ty}, unpacked"), &unpacked, LIMIT));
        reports.push(lab.report(&format!("packed {ty}, embedding"), &embedded, 0.0));
        reports.push(lab.report(&format!("packed {ty}, product"), &products, 1e-4));
        reports.push(lab.report(&format!("packed {ty}, same bits"), &differ, 0.0));
    }
    Ok(reports)
}

/// What the sanitizer, which runs a thousand times slower, gets through: every kernel for one form.
pub(super) fn small(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let (paths, pack) = (paths(lab)?, Pack::load(lab.device())?);
    let mut case = Case {
        rows: 0,
        cols: 288,
        weights: Vec::new(),
        parts: Vec::new(),
    };
    for (format, rows) in [(FORMATS[1], 128), (FORMATS[7], 72)] {
        case.add(lab, &pack, format, rows)?;
    }
    let table = case.unpack(lab, &paths[0].1)?;
    let wrong = case.embed(lab, &paths[0].1, &table)?;
    let (mut products, mut differ) = (Vec::new(), vec![wrong]);
    case.products(lab, &paths, &table, &mut products, &mut differ)?;
    Ok(vec![
        lab.report("small packed products", &products, 1e-4),
        lab.report("small packed products, same bits", &differ, 0.0),
    ])
}

/// How a product is computed.
#[derive(Clone, Copy)]
enum Way {
    /// As the number of tokens suggests, without unpacking.
    Packed,
    Unpack,
    /// With one of Hopper's tiles.
    Tile(usize),
}

/// A matrix whose rows are of one format or of two.
struct Case {
    rows: usize,
    cols: usize,
    /// As the files' formats define them.
    weights: Vec<f64>,
    parts: Vec<PackedPart>,
}

impl Case {
    fn random(lab: &mut Lab, pack: &Pack, format: Format) -> Result<Self, CudaError> {
        let mut formats = vec![format];
        if lab.below(2) == 0 {
            formats.push(lab.pick(&FORMATS));
        }
        let block = formats.iter().map(|(ty, _)| ty.block_elems()).max();
        let block = block.expect("there is one");
        let cols = block * (1 + lab.below(if block > 32 { 5 } else { 40 }));
        let mut case = Self {
            rows: 0,
            cols,
            weights: Vec::new(),
            parts: Vec::new(),
        };
        for (i, format) in formats.iter().enumerate() {
            // Only what comes last may end within a piece.
            let rows = match i + 1 == formats.len() {
                true => 8 * (1 + lab.below(40)),
                false => Form::ROWS * (1 + lab.below(4)),
            };
            case.add(lab, pack, *format, rows)?;
        }
        Ok(case)
    }

    fn add(
        &mut self,
        lab: &mut Lab,
        pack: &Pack,
        (ty, halves): Format,
        rows: usize,
    ) -> Result<(), CudaError> {
        let form = Form::of(ty).expect("it is in the table of forms");
        let raw = random_blocks(lab, ty, halves, rows * self.cols / ty.block_elems());
        let mut weights = vec![0f32; rows * self.cols];
        dequantize(ty, &raw, &mut weights).expect("whole blocks");
        self.weights.extend(weights.into_iter().map(f64::from));
        let on_raw = lab.upload(&raw)?;
        let records = lab.output::<u8>(form.bytes(rows, self.cols))?;
        let data = records.slice;
        // SAFETY: the arena is alive.
        unsafe { pack.pack(&lab.stream, ty, on_raw, [rows, self.cols], data)? };
        lab.read(records)?;
        self.parts.push(PackedPart { form, rows, data });
        self.rows += rows;
        Ok(())
    }

    /// The whole matrix in bfloat16.
    fn unpack(&self, lab: &mut Lab, linear: &Linear) -> Result<Vec<bf16>, CudaError> {
        let mut all = Vec::new();
        for part in &self.parts {
            let out = lab.output::<bf16>(part.rows * self.cols)?;
            let (packed, rows) = (linear.packed(), 0..part.rows);
            // SAFETY: the arena is alive.
            unsafe { packed.unpack(&lab.stream, part, rows, self.cols, out.slice)? };
            all.extend(lab.read(out)?);
        }
        Ok(all)
    }

    /// Share of wrong elements of embeddings from the first part.
    fn embed(&self, lab: &mut Lab, linear: &Linear, table: &[bf16]) -> Result<f64, CudaError> {
        const SLOT: u32 = 1;
        let (part, cols) = (&self.parts[0], self.cols);
        let (last, scale) = (
            [-1, lab.below(part.rows) as i32],
            1.0 + lab.uniform() as f32,
        );
        let ids: Vec<u32> = (0..5).map(|_| lab.below(part.rows) as u32).collect();
        let mut tokens = ids.clone();
        tokens.extend([LAST, LAST | SLOT]);
        let found = [&ids[..], &[0, last[1] as u32]].concat();
        let (on_tokens, on_last) = (lab.upload(&tokens)?, lab.upload(&last)?);
        let out = lab.output::<bf16>(tokens.len() * cols)?;
        // SAFETY: the arena is alive.
        unsafe {
            let packed = linear.packed();
            packed.embed(
                &lab.stream,
                on_tokens,
                on_last,
                part,
                scale,
                cols,
                out.slice,
            )?;
        }
        let rows = found
            .iter()
            .flat_map(|&id| &table[id as usize * cols..][..cols]);
        let want = rows.map(|x| bf16::from_f32(x.to_f32() * scale));
        let got = lab.read(out)?;
        let wrong = got.iter().zip(want).filter(|(got, want)| *got != want);
        Ok(wrong.count() as f64 / got.len() as f64)
    }

    /// Errors of products against the matrix as it was unpacked, and shares of outputs whose bits depend
    /// on the number of tokens, on the kernel, or on whether weights are unpacked first.
    fn products(
        &self,
        lab: &mut Lab,
        paths: &[(&'static str, Linear)],
        table: &[bf16],
        errors: &mut Vec<f64>,
        differ: &mut Vec<f64>,
    ) -> Result<(), CudaError> {
        const MOST: usize = 300;
        let stride = self.rows + 8 * lab.below(3);
        let (x, bias) = (lab.bf16s(MOST * self.cols), lab.f32s(self.rows));
        let (on_x, on_bias) = (lab.upload(&x)?, lab.upload(&bias)?);
        let scratch = Linear::scratch_len(Path::Portable, self.rows, self.cols);
        let scratch = lab.output::<bf16>(scratch)?;
        let mut run = |linear: &Linear, tokens: usize, way: Way| {
            let len = (tokens - 1) * stride + self.rows;
            let out = lab.output::<f32>(len)?;
            let product = Product {
                tokens,
                outputs: self.rows,
                inputs: self.cols,
                x: on_x,
                weights: Slice::null(),
                fresh_weights: false,
                gate: None,
                bias: Some(on_bias),
                out: Output::F32(out.slice),
                stride,
            };
            // SAFETY: the arena is alive; the weights were waited for.
            unsafe {
                let (stream, parts) = (&lab.stream, &self.parts[..]);
                match way {
                    Way::Unpack => {
                        linear.unpack_and_multiply(stream, parts, &product, scratch.slice)?;
                    }
                    Way::Packed => linear.multiply(stream, parts, &product)?,
                    Way::Tile(tile) => linear.multiply_with(tile, stream, parts, &product)?,
                }
            }
            let got = lab.read(out)?;
            // What lies between the rows stays as it was.
            let gaps = got.chunks(stride).filter_map(|row| row.get(self.rows..));
            let written = gaps.flatten().any(|x| x.to_bits() != u32::MAX);
            let rows = got.chunks(stride).flat_map(|row| &row[..self.rows]);
            Ok::<_, CudaError>((rows.copied().collect::<Vec<f32>>(), written))
        };
        let (all, _) = run(&paths[0].1, MOST, Way::Unpack)?;
        errors.push(self.error(&all, &x, &bias, table));
        let some = 1 + (all[0].to_bits() % 64) as usize;
        for tokens in [1, 8, 9, 16, some, 64, 65, 128, 200, 256, MOST] {
            for (_, linear) in paths {
                let tiles = linear.packed_hopper().map_or(0, |_| PackedHopper::TILES);
                let ways = [Way::Packed, Way::Unpack].into_iter();
                for way in ways.chain((0..tiles).map(Way::Tile)) {
                    let (got, written) = run(linear, tokens, way)?;
                    let pairs = got.iter().zip(&all);
                    let wrong = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                    differ.push(match written {
                        true => f64::INFINITY,
                        false => wrong as f64 / got.len() as f64,
                    });
                }
            }
        }
        lab.read(scratch)?;
        self.rounded(lab, &paths[0].1, (on_x, on_bias), stride, &all, differ)
    }

    /// Shares of bfloat16 outputs that are not those of `all`, rounded.
    fn rounded(
        &self,
        lab: &mut Lab,
        linear: &Linear,
        (x, bias): (Slice<bf16>, Slice<f32>),
        stride: usize,
        all: &[f32],
        differ: &mut Vec<f64>,
    ) -> Result<(), CudaError> {
        let most = all.len() / self.rows;
        let tiles = linear.packed_hopper().map_or(0, |_| PackedHopper::TILES);
        for way in std::iter::once(None).chain((0..tiles).map(Some)) {
            for tokens in [7, 100, most] {
                let out = lab.output::<bf16>((tokens - 1) * stride + self.rows)?;
                let product = Product {
                    tokens,
                    outputs: self.rows,
                    inputs: self.cols,
                    x,
                    weights: Slice::null(),
                    fresh_weights: false,
                    gate: None,
                    bias: Some(bias),
                    out: Output::Bf16(out.slice),
                    stride,
                };
                // SAFETY: the arena is alive; the weights were waited for.
                unsafe {
                    match way {
                        None => linear.multiply(&lab.stream, &self.parts, &product)?,
                        Some(tile) => {
                            linear.multiply_with(tile, &lab.stream, &self.parts, &product)?;
                        }
                    }
                }
                let got = lab.read(out)?;
                let gaps = got.chunks(stride).filter_map(|row| row.get(self.rows..));
                let rows = got.chunks(stride).flat_map(|row| &row[..self.rows]);
                let wrong = rows.zip(all).filter(|(a, b)| **a != bf16::from_f32(**b));
                differ.push(match gaps.flatten().any(|x| x.to_bits() != u16::MAX) {
                    true => f64::INFINITY,
                    false => wrong.count() as f64 / (tokens * self.rows) as f64,
                });
            }
        }
        Ok(())
    }

    fn error(&self, got: &[f32], x: &[bf16], bias: &[f32], table: &[bf16]) -> f64 {
        let (mut apart, mut size) = (0.0, 0.0);
        // A sample: all would take the CPU too long.
        for (i, got) in got.iter().enumerate().step_by(7) {
            let (token, output) = (i / self.rows, i % self.rows);
            let row = &x[token * self.cols..][..self.cols];
            let weights = &table[output * self.cols..][..self.cols];
            let products = row.iter().zip(weights);
            let sum: f64 = products.map(|(x, w)| x.to_f64() * w.to_f64()).sum();
            let want = sum + f64::from(bias[output]);
            apart += (f64::from(*got) - want).powi(2);
            size += want * want;
        }
        (apart / size.max(f64::MIN_POSITIVE)).sqrt()
    }
}

/// Random bytes, with plausible numbers where the format has half-precision ones.
fn random_blocks(lab: &mut Lab, ty: GgmlType, halves: &[usize], blocks: usize) -> Vec<u8> {
    let mut raw = vec![0; blocks * ty.block_bytes()];
    for byte in &mut raw {
        *byte = lab.random() as u8;
    }
    for block in raw.chunks_exact_mut(ty.block_bytes()) {
        for &at in halves {
            let half = f16::from_f64((lab.uniform() - 0.5) * 0.02);
            block[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    }
    raw
}

pub(super) fn throughput(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let linear = Linear::load(lab.device(), Path::best(lab.device()))?;
    let mut reports = Vec::new();
    for (form, shapes) in [
        (Form::Four, &SHAPES[..1]),
        (Form::FourMin, &SHAPES[..]),
        (Form::Five, &SHAPES[..1]),
        (Form::Six, &SHAPES[..]),
        (Form::Eight, &SHAPES[..1]),
    ] {
        for shape in shapes {
            reports.extend(times(lab, &linear, form, shape)?);
        }
    }
    Ok(reports)
}

/// Products of an 8B model: outputs, inputs.
const SHAPES: [(&str, usize, usize); 3] = [
    ("gate_up", 28672, 4096),
    ("o", 4096, 4096),
    ("down", 4096, 14336),
];

/// Speed of both ways, every run with other weights.
fn times(
    lab: &mut Lab,
    linear: &Linear,
    form: Form,
    &(name, outputs, inputs): &(&str, usize, usize),
) -> Result<Vec<Report>, CudaError> {
    const COLD: usize = 400 << 20;
    const PIECE: usize = 1 << 22;
    const TOKENS: [usize; 9] = [1, 8, 16, 32, 64, 128, 256, 512, 1024];
    lab.clear()?;
    let len = form.bytes(outputs, inputs);
    let copies = COLD / len + 1;
    let all = lab.output::<u8>(copies * len)?.slice;
    let piece: Vec<u8> = (0..PIECE).map(|_| (lab.random() & 0x3b) as u8).collect();
    for start in (0..all.len()).step_by(PIECE) {
        let part = all.range(start..(start + PIECE).min(all.len()));
        lab.write(&piece[..part.len()], part)?;
    }
    let most = TOKENS[TOKENS.len() - 1];
    let x = lab.bf16s(most * inputs);
    let x = lab.upload(&x)?;
    let out = lab.output::<bf16>(most * outputs)?.slice;
    let scratch = Linear::scratch_len(Path::Portable, outputs, inputs);
    let scratch = lab.output::<bf16>(scratch)?.slice;
    let mut reports = Vec::new();
    for tokens in TOKENS {
        for unpack in [false, true] {
            let next = Cell::new(0);
            let time = lab.time(|stream: &Stream| {
                let at = next.replace((next.get() + 1) % copies) * len;
                let product = Product {
                    tokens,
                    outputs,
                    inputs,
                    x,
                    weights: Slice::null(),
                    fresh_weights: false,
                    gate: None,
                    bias: None,
                    out: Output::Bf16(out),
                    stride: outputs,
                };
                let part = PackedPart {
                    form,
                    rows: outputs,
                    data: all.range(at..at + len),
                };
                // SAFETY: the arena is alive; the weights were waited for.
                unsafe {
                    match unpack {
                        true => linear.unpack_and_multiply(stream, &[part], &product, scratch),
                        false => linear.multiply(stream, &[part], &product),
                    }
                }
            })?;
            let way = if unpack { ", unpacked" } else { "" };
            let name = format!("packed {form:?} {name} x {tokens}{way}");
            let mut report = lab.report(&name, &[], 0.0);
            report.time = Some(time);
            report.bytes = Some(len as u64);
            report.operations = Some(2 * (tokens * outputs * inputs) as u64);
            reports.push(report);
        }
    }
    Ok(reports)
}
