use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::{root, run, toolchain};

/// Machine code for the architectures that we tune for, and portable PTX for all later ones.
const ALL_TARGETS: &[&str] = &[
    "arch=compute_80,code=sm_80",
    "arch=compute_89,code=sm_89",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100,code=sm_100",
    "arch=compute_80,code=compute_80",
];

/// For files named `*_sm90a.cu`: they use instructions that no other architecture has.
const SM90A_TARGETS: &[&str] = &["arch=compute_90a,code=sm_90a"];

const FLAGS: &[&str] = &[
    "--fatbin",
    "--std=c++17",
    "--optimize=3",
    "--compress-mode=size",
    "--Werror=all-warnings",
    "--include-path=include",
];

/// What `cargo xtask kernels` was asked for.
#[derive(Default)]
pub(crate) struct Options {
    check: bool,
    report: bool,
    names: Vec<String>,
}

impl Options {
    pub(crate) fn parse(args: &[&str]) -> Result<Self> {
        let mut options = Self::default();
        for arg in args {
            match *arg {
                "--check" => options.check = true,
                "--report" => options.report = true,
                name if !name.starts_with('-') => options.names.push(name.to_owned()),
                other => bail!("`{other}` is not an option\n{}", crate::USAGE),
            }
        }
        Ok(options)
    }
}

/// Compiles the kernels and writes the manifest; or, with `check`, compares.
pub(crate) fn build(options: &Options) -> Result<()> {
    let folder = &root().join("kernels");
    let prebuilt = folder.join("prebuilt");
    let manifest_path = prebuilt.join("manifest.json");
    let old: Value = match fs::read(&manifest_path) {
        Ok(bytes) => serde_json::from_slice(&bytes).context("kernels/prebuilt/manifest.json")?,
        Err(_) => Value::Null,
    };
    let kernels = find(folder)?;
    for name in &options.names {
        let known = kernels.iter().any(|k| k.name == *name);
        anyhow::ensure!(known, "there is no kernels/{name}.cu");
    }
    let scratch = root().join("target/kernels");
    fs::create_dir_all(&scratch)?;
    let wanted: Vec<&Kernel> = kernels
        .iter()
        .filter(|k| {
            let named = options.names.contains(&k.name);
            let any = options.names.is_empty();
            named || any && (options.check || options.report || k.changed(&old, &prebuilt))
        })
        .collect();
    let fatbins = compile(&wanted, folder, &scratch, options.report)?;
    if options.report {
        return Ok(()); // it is an option of the compiler, and options get into the bytes
    }
    if options.check {
        return check(&kernels, &fatbins, &prebuilt, &old);
    }
    for (name, bytes) in &fatbins {
        fs::write(prebuilt.join(format!("{name}.fatbin")), bytes)?;
    }
    let manifest = manifest(&kernels, &prebuilt)?;
    fs::write(&manifest_path, render(&manifest)?)?;
    remove_strays(&kernels, &prebuilt)?;
    println!(
        "{} compiled, {} up to date",
        wanted.len(),
        kernels.len() - wanted.len()
    );
    Ok(())
}

/// One `.cu` file.
struct Kernel {
    name: String,
    /// Hashes of the file and of every header it includes, by path below `kernels/`.
    sources: BTreeMap<String, String>,
}

impl Kernel {
    fn targets(&self) -> &'static [&'static str] {
        if self.name.ends_with("_sm90a") {
            SM90A_TARGETS
        } else {
            ALL_TARGETS
        }
    }

    /// What decides the fatbin's bytes.
    fn inputs(&self) -> Value {
        json!({ "sources": self.sources, "targets": self.targets() })
    }

    fn changed(&self, manifest: &Value, prebuilt: &Path) -> bool {
        let entry = &manifest["kernels"][&self.name];
        let inputs = self.inputs();
        let same = entry["sources"] == inputs["sources"]
            && entry["targets"] == inputs["targets"]
            && manifest["toolchain"] == toolchain::VERSION
            && manifest["flags"] == json!(FLAGS);
        let fatbin = fs::read(prebuilt.join(format!("{}.fatbin", self.name)));
        !same || fatbin.map_or(true, |bytes| entry["sha256"] != hash(&bytes))
    }
}

fn find(folder: &Path) -> Result<Vec<Kernel>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).context("kernels/")? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "cu") {
            let name = path.file_stem().context("a file without a name")?;
            names.push(name.to_string_lossy().into_owned());
        }
    }
    names.sort();
    let mut kernels = Vec::new();
    for name in names {
        let mut sources = BTreeMap::new();
        add_source(folder, &format!("{name}.cu"), &mut sources)?;
        kernels.push(Kernel { name, sources });
    }
    Ok(kernels)
}

