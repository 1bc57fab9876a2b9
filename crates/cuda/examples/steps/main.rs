//! Steps on a GPU: that graphs and lanes change no output, and how long steps take.
//!
//! `steps check`: on small random models. `steps memory`: some of that, for a memory checker to watch.
//! `steps time DIR`, `steps mixed DIR`, `steps sustained DIR`, `steps overlap DIR`, `steps part DIR`: with random
//! weights for the `config.json` in DIR. `steps profile DIR`: a few steps without graphs for a profiler to look at. Without a
//! GPU it says so and passes.

mod check;
#[path = "../common/device.rs"]
mod device;
mod rig;
mod time;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};

fn main() -> Result<ExitCode> {
    if device::first()?.is_none() {
        return Ok(ExitCode::SUCCESS);
    }
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["check"] => return check::all(),
        ["memory"] => check::few()?,
        ["time", directory] => time::decodes(Path::new(directory))?,
        ["mixed", directory] => time::mixed(Path::new(directory))?,
        ["sustained", directory] => time::sustained(Path::new(directory))?,
        ["overlap", directory] => time::overlap(Path::new(directory))?,
        ["part", directory] => time::part(Path::new(directory))?,
        ["profile", directory] => time::profile(Path::new(directory))?,
        _ => bail!(
            "steps check | memory | time DIR | mixed DIR | sustained DIR | overlap DIR | part DIR | profile DIR"
        ),
    }
    Ok(ExitCode::SUCCESS)
}
