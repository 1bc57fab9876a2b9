//! Chores of this repository that cargo can't do. Run as `cargo xtask <chore>`.

mod bundle;
mod kernels;
mod toolchain;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

const USAGE: &str = "\
cargo xtask kernels [--check] [--report] [NAME…]
    Compiles kernels/*.cu to kernels/prebuilt/*.fatbin: those that changed, or those named.
    --check   compiles all and fails if a byte differs from what is committed; writes nothing
    --report  prints registers, shared memory and spills of each kernel; writes nothing
cargo xtask bundle [DIR] [--model FILE.gguf]…
    Makes a folder (default: bundle/) with spate, the GPU's tests and models, for machines without Rust";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args.as_slice() {
        ["kernels", rest @ ..] => kernels::Options::parse(rest).and_then(|o| kernels::build(&o)),
        ["bundle", rest @ ..] => bundle::Options::parse(rest).and_then(|o| bundle::make(&o)),
        _ => Err(anyhow::anyhow!("{USAGE}")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Runs a command to its end; its output is in the error if it fails.
fn run(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("cannot start {name}"))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{name} failed ({}):\n{text}", output.status);
    }
    Ok(text)
}
