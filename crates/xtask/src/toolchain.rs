use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{root, run};

/// The compiler that makes the committed kernels: other versions give other bytes.
pub(crate) const VERSION: &str = "13.0.88";

/// NVIDIA's compiler as packages of the Python index. All four are pinned: with a newer libNVVM,
/// ptxas 13.0 refuses its output.
const WHEELS: [&str; 4] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
];

/// An nvcc of [`VERSION`]: the one on the `PATH`, else the packages, installed below `target/` when
/// first needed.
pub(crate) fn nvcc() -> Result<PathBuf> {
    let folder = root().join("target/cuda-toolchain");
    let installed = folder.join("nvidia/cu13/bin/nvcc");
    if let Some(found) = ["nvcc".into(), installed.clone()]
        .into_iter()
        .find(is_right_version)
    {
        return Ok(found);
    }
    eprintln!("installing nvcc {VERSION} into target/cuda-toolchain");
    let python = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-compile",
    ];
    run(Command::new("python3")
        .args(python)
        .args(["--disable-pip-version-check", "--upgrade", "--target"])
        .arg(&folder)
        .args(WHEELS))
    .context("nvcc comes as Python packages; python3 with pip is needed to install them")?;
    anyhow::ensure!(
        is_right_version(&installed),
        "{} does not run as nvcc {VERSION}",
        installed.display()
    );
    Ok(installed)
}

fn is_right_version(nvcc: &PathBuf) -> bool {
    let version = run(Command::new(nvcc).arg("--version"));
    version.is_ok_and(|text| text.contains(&format!("V{VERSION}")))
}
