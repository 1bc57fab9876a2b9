//! Each kernel against plain float64 arithmetic on the CPU, on this machine's GPU.
//!
//! Shapes and inputs are random and new in each run (the seed is printed), outputs are poisoned
//! beforehand, and the memory behind them is watched. It belongs to the library because users run it
//! too, to learn whether their machine computes right.

mod attention;
mod elementwise;
mod lab;
mod linear;
mod packed;
mod sampling;

pub use lab::Report;

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
    ("attention", attention::attention),
    ("throughput: matrices", linear::throughput),
    ("throughput: quantised", packed::throughput),
    ("throughput: heads", attention::throughput),
    ("rope", elementwise::rope),
    ("copy_blocks", elementwise::copy_blocks),
    ("check_rows", sampling::check_rows),
    ("sample small vocabularies", sampling::small),
    ("sample large vocabularies", sampling::large),
    ("speed of the sampler", sampling::speed),
];

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
    for (name, check) in CHECKS {
        if !name.contains(filter) {
            continue;
        }
        let mut lab = Lab::new(device, seed)?;
        for report in check(&mut lab)? {
            out(&report);
        }
    }
    Ok(())
}
