use std::cell::Cell;

use half::bf16;
use spate_model::Activation;

use super::lab::{Lab, Report};
use crate::driver::{Priority, Slice, Stream};
use crate::kernels::{ActMul, GemmHopper, GemmPortable, Output, Path, Product};
use crate::{CudaError, Linear};

/// Rounding of the result to bfloat16, and float32 sums of thousands of products.
const LIMIT_BF16: f64 = 3e-3;
const LIMIT_F32: f64 = 1e-4;

const CASES: usize = 24;

/// Outputs of a case that are compared: all of them would take the CPU too long.
const SAMPLES: usize = 500;

type Launch<'a> = &'a dyn Fn(&Stream, &Product) -> Result<(), CudaError>;

pub(super) fn linear(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let portable = GemmPortable::load(lab.device())?;
    let linear = Linear::load(lab.device(), Path::best(lab.device()))?;
    // SAFETY: all callers keep the arena; weights are uploaded and waited for beforehand.
    let any = |stream: &Stream, product: &Product| unsafe { portable.launch(stream, product) };
    // SAFETY: as above.
    let best = |stream: &Stream, product: &Product| unsafe { linear.launch(stream, product) };
    let mut reports = accuracy(lab, "linear (mma.sync)", &any)?;
    reports.push(invariance(lab, "linear (mma.sync)", &any, &any)?);
    if GemmHopper::fits(lab.device()) {
        reports.extend(accuracy(lab, "linear (wgmma)", &best)?);
        reports.push(invariance(lab, "linear (wgmma)", &best, &any)?);
        let hopper = linear.hopper().expect("this is Hopper");
        reports.push(same_bits_of_tiles(lab, hopper)?);
        reports.push(gates(lab, hopper, &any, 4, 1000)?);
    }
    Ok(reports)
}

/// What the sanitizer, which runs a thousand times slower, gets through: every kernel once or twice.
pub(super) fn small(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let portable = GemmPortable::load(lab.device())?;
    let linear = Linear::load(lab.device(), Path::best(lab.device()))?;
    let mut errors = Vec::new();
    for tokens in [3, 13, 30, 60, 130, 257, 300] {
        for outputs in [72, 200, 264] {
            lab.clear()?;
            let case = Case::new(lab, tokens, outputs, 200)?;
            for path in [Path::Portable, Path::best(lab.device())] {
                let out = lab.output::<bf16>(case.out_len())?;
                let product = Product {
                    out: Output::Bf16(out.slice),
                    ..case.product
                };
                // SAFETY: the arena is alive; the weights were waited for.
                unsafe {
                    match path {
                        Path::Portable => portable.launch(&lab.stream, &product)?,
                        Path::Hopper => linear.launch(&lab.stream, &product)?,
                    }
                }
                let got: Vec<f64> = lab.read(out)?.iter().map(|x| x.to_f64()).collect();
                errors.push(case.error(lab, &got));
            }
        }
    }
    let mut reports = vec![lab.report("small products", &errors, LIMIT_BF16)];
    if let Some(hopper) = linear.hopper() {
        // SAFETY: as above.
        let any = |stream: &Stream, product: &Product| unsafe { portable.launch(stream, product) };
        reports.push(gates(lab, hopper, &any, 1, 30)?);
    }
    Ok(reports)
}

/// A product with everything that it needs.
struct Case {
    product: Product,
    x: Vec<bf16>,
    weights: Vec<bf16>,
    bias: Vec<f32>,
}

impl Case {
    /// `out` is left as no memory.
    fn new(lab: &mut Lab, tokens: usize, outputs: usize, inputs: usize) -> Result<Self, CudaError> {
        let (x, weights) = (lab.bf16s(tokens * inputs), lab.bf16s(outputs * inputs));
        let bias = lab.f32s(outputs);
        let with_bias = lab.below(2) == 0;
        let on_bias = with_bias.then(|| lab.upload(&bias)).transpose()?;
        Ok(Self {
            product: Product {
                tokens,
                outputs,
                inputs,
                x: lab.upload(&x)?,
                weights: lab.upload(&weights)?,
                fresh_weights: false,
                gate: None,
                bias: on_bias,
                out: Output::F32(Slice::null()),
                stride: outputs,
            },
            x,
            weights,
            bias,
        })
    }

