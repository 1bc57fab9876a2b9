use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::{root, run};

/// The examples of `spate-cuda` that test a GPU.
const TESTS: [&str; 6] = [
    "kernels",
    "oracle",
    "steps",
    "lost_device",
    "hung_kernel",
    "golden",
];

/// A shape to measure, with random weights.
const SHAPE: &str = "llama-3.1-8b";

/// What `cargo xtask bundle` was asked for.
#[derive(Default)]
pub(crate) struct Options<'a> {
    folder: Option<&'a Path>,
    models: Vec<&'a Path>,
}

impl<'a> Options<'a> {
    pub(crate) fn parse(args: &[&'a str]) -> Result<Self> {
        let mut options = Self::default();
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            match *arg {
                "--model" => {
                    let model = args.next().context("--model needs a file")?;
                    options.models.push(Path::new(*model));
                }
                folder if !folder.starts_with('-') && options.folder.is_none() => {
                    options.folder = Some(Path::new(folder));
                }
                other => bail!("`{other}` is not an option\n{}", crate::USAGE),
            }
        }
        Ok(options)
    }
}

/// Builds release programs and puts them into a folder with models, what these should answer, and a
/// script that tests a machine with all of it.
pub(crate) fn make(options: &Options<'_>) -> Result<()> {
    let default = root().join("bundle");
    let folder = options.folder.unwrap_or(&default);
    let models = folder.join("models");
    fs::create_dir_all(&models).with_context(|| folder.display().to_string())?;

    build(&["--package", "spate", "--bin", "spate"])?;
    build(&["--package", "spate-cuda", "--examples"])?;
    let target = root().join("target/release");
    copy(&target.join("spate"), &folder.join("spate"))?;
    for name in TESTS {
        copy(&target.join("examples").join(name), &folder.join(name))?;
    }
    let shape = folder.join(SHAPE);
    fs::create_dir_all(&shape)?;
    let config = root().join("benches/shapes").join(SHAPE);
    copy(&config.join("config.json"), &shape.join("config.json"))?;
    for model in &options.models {
        let name = model.file_name().context("--model needs a file")?;
        let to = models.join(name);
        copy(model, &to)?;
        if let Some(golden) = golden(model)? {
            copy(&golden, &to.with_extension("json"))?;
        }
    }
    let script = folder.join("run.sh");
    fs::write(&script, include_str!("bundle.sh"))?;
    make_executable(&script)?;
    println!("{}", folder.display());
    Ok(())
}

fn build(what: &[&str]) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(cargo);
    command.current_dir(root()).args(["build", "--release"]);
    run(command.args(what)).map(drop)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let copied = fs::copy(from, to);
    copied.with_context(|| format!("{} to {}", from.display(), to.display()))?;
    Ok(())
}

/// What another engine answered with these weights: the table in `tests/golden/README.md` knows the
/// weights by their SHA-256.
fn golden(model: &Path) -> Result<Option<PathBuf>> {
    let folder = root().join("tests/golden");
    let table = fs::read_to_string(folder.join("README.md"))?;
    let hash = sha256(model)?;
    let line = table.lines().find(|line| line.contains(&hash));
    let name = line.and_then(|line| line.split('|').nth(1));
    Ok(name.map(|name| folder.join(name.trim())))
}

fn sha256(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| path.display().to_string())?;
    let (mut hasher, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        match file.read(&mut buffer)? {
            0 => break,
            n => hasher.update(&buffer[..n]),
        }
    }
    let digest = hasher.finalize();
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
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
