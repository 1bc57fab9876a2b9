//! Steps on a GPU: that graphs and lanes change no output, and how long steps take.
//!
//! `steps check`: on small random models. `steps memory`: some of that, for a memory checker to watch.
//! `steps time DIR`, `steps overlap DIR`: with random weights for the `config.json` in DIR. `steps profile
//! DIR`: a few steps without graphs for a profiler to look at. Without a GPU it says so and passes.

mod check;
mod rig;
mod time;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};
use spate_cuda::CudaError;
use spate_cuda::driver::Device;

fn main() -> Result<ExitCode> {
    match Device::open(0) {
        Err(CudaError::Unavailable(why)) => {
            println!("skipped: {why}");
            return Ok(ExitCode::SUCCESS);
        }
        opened => drop(opened?),
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["check"] => return check::all(),
        ["memory"] => check::few()?,
        ["time", directory] => time::decodes(Path::new(directory))?,
        ["overlap", directory] => time::overlap(Path::new(directory))?,
        ["profile", directory] => time::profile(Path::new(directory))?,
        _ => bail!("steps check | memory | time DIR | overlap DIR | profile DIR"),
    }
    Ok(ExitCode::SUCCESS)
}