/// Adds a file and, recursively, what it includes in quotes (all of that lies in `include/`).
fn add_source(folder: &Path, path: &str, sources: &mut BTreeMap<String, String>) -> Result<()> {
    if sources.contains_key(path) {
        return Ok(());
    }
    let text = fs::read_to_string(folder.join(path)).with_context(|| format!("kernels/{path}"))?;
    sources.insert(path.to_owned(), hash(text.as_bytes()));
    for line in text.lines() {
        let Some(rest) = line.strip_prefix("#include \"") else {
            continue;
        };
        let header = rest.split('"').next().unwrap_or_default();
        add_source(folder, &format!("include/{header}"), sources)?;
    }
    Ok(())
}

/// Fatbins by name. Files are compiled side by side, one per core.
fn compile(
    kernels: &[&Kernel],
    folder: &Path,
    scratch: &Path,
    report: bool,
) -> Result<BTreeMap<String, Vec<u8>>> {
    if kernels.is_empty() {
        return Ok(BTreeMap::new());
    }
    let nvcc = toolchain::nvcc()?;
    let (next, done) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || -> Result<()> {
        while let Some(kernel) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (bytes, said) = compile_one(&nvcc, kernel, folder, scratch, report)?;
            if report {
                print!("{}", resources(&said));
            }
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.insert(kernel.name.clone(), bytes);
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, |n| n.get());
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            worker
                .join()
                .map_err(|_| anyhow::anyhow!("a compile thread panicked"))??;
        }
        anyhow::Ok(())
    })?;
    Ok(done.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn compile_one(
    nvcc: &Path,
    kernel: &Kernel,
    folder: &Path,
    scratch: &Path,
    report: bool,
) -> Result<(Vec<u8>, String)> {
    let out: PathBuf = fs::canonicalize(scratch)?.join(format!("{}.fatbin", kernel.name));
    let targets = kernel.targets().iter().flat_map(|t| ["--generate-code", t]);
    // Relative names, so that no path of this machine gets into the output.
    let said = run(Command::new(nvcc)
        .current_dir(folder)
        .args(FLAGS)
        .args(targets)
        .args(report.then_some("--resource-usage"))
        .arg("--output-file")
        .arg(&out)
        .arg(format!("{}.cu", kernel.name)))?;
    Ok((fs::read(&out)?, said))
}

/// One line per kernel and architecture out of what ptxas says.
fn resources(said: &str) -> String {
    let (mut out, mut entry, mut spills) = (String::new(), String::new(), "");
    for line in said.lines().map(str::trim) {
        if let Some(rest) = line.split("Compiling entry function ").nth(1) {
            entry = rest.replace('\'', "").replace(" for ", " ");
        } else if line.contains("bytes stack frame") {
            spills = line;
        } else if let Some(used) = line.split("Used ").nth(1) {
            out.push_str(&format!("{entry}: {used}; {spills}\n"));
        }
    }
    out
}

fn manifest(kernels: &[Kernel], prebuilt: &Path) -> Result<Value> {
    let mut entries = serde_json::Map::new();
    for kernel in kernels {
        let file = format!("{}.fatbin", kernel.name);
        let bytes = fs::read(prebuilt.join(&file)).context(file)?;
        let mut entry = kernel.inputs();
        entry["sha256"] = json!(hash(&bytes));
        entry["bytes"] = json!(bytes.len());
        entries.insert(kernel.name.clone(), entry);
    }
    Ok(json!({ "toolchain": toolchain::VERSION, "flags": FLAGS, "kernels": entries }))
}

fn render(manifest: &Value) -> Result<String> {
    Ok(serde_json::to_string_pretty(manifest)? + "\n")
}

/// Fails if the committed files are not what the sources compile to.
fn check(
    kernels: &[Kernel],
    fatbins: &BTreeMap<String, Vec<u8>>,
    prebuilt: &Path,
    old: &Value,
) -> Result<()> {
    let stale: Vec<&str> = fatbins
        .iter()
        .filter(|(name, bytes)| {
            let committed = fs::read(prebuilt.join(format!("{name}.fatbin")));
            committed.map_or(true, |committed| committed != **bytes)
        })
        .map(|(name, _)| name.as_str())
        .collect();
    if !stale.is_empty() {
        bail!(
            "kernels/prebuilt is not what the sources compile to: {}; run `cargo xtask kernels`",
            stale.join(", ")
        );
    }
    if *old != manifest(kernels, prebuilt)? {
        bail!("kernels/prebuilt/manifest.json is out of date; run `cargo xtask kernels`");
    }
    println!(
        "{} kernels: kernels/prebuilt is what the sources compile to",
        fatbins.len()
    );
    Ok(())
}

/// Removes fatbins whose source is gone.
fn remove_strays(kernels: &[Kernel], prebuilt: &Path) -> Result<()> {
    for entry in fs::read_dir(prebuilt)? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let is_fatbin = path.extension().is_some_and(|e| e == "fatbin");
        if is_fatbin && !kernels.iter().any(|k| k.name == name) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn hash(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
