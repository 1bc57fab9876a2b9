//! Each kernel against plain float64 arithmetic on the CPU, on this machine's GPU.
//!
//! Shapes and inputs are random and new in each run (the seed is printed), outputs are poisoned
//! beforehand, and the memory behind them is watched. It belongs to the library because users run it
//! too, to learn whether their machine computes right.

mod attention;
mod attention_speed;
mod elementwise;
mod kv;
mod lab;
mod linear;
mod packed;
mod rates;
mod sampling;

pub use lab::Report;
pub use rates::{Rates, rates};

use crate::CudaError;
use crate::driver::Device;
use lab::Lab;

/// A check of one kernel; it gives a report for each kind of case.
type Check = fn(&mut Lab) -> Result<Vec<Report>, CudaError>;

const CHECKS: &[(&str, Check)] = &[
    ("embed", elementwise::embed),
    ("add_rms_norm", elementwise::add_rms_norm),
    ("act_mul", elementwise::act_mul),
    ("linear", linear::linear),
    ("packed", packed::packed),
    ("small products", linear::small),
    ("small packed products", packed::small),
    ("attention 64", attention::attention::<64>),
    ("attention 96", attention::attention::<96>),
    ("attention 128", attention::attention::<128>),
    ("attention 256", attention::attention::<256>),
    ("small attention 64", attention::small::<64>),
    ("small attention 96", attention::small::<96>),
    ("small attention 128", attention::small::<128>),
    ("small attention 256", attention::small::<256>),
    ("speed: matrices", linear::throughput),
    ("speed: tiles", linear::tiles),
    ("speed: quantised", packed::throughput),
    ("speed: heads", attention_speed::throughput),
    ("speed: heads, 8-bit KV", attention_speed::packed_throughput),
    ("speed: shared heads", attention_speed::shared_throughput),
    ("rope", elementwise::rope),
    ("copy_blocks", elementwise::copy_blocks),
    ("check_rows", sampling::check_rows),
    ("sample the smallest vocabulary", sampling::smallest),
    ("sample small vocabularies", sampling::small),
    ("sample large vocabularies", sampling::large),
    ("speed: sampler", sampling::speed),
];

/// What the names of checks begin with that only take the time of kernels.
const SPEED: &str = "speed: ";

/// Compares every kernel with arithmetic on the CPU, without those checks that only take times.
///
/// # Errors
/// As [`run`].
pub fn compare(device: &Device, seed: u64, out: &mut dyn FnMut(&Report)) -> Result<(), CudaError> {
    run_those(device, |name| !name.starts_with(SPEED), seed, out)
}

/// Runs the checks whose name contains `filter`; calls `out` for each report.
///
/// # Errors
/// When the GPU fails. A wrong result is no error: see [`Report::passed`].
pub fn run(
    device: &Device,
    filter: &str,
    seed: u64,
    out: &mut dyn FnMut(&Report),
) -> Result<(), CudaError> {
    run_those(device, |name| name.contains(filter), seed, out)
}

fn run_those(
    device: &Device,
    wanted: impl Fn(&str) -> bool,
    seed: u64,
    out: &mut dyn FnMut(&Report),
) -> Result<(), CudaError> {
    for (_, check) in CHECKS.iter().filter(|(name, _)| wanted(name)) {
        let mut lab = Lab::new(device, seed)?;
        for report in check(&mut lab)? {
            out(&report);
        }
    }
    Ok(())
}
