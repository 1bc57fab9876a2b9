use std::cell::Cell;

use half::{bf16, f16};
use spate_model::GgmlType;
use spate_model::quant::dequantize;

use super::lab::{Lab, Report, distance};
use crate::driver::Slice;
use crate::kernels::{Form, GemmHopper, Output, Packed, Product};
use crate::{CudaError, Linear};

/// Rounding of weights to bfloat16.
const LIMIT: f64 = 3e-3;

const CASES: usize = 6;

/// Formats, and where a block of each has its half-precision numbers.
const FORMATS: [(GgmlType, &[usize]); 8] = [
    (GgmlType::Q4_0, &[0]),
    (GgmlType::Q4_1, &[0, 2]),
    (GgmlType::Q4K, &[0, 2]),
    (GgmlType::Q5_0, &[0]),
    (GgmlType::Q5_1, &[0, 2]),
    (GgmlType::Q5K, &[0, 2]),
    (GgmlType::Q6K, &[208]),
    (GgmlType::Q8_0, &[0]),
];

pub(super) fn packed(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let linear = Linear::load(lab.device())?;
    let mut reports = Vec::new();
    for (ty, halves) in FORMATS {
        let form = Form::of(ty).expect("it is in the table of forms");
        let (mut unpacked, mut products, mut differ) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..CASES {
            lab.clear()?;
            let rows = 8 * (1 + lab.below(40));
            let cols = ty.block_elems().max(32)
                * (1 + lab.below(if ty.block_elems() > 32 { 5 } else { 40 }));
            let (case, matrix) = Case::new(lab, &linear, ty, halves, rows, cols)?;
            let (want, got) = (case.weights.clone(), lab.read(matrix)?);
            unpacked.push(distance(&got, &want));
            let (error, share) = case.product(lab, &linear, form, &got)?;
            products.push(error);
            differ.push(share);
        }
        reports.push(lab.report(&format!("packed {ty}, unpacked"), &unpacked, LIMIT));
        reports.push(lab.report(&format!("packed {ty}, product"), &products, 1e-4));
        if GemmHopper::fits(lab.device()) {
            reports.push(lab.report(&format!("packed {ty}, same bits"), &differ, 0.0));
        }
    }
    Ok(reports)
}

struct Case {
    rows: usize,
    cols: usize,
    /// As the file's format defines them.
    weights: Vec<f64>,
    packed: Slice<u8>,
    scratch: Slice<bf16>,
}

impl Case {
    /// A random matrix, packed and unpacked again.
    fn new(
        lab: &mut Lab,
        linear: &Linear,
        ty: GgmlType,
        halves: &[usize],
        rows: usize,
        cols: usize,
    ) -> Result<(Self, super::lab::Output<bf16>), CudaError> {
        let raw = random_blocks(lab, ty, halves, rows * cols / ty.block_elems());
        let mut weights = vec![0f32; rows * cols];
        dequantize(ty, &raw, &mut weights).expect("whole blocks");
        let form = Form::of(ty).expect("it is in the table of forms");
        let on_raw = lab.upload(&raw)?;
        let records = lab.output::<u8>(form.bytes(rows, cols))?;
        let matrix = lab.output::<bf16>(rows * cols)?;
        let (shape, kernels) = ([rows, cols], linear.packed());
        // SAFETY: the arena is alive.
        unsafe {
            kernels.pack(&lab.stream, ty, on_raw, shape, records.slice)?;
            kernels.unpack(&lab.stream, form, records.slice, shape, matrix.slice)?;
        }
        lab.read(records)?;
        let case = Self {
            rows,
            cols,
            weights: weights.into_iter().map(f64::from).collect(),
            packed: records.slice,
            scratch: matrix.slice,
        };
        Ok((case, matrix))
    }

