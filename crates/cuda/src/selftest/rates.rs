use half::bf16;

use super::lab::Lab;
use crate::driver::{Device, Event, Pinned};
use crate::kernels::{Output, Path, Product};
use crate::{CudaError, Linear};

/// What a GPU was seen to do, per second.
#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Bytes that a copy within its memory reads and writes.
    pub copy: f64,
    /// Multiplications and additions of a large matrix product in bfloat16.
    pub matrix: f64,
    /// Bytes from page-locked memory of the host to the GPU.
    pub upload: f64,
    /// Bytes the other way.
    pub download: f64,
}

/// Bytes of a copy: more than any L2 cache holds.
const COPY: usize = 512 << 20;

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

    let (from, to) = (lab.output::<u8>(COPY)?.slice, lab.output::<u8>(COPY)?.slice);
    // Not in a graph, where a copy engine does it, more slowly than kernels read and write.
    // SAFETY: both lie in the lab's arena, which is alive.
    let copy = fastest(&lab, || unsafe { lab.stream.copy(from, to) })?;
    lab.clear()?;

    let linear = Linear::load(device, Path::best(device))?;
    let product = Product {
        tokens: SIDE,
        outputs: SIDE,
        inputs: SIDE,
        x: lab.random_bf16s(SIDE * SIDE)?,
        weights: lab.random_bf16s(SIDE * SIDE)?,
        fresh_weights: false,
        stride: SIDE,
        bias: None,
        out: Output::Bf16(lab.output::<bf16>(SIDE * SIDE)?.slice),
    };
    // SAFETY: the arena is alive; the weights were waited for.
    let matrix = lab.time(|stream| unsafe { linear.launch(stream, &product) })?;
    lab.clear()?;

    let mut host = Pinned::<u8>::new(device, TRANSFER)?;
    let there = lab.output::<u8>(TRANSFER)?.slice;
    // SAFETY: the copy has run when `fastest` looks at its time, and what is written is not read.
    let up = fastest(&lab, || unsafe { lab.stream.upload(&host, there) })?;
    // SAFETY: as above.
    let down = fastest(&lab, || unsafe { lab.stream.download(there, &mut host) })?;
    Ok(Rates {
        copy: rate(2 * COPY, copy),
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