    fn random(lab: &mut Lab, case: usize) -> Result<Self, CudaError> {
        // Ragged against every tile size, and the narrow kernels as often as the wide ones.
        let tokens = match case % 3 {
            0 => 1 + lab.below(16),
            1 => 1 + lab.below(150),
            _ => 1 + lab.below(700),
        };
        let outputs = 8 * (1 + lab.below(200));
        let inputs = 8 * (1 + lab.below([20, 200][case % 2]));
        let mut case = Self::new(lab, tokens, outputs, inputs)?;
        case.product.stride += 8 * lab.below(3);
        Ok(case)
    }

    /// Elements of the output, which ends with the last token's.
    fn out_len(&self) -> usize {
        (self.product.tokens - 1) * self.product.stride + self.product.outputs
    }

    /// The outputs alone; nothing if anything between them is no longer poison.
    fn outputs<T: Copy>(&self, out: &[T], poison: impl Fn(T) -> bool) -> Vec<T> {
        let width = self.product.outputs;
        let rows = || out.chunks(self.product.stride);
        let mut gaps = rows().flat_map(|row| &row[width..]);
        match gaps.all(|x| poison(*x)) {
            true => rows().flat_map(|row| &row[..width]).copied().collect(),
            false => Vec::new(),
        }
    }

    fn want(&self, token: usize, output: usize) -> f64 {
        let width = self.product.inputs;
        let row = &self.x[token * width..][..width];
        let weights = &self.weights[output * width..][..width];
        let products = row
            .iter()
            .zip(weights)
            .map(|(x, w)| x.to_f64() * w.to_f64());
        let bias = self.product.bias.map_or(0.0, |_| self.bias[output].into());
        products.sum::<f64>() + bias
    }

    /// Distance at random places; infinite if there is nothing or anything else is not a number.
    fn error(&self, lab: &mut Lab, got: &[f64]) -> f64 {
        if got.is_empty() || got.iter().any(|x| !x.is_finite()) {
            return f64::INFINITY;
        }
        let (mut apart, mut size) = (0.0, 0.0);
        for _ in 0..SAMPLES {
            let (token, output) = (
                lab.below(self.product.tokens),
                lab.below(self.product.outputs),
            );
            let want = self.want(token, output);
            apart += (got[token * self.product.outputs + output] - want).powi(2);
            size += want * want;
        }
        (apart / size.max(f64::MIN_POSITIVE)).sqrt()
    }
}

fn accuracy(lab: &mut Lab, name: &str, launch: Launch) -> Result<Vec<Report>, CudaError> {
    let (mut errors_bf16, mut errors_f32) = (Vec::new(), Vec::new());
    for case in 0..CASES {
        lab.clear()?;
        let case = Case::random(lab, case)?;
        let len = case.out_len();
        let out = lab.output::<bf16>(len)?;
        let product = Product {
            out: Output::Bf16(out.slice),
            ..case.product
        };
        launch(&lab.stream, &product)?;
        let got = case.outputs(&lab.read(out)?, |x| x.to_bits() == u16::MAX);
        let got: Vec<f64> = got.iter().map(|x| x.to_f64()).collect();
        errors_bf16.push(case.error(lab, &got));

        let out = lab.output::<f32>(len)?;
        let product = Product {
            out: Output::F32(out.slice),
            ..case.product
        };
        launch(&lab.stream, &product)?;
        let got = case.outputs(&lab.read(out)?, |x| x.to_bits() == u32::MAX);
        let got: Vec<f64> = got.iter().map(|&x| x.into()).collect();
        errors_f32.push(case.error(lab, &got));
    }
    Ok(vec![
        lab.report(&format!("{name}, bf16"), &errors_bf16, LIMIT_BF16),
        lab.report(&format!("{name}, f32"), &errors_f32, LIMIT_F32),
    ])
}