    /// Error of the product against the weights as they were unpacked, and the share of outputs whose
    /// bits depend on whether they are.
    fn product(
        &self,
        lab: &mut Lab,
        linear: &Linear,
        form: Form,
        unpacked: &[bf16],
    ) -> Result<(f64, f64), CudaError> {
        const MANY: usize = 80;
        let tokens = 1 + lab.below(Packed::MAX_TOKENS);
        let (x, bias) = (lab.bf16s(MANY * self.cols), lab.f32s(self.rows));
        let (on_x, on_bias) = (lab.upload(&x)?, lab.upload(&bias)?);
        let mut run = |tokens: usize| {
            let out = lab.output::<f32>(tokens * self.rows)?;
            let product = Product {
                tokens,
                outputs: self.rows,
                inputs: self.cols,
                x: on_x,
                weights: Slice::null(),
                fresh_weights: false,
                bias: Some(on_bias),
                out: Output::F32(out.slice),
            };
            // SAFETY: the arena is alive; the weights were waited for.
            unsafe {
                linear.launch_packed(&lab.stream, form, self.packed, &product, self.scratch)?
            };
            lab.read(out)
        };
        let (few, many) = (run(tokens)?, run(MANY)?);
        let pairs = few.iter().zip(&many);
        let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();

        let (mut apart, mut size) = (0.0, 0.0);
        for (i, got) in few.iter().enumerate() {
            let (token, output) = (i / self.rows, i % self.rows);
            let row = &x[token * self.cols..][..self.cols];
            let weights = &unpacked[output * self.cols..][..self.cols];
            let products = row
                .iter()
                .zip(weights)
                .map(|(x, w)| x.to_f64() * w.to_f64());
            let want = products.sum::<f64>() + f64::from(bias[output]);
            apart += (f64::from(*got) - want).powi(2);
            size += want * want;
        }
        let share = differ as f64 / few.len() as f64;
        Ok(((apart / size.max(f64::MIN_POSITIVE)).sqrt(), share))
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
    let linear = Linear::load(lab.device())?;
    let mut reports = Vec::new();
    for form in [
        Form::Four,
        Form::FourMin,
        Form::Five,
        Form::Six,
        Form::Eight,
    ] {
        reports.extend(times(lab, &linear, form)?);
    }
    Ok(reports)
}

/// Speed on the widest product of an 8B model, every run with other weights.
fn times(lab: &mut Lab, linear: &Linear, form: Form) -> Result<Vec<Report>, CudaError> {
    const COPIES: usize = 6;
    const PIECE: usize = 1 << 22;
    let [outputs, inputs] = [28672, 4096];
    lab.clear()?;
    let len = form.bytes(outputs, inputs);
    let all = lab.output::<u8>(COPIES * len)?.slice;
    let piece: Vec<u8> = (0..PIECE).map(|_| (lab.random() & 0x3b) as u8).collect();
    for start in (0..all.len()).step_by(PIECE) {
        let part = all.range(start..(start + PIECE).min(all.len()));
        lab.write(&piece[..part.len()], part)?;
    }
    let x = lab.bf16s(Packed::MAX_TOKENS * inputs);
    let x = lab.upload(&x)?;
    let out = lab.output::<bf16>(Packed::MAX_TOKENS * outputs)?.slice;
    let mut reports = Vec::new();
    for tokens in [1, 16, 64] {
        let next = Cell::new(0);
        let time = lab.time(|stream| {
            let at = next.replace((next.get() + 1) % COPIES) * len;
            let product = Product {
                tokens,
                outputs,
                inputs,
                x,
                weights: Slice::null(),
                fresh_weights: false,
                bias: None,
                out: Output::Bf16(out),
            };
            let packed = all.range(at..at + len);
            // SAFETY: the arena is alive; the weights were waited for.
            unsafe { linear.packed().multiply(stream, form, packed, &product) }
        })?;
        let mut report = lab.report(&format!("packed {form:?} gate_up x {tokens}"), &[], 0.0);
        report.time = Some(time);
        report.bytes = Some(len as u64);
        reports.push(report);
    }
    Ok(reports)
}
