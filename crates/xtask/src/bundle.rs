use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{root, run};

/// Programs of the bundle: package, kind, name.
const PROGRAMS: [(&str, &str, &str); 3] = [
    ("spate", "--bin", "spate"),
    ("spate-cuda", "--example", "kernels"),
    ("spate-cuda", "--example", "oracle"),
];

const SCRIPT: &str = r#"#!/bin/sh
# Tests every kernel, then the whole executor, against the CPU on this machine's GPU. Needs the NVIDIA
# driver and nothing else. Arguments: MODEL.gguf GOLDEN.json, any number of pairs.
set -eu
folder=$(dirname "$0")
"$folder/kernels"
"$folder/oracle" "$@"
"#;

/// Builds release programs and puts them into `folder` with a script that runs the tests.
pub(crate) fn make(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    for (package, kind, name) in PROGRAMS {
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        run(Command::new(cargo).current_dir(root()).args([
            "build",
            "--release",
            "--package",
            package,
            kind,
            name,
        ]))?;
        let target = root().join("target/release");
        let built = match kind {
            "--example" => target.join("examples").join(name),
            _ => target.join(name),
        };
        fs::copy(&built, folder.join(name)).with_context(|| built.display().to_string())?;
    }
    let script = folder.join("run.sh");
    fs::write(&script, SCRIPT)?;
    make_executable(&script)?;
    println!("{}", folder.display());
    Ok(())
}

#[cfg(unix)]
fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    Ok(fs::set_permissions(
        path,
        fs::Permissions::from_mode(0o755),
    )?)
}

#[cfg(not(unix))]
fn make_executable(_: &Path) -> Result<()> {
    Ok(())
}