/// Share of outputs whose bits change with the number of tokens, with the SMs, or between kernels.
fn invariance(
    lab: &mut Lab,
    name: &str,
    launch: Launch,
    other: Launch,
) -> Result<Report, CudaError> {
    let mut shares = Vec::new();
    let device = lab.device().clone();
    for inputs in [576, 4096, 14336] {
        lab.clear()?;
        let case = Case::new(lab, 300, 1000, inputs)?;
        let mut run = |launch: Launch, tokens: usize, sms: u32| {
            let out = lab.output::<f32>(tokens * 1000)?;
            let product = Product {
                tokens,
                out: Output::F32(out.slice),
                ..case.product
            };
            let stream = Stream::new(&device, Priority::Low)?.with_sms(sms);
            // The poison is written by another stream.
            lab.stream.synchronize()?;
            launch(&stream, &product)?;
            stream.synchronize()?;
            lab.read(out)
        };
        let all = run(launch, 300, device.sms())?;
        for tokens in [1, 9, 17, 33, 64, 65, 128, 200, 256, 300] {
            for (launch, sms) in [(launch, device.sms()), (launch, 10), (other, device.sms())] {
                let got = run(launch, tokens, sms)?;
                let pairs = got.iter().zip(&all);
                let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                shares.push(differ as f64 / got.len() as f64);
            }
        }
    }
    Ok(lab.report(&format!("{name}, same bits"), &shares, 0.0))
}

/// Share of outputs whose bits depend on the tile.
fn same_bits_of_tiles(lab: &mut Lab, hopper: &GemmHopper) -> Result<Report, CudaError> {
    let mut shares = Vec::new();
    for tile in 0..GemmHopper::TILES {
        lab.clear()?;
        // Ragged, and more tiles than SMs, so that some blocks compute two.
        let (tokens, outputs) = (1 + lab.below(700), 8 * (500 + lab.below(700)));
        let inputs = 8 * (1 + lab.below(150));
        let case = Case::new(lab, tokens, outputs, inputs)?;
        let mut run = |tile| {
            let out = lab.output::<bf16>(case.out_len())?;
            let product = Product {
                out: Output::Bf16(out.slice),
                ..case.product
            };
            // SAFETY: the arena is alive; the weights were waited for.
            unsafe { hopper.launch_with(tile, &lab.stream, &product)? };
            lab.read(out)
        };
        shares.push(differing(
            &run(tile)?,
            &run((tile + 1) % GemmHopper::TILES)?,
        ));
    }
    Ok(lab.report("linear (wgmma), same bits of tiles", &shares, 0.0))
}

/// Share of outputs of products with gates whose bits are not those of two kernels.
fn gates(
    lab: &mut Lab,
    hopper: &GemmHopper,
    any: Launch,
    rounds: usize,
    most: usize,
) -> Result<Report, CudaError> {
    let act_mul = ActMul::load(lab.device())?;
    let mut shares = Vec::new();
    for case in 0..rounds * GemmHopper::TILES {
        let tile = case % GemmHopper::TILES;
        lab.clear()?;
        let width = 8 * (1 + lab.below([most / 10, most][case % 2]));
        let tokens = 1 + lab.below([70, 300, 700][case % 3]);
        let inputs = 8 * (1 + lab.below(60));
        let activation = lab.pick(&[Activation::Silu, Activation::GeluTanh]);
        let case = Case::new(lab, tokens, 2 * width, inputs)?;
        let gate_up = lab.output::<bf16>(tokens * 2 * width)?;
        let want = lab.output::<bf16>(tokens * width)?;
        let stride = width + 8 * lab.below(3);
        let got = lab.output::<bf16>((tokens - 1) * stride + width)?;
        let product = Product {
            out: Output::Bf16(gate_up.slice),
            ..case.product
        };
        any(&lab.stream, &product)?;
        let fused = Product {
            gate: Some(activation),
            out: Output::Bf16(got.slice),
            stride,
            ..case.product
        };
        // SAFETY: the arena is alive; the weights were waited for.
        unsafe {
            let (stream, from, to) = (&lab.stream, gate_up.slice, want.slice);
            act_mul.launch(stream, activation, tokens, width, from, to)?;
            hopper.launch_with(tile, stream, &fused)?;
        }
        let (got, want) = (lab.read(got)?, lab.read(want)?);
        let gaps = got.chunks(stride).flat_map(|row| &row[width..]);
        let clean = gaps.into_iter().all(|x| x.to_bits() == u16::MAX);
        let rows = got.chunks(stride).flat_map(|row| &row[..width]);
        let rows: Vec<bf16> = rows.copied().collect();
        shares.push(if clean { differing(&rows, &want) } else { 1.0 });
    }
    Ok(lab.report("linear with gates, same bits", &shares, 0.0))
}

/// Share of numbers that are not the same bits, or not finite.
fn differing(a: &[bf16], b: &[bf16]) -> f64 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().zip(b);
    let differ = pairs.filter(|(a, b)| a.to_bits() != b.to_bits() || !a.is_finite());
    differ.count() as f64 / a.len() as f64
}

