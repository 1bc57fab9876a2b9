use half::bf16;

use super::lab::Lab;
use crate::driver::{Device, Event, Pinned};
use crate::kernels::{Output, Path, Product};
use crate::{CudaError, Linear};

/// What a GPU was seen to do, per second.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Bytes of weights that a single token's product reads.
    pub read: f64,
    /// Multiplications and additions of a large matrix product in bfloat16.
    pub matrix: f64,
    /// Bytes from page-locked memory of the host to the GPU.
    pub upload: f64,
    /// Bytes the other way.
    pub download: f64,
}

/// Outputs of a single token's product: a gibibyte of weights, more than any L2 cache holds.
const TALL: usize = 131_072;
const INPUTS: usize = 4096;

/// Bytes between host and GPU.
const TRANSFER: usize = 64 << 20;

/// Side of the matrices, for a compute-bound product.
const SIDE: usize = 8192;

/// Measures a GPU that nobody else uses; about a second.
///
/// # Errors
/// When the GPU fails or has not 2 GiB free.
pub fn rates(device: &Device) -> Result<Rates, CudaError> {
    let mut lab = Lab::new(device, 1)?;
    let rate = |amount: usize, seconds: f64| amount as f64 / seconds;

    let linear = Linear::load(device, Path::best(device))?;
    let product = |lab: &mut Lab, tokens: usize, outputs: usize, inputs: usize| {
        Ok::<_, CudaError>(Product {
            tokens,
            outputs,
            inputs,
            x: lab.random_bf16s(tokens * inputs)?,
            weights: lab.random_bf16s(outputs * inputs)?,
            fresh_weights: false,
            gate: None,
            stride: outputs,
            bias: None,
            out: Output::Bf16(lab.output::<bf16>(tokens * outputs)?.slice),
        })
    };
    let tall = product(&mut lab, 1, TALL, INPUTS)?;
    // SAFETY: the arena is alive; the weights were waited for.
    let read = lab.time(|stream| unsafe { linear.launch(stream, &tall) })?;
    lab.clear()?;

    let square = product(&mut lab, SIDE, SIDE, SIDE)?;
    // SAFETY: as above.
    let matrix = lab.time(|stream| unsafe { linear.launch(stream, &square) })?;
    lab.clear()?;

    let mut host = Pinned::<u8>::new(device, TRANSFER)?;
    let there = lab.output::<u8>(TRANSFER)?.slice;
    // SAFETY: the copy has run when `fastest` looks at its time, and what is written is not read.
    let up = fastest(&lab, || unsafe { lab.stream.upload(&host, there) })?;
    // SAFETY: as above.
    let down = fastest(&lab, || unsafe { lab.stream.download(there, &mut host) })?;
    Ok(Rates {
        read: rate(2 * TALL * INPUTS, read.as_secs_f64()),
        matrix: rate(2 * SIDE * SIDE * SIDE, matrix.as_secs_f64()),
        upload: rate(TRANSFER, up),
        download: rate(TRANSFER, down),
    })
}

/// Seconds of the fastest of several runs.
fn fastest(lab: &Lab, mut work: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    let [start, end] = [Event::new(lab.device())?, Event::new(lab.device())?];
    let mut best = f64::INFINITY;
    for _ in 0..7 {
        lab.stream.record(&start)?;
        work()?;
        lab.stream.record(&end)?;
        lab.stream.synchronize()?;
        best = best.min(end.since(&start)?.as_secs_f64());
    }
    Ok(best)
}
