//! `spate doctor`: whether this machine serves, computes right, and is as fast as it should be.

mod cards;
mod machine;
mod report;

use std::io::Write;
use std::process::ExitCode;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use spate_cuda::driver::{self, Device};
use spate_cuda::{CudaError, selftest};

use crate::settings::units::format_size;
use report::{Level, Report};

/// Shares of the data sheet's figures that a healthy card reaches with these kernels.
const USUAL_BANDWIDTH: f64 = 0.8;
const USUAL_MATRIX: f64 = 0.5;

/// Check this machine: driver, GPU, every kernel against the CPU, speeds
#[derive(Debug, clap::Args)]
pub(crate) struct DoctorArgs {
    /// Print the findings as JSON
    #[arg(long)]
    json: bool,
    /// Seed of the kernels' random inputs [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
}

/// Prints what it finds; fails if this machine would not serve, or not rightly.
pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let seed = args.seed.unwrap_or(now.as_nanos() as u64);
    let mut report = Report::new(args.json);
    for (topic, text) in machine::describe() {
        report.add(Level::Info, topic, text);
    }
    check_cpu(&mut report, seed);
    check_gpus(&mut report, seed);
    report.conclude();
    if args.json {
        let text = serde_json::to_string_pretty(&report)?;
        writeln!(std::io::stdout(), "{text}")?;
    }
    Ok(match report.level() {
        Level::Failure => ExitCode::FAILURE,
        Level::Info | Level::Ok | Level::Warning => ExitCode::SUCCESS,
    })
}

fn check_cpu(report: &mut Report, seed: u64) {
    match spate_cpu::selftest::run(seed) {
        Ok(checks) => {
            let wrong = checks.iter().filter(|check| !check.passed());
            let wrong: Vec<_> = wrong.map(|check| check.name.as_str()).collect();
            let (level, text) = match wrong.is_empty() {
                true => (Level::Ok, "right and equal bit for bit".to_owned()),
                false => (Level::Failure, format!("wrong: {}", wrong.join("; "))),
            };
            let text = format!("{} products on all instruction sets, {text}", checks.len());
            report.add(level, "CPU", text);
        }
        Err(error) => report.add(Level::Failure, "CPU", error.to_string()),
    }
    match spate_cpu::selftest::rates(0) {
        Ok(rates) => {
            report.add_rate(("CPU", "reading weights"), (rates.read / 1e9, "GB/s"), None);
            let what = "in products of 8-bit integers";
            report.add_rate(("CPU", what), (rates.matrix / 1e9, "Gop/s"), None);
        }
        Err(error) => report.add(Level::Failure, "CPU", error.to_string()),
    }
}

fn check_gpus(report: &mut Report, seed: u64) {
    let count = match driver::device_count() {
        Ok(count) => count,
        Err(CudaError::Unavailable(why)) if !driver::is_installed() => {
            return report.add(Level::Info, "GPU", format!("none: {why}"));
        }
        Err(error) => return report.add(Level::Failure, "GPU", error.to_string()),
    };
    if count == 0 {
        report.add(Level::Info, "GPU", "none: the driver sees no GPU".into());
    }
    for number in 0..count {
        let device = match Device::open(number) {
            Ok(device) => device,
            Err(CudaError::Unavailable(why)) => {
                report.add(Level::Info, "GPU", why);
                continue;
            }
            Err(error) => {
                report.add(Level::Failure, "GPU", format!("cuda:{number}: {error}"));
                continue;
            }
        };
        if number == 0 {
            report.device = format!("cuda:0 ({})", device.name());
        }
        if let Err(error) = check_gpu(report, number, &device, seed) {
            report.add(Level::Failure, "GPU", format!("cuda:{number}: {error}"));
        }
    }
}

fn check_gpu(
    report: &mut Report,
    number: u32,
    device: &Device,
    seed: u64,
) -> Result<(), CudaError> {
    let (major, minor) = device.capability();
    let driver = device.driver_version();
    let gpu = format!(
        "cuda:{number}: {}, compute capability {major}.{minor}, {} SMs, {} of {} free",
        device.name(),
        device.sms(),
        format_size(device.free_bytes()?),
        format_size(device.total_bytes())
    );
    report.add(Level::Ok, "GPU", gpu);
    let driver = format!("for CUDA {}.{}", driver / 1000, driver % 1000 / 10);
    report.add(Level::Ok, "driver", driver);
    check_kernels(report, device, seed)?;

    let rates = selftest::rates(device)?;
    let card = cards::find(device.name());
    let bandwidth = card.map(|card| (card.bandwidth / 1e9, USUAL_BANDWIDTH));
    let matrix = card.map(|card| (card.matrix / 1e12, USUAL_MATRIX));
    let copy = (rates.copy / 1e9, "GB/s");
    report.add_rate(("bandwidth", "copying within its memory"), copy, bandwidth);
    let product = (rates.matrix / 1e12, "TFLOP/s");
    report.add_rate(("matrices", "in products of bfloat16"), product, matrix);
    for (what, rate) in [("from", rates.upload), ("to", rates.download)] {
        let what = format!("{what} the host");
        report.add_rate(("transfer", &what), (rate / 1e9, "GB/s"), None);
    }
    Ok(())
}

/// Each kernel's image is loaded and its results are compared; those that are wrong are shown.
fn check_kernels(report: &mut Report, device: &Device, seed: u64) -> Result<(), CudaError> {
    let start = Instant::now();
    let (mut checks, mut cases, mut wrong) = (0, 0, Vec::new());
    selftest::compare(device, seed, &mut |check| {
        checks += 1;
        cases += check.cases;
        if !check.passed() {
            wrong.push(format!(
                "{}: error {:.1e}, {:.1e} would pass",
                check.name, check.error, check.limit
            ));
        }
    })?;
    let all = format!(
        "{checks} checks of {cases} random cases against the CPU in {:.1} s",
        start.elapsed().as_secs_f32()
    );
    match wrong.is_empty() {
        true => report.add(Level::Ok, "kernels", format!("{all}: none is wrong")),
        false => {
            let text = format!("{all}, seed {seed}: {} WRONG", wrong.len());
            report.add(Level::Failure, "kernels", text);
            for wrong in wrong {
                report.add(Level::Failure, "kernels", wrong);
            }
        }
    }
    Ok(())
}