/// Matrices of an 8B model: outputs, inputs.
const SHAPES: [(&str, usize, usize); 5] = [
    ("qkv", 6144, 4096),
    ("o", 4096, 4096),
    ("gate_up", 28672, 4096),
    ("down", 4096, 14336),
    ("lm_head", 128_256, 4096),
];

/// The time of every tile that comes into question, gates of gate_up applied.
pub(super) fn tiles(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    const TOKENS: [usize; 14] = [
        72, 96, 128, 192, 256, 320, 384, 512, 520, 576, 640, 768, 1024, 2048,
    ];
    let mut reports = Vec::new();
    let linear = Linear::load(lab.device(), Path::best(lab.device()))?;
    let Some(hopper) = linear.hopper() else {
        return Ok(reports);
    };
    let sms = lab.device().sms();
    for (name, outputs, inputs) in &SHAPES[..4] {
        let mut cold = Cold::new(lab, *outputs, *inputs, TOKENS[TOKENS.len() - 1])?;
        cold.product.gate = (*name == "gate_up").then_some(Activation::Silu);
        cold.product.stride = cold.product.width();
        for tokens in TOKENS {
            cold.product.tokens = tokens;
            for tile in 0..GemmHopper::TILES {
                let (entry, expected) = GemmHopper::tile(tile, &cold.product, sms);
                if expected > 1.3 {
                    continue;
                }
                // SAFETY: the arena is alive; the weights were waited for.
                let time =
                    lab.time(|stream| unsafe { hopper.launch_with(tile, stream, &cold.next()) })?;
                let mut report = lab.report(&format!("tile {name} x {tokens} {entry}"), &[], 0.0);
                report.time = Some(time);
                reports.push(report);
            }
        }
    }
    Ok(reports)
}

/// A product whose weights are others every time: those of the last are in L2.
struct Cold {
    product: Product,
    weights: Slice<bf16>,
    next: Cell<usize>,
}

impl Cold {
    /// With room for so many tokens.
    fn new(lab: &mut Lab, outputs: usize, inputs: usize, most: usize) -> Result<Self, CudaError> {
        const BYTES: usize = 400 << 20;
        lab.clear()?;
        let len = outputs * inputs;
        let weights = lab.random_bf16s((BYTES / (2 * len) + 1) * len)?;
        let product = Product {
            tokens: most,
            outputs,
            inputs,
            x: lab.random_bf16s(most * inputs)?,
            weights: Slice::null(),
            fresh_weights: false,
            gate: None,
            bias: None,
            out: Output::Bf16(lab.output::<bf16>(most * outputs)?.slice),
            stride: outputs,
        };
        Ok(Self {
            product,
            weights,
            next: Cell::new(0),
        })
    }

    fn next(&self) -> Product {
        let len = self.product.outputs * self.product.inputs;
        let copies = self.weights.len() / len;
        let at = self.next.replace((self.next.get() + 1) % copies) * len;
        Product {
            weights: self.weights.range(at..at + len),
            ..self.product
        }
    }
}

/// Speed on the shapes of an 8B model, every run with other weights: those of the last are in L2.
pub(super) fn throughput(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    const TOKENS: [usize; 17] = [
        1, 16, 64, 72, 96, 128, 192, 256, 320, 384, 512, 576, 640, 768, 1024, 2048, 8192,
    ];
    let linear = Linear::load(lab.device(), Path::best(lab.device()))?;
    let mut reports = Vec::new();
    for (name, outputs, inputs) in SHAPES {
        // The head is used for few positions only.
        let most = if name == "lm_head" { 256 } else { 8192 };
        let mut cold = Cold::new(lab, outputs, inputs, most)?;
        for tokens in TOKENS.into_iter().filter(|&tokens| tokens <= most) {
            cold.product.tokens = tokens;
            // SAFETY: the arena is alive; the weights were waited for.
            let time = lab.time(|stream| unsafe { linear.launch(stream, &cold.next()) })?;
            let mut report = lab.report(&format!("linear {name} x {tokens}"), &[], 0.0);
            report.time = Some(time);
            match tokens {
                ..=64 => report.bytes = Some(2 * (outputs * inputs) as u64),
                _ => report.operations = Some(2 * (tokens * outputs * inputs) as u64),
            }
            reports.push(report);
        }
    }
    Ok(reports)
}
