//! Runs the self-test on a GPU: `kernels [FILTER] [SEED]`. Without a GPU it says so and passes.

#[path = "common/device.rs"]
mod device;

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use spate_cuda::selftest;

fn main() -> anyhow::Result<ExitCode> {
    let Some(device) = device::first()? else {
        return Ok(ExitCode::SUCCESS);
    };
    let mut args = std::env::args().skip(1);
    let filter = args.next().unwrap_or_default();
    let seed = match args.next() {
        Some(seed) => seed.parse()?,
        None => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
    };
    let (major, minor) = device.capability();
    let (sms, gib) = (device.sms(), device.total_bytes() >> 30);
    println!(
        "{}, sm_{major}{minor}, {sms} SMs, {gib} GiB, seed {seed}",
        device.name()
    );
    let mut failed = 0;
    selftest::run(&device, &filter, seed, &mut |report| {
        println!("{report}");
        failed += usize::from(!report.passed());
    })?;
    println!("{failed} failed");
    Ok(if failed == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
