//! `spate inspect`: what a model is, what it would take, and whether this machine has that.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Context, Result, bail};
use spate_cpu::Estimate;
use spate_cuda::{CudaConfig, driver};
use spate_model::{ModelConfig, TensorInfo};

use crate::backend::{cpu_config, cuda_config};
use crate::memory;
use crate::opened::OpenModel;
use crate::resolve::{Cache, Progress, Reference, resolve};
use crate::settings::units::{format_size, parse_size};
use crate::settings::{self, SettingFlags, Settings, Sizes};

/// Show what a model is, what it takes, and whether it fits this machine
#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// Tokens of each sequence, prompt and output [default: max-model-len, or up to 4096]
    #[arg(long, value_name = "TOKENS")]
    context: Option<u32>,
    /// Sequences at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    concurrency: u32,
    /// Memory that may be taken [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    memory: Option<u64>,
    #[command(flatten)]
    settings: SettingFlags,
}

/// Sequences and the length of each.
#[derive(Debug, Clone, Copy)]
struct Load {
    sequences: u32,
    tokens: u32,
}

/// Prints the report.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let settings = args.settings.load()?.settings;
    let reference = Reference::parse(&settings.model)?;
    let resolved = resolve(&reference, &Cache::from_env()?, &mut Progress::to_people())?;
    let model = OpenModel::open(&resolved.path, settings.load_format)?;
    let config = model.checkpoint().config()?;
    let load = args.load(&settings, &config)?;
    let estimate = Estimate::new(model.checkpoint(), &cpu_config(&settings)?)?;
    let block_size = Sizes::on_cpu(&settings).block_size;
    let mut text = describe(&resolved.name, &model, &config);
    describe_needs(
        &mut text,
        &estimate,
        load,
        block_size,
        settings.cpu_mode.name(),
    )?;
    let available = args.memory.or_else(memory::available);
    text.push_str(&verdict(&Needs::of_cpu(&estimate), load, available)?);
    if let Some((number, gpu)) = gpu(settings.device)? {
        let config = cuda_config(&settings, number)?;
        text.push_str(&on_gpu(&model, &config, &gpu, load, args.memory));
    }
    print!("{text}");
    Ok(())
}

/// The GPU that `spate serve` would take.
fn gpu(device: settings::Device) -> Result<Option<(u32, driver::Device)>> {
    Ok(match device {
        settings::Device::Cpu => None,
        settings::Device::Auto => driver::Device::open(0).ok().map(|gpu| (0, gpu)),
        settings::Device::Cuda(number) => Some((number, driver::Device::open(number)?)),
    })
}

/// What it takes on a GPU, and whether that has it.
fn on_gpu(
    model: &OpenModel,
    config: &CudaConfig,
    gpu: &driver::Device,
    load: Load,
    memory: Option<u64>,
) -> String {
    let estimate = spate_cuda::Estimate::new(model.checkpoint(), config);
    let report = estimate.map_err(anyhow::Error::from).and_then(|estimate| {
        let needs = Needs::of_gpu(&estimate);
        let kv = (needs.kv_cache)(load.sequences, load.tokens)?;
        let mut text = String::new();
        let mut line = |name: &str, part: &str, bytes: u64, note: &str| {
            let bytes = format_size(bytes);
            let _infallible = writeln!(text, "{name:<14}{part:<12}{bytes:>10}{note}");
        };
        line("GPU memory", "weights", estimate.weights, "");
        line("", "KV cache", kv, "");
        line("", "activations", estimate.steps, "");
        line("", "driver", estimate.driver, "");
        let note = format!("  on {}", gpu.name());
        line("", "total", needs.fixed.saturating_add(kv), &note);
        let share = gpu.total_bytes() as f64 * f64::from(config.memory_utilization);
        text.push_str(&verdict(&needs, load, memory.or(Some(share as u64)))?);
        Ok(text)
    });
    // Another backend's trouble is no reason to say nothing about this one.
    report.unwrap_or_else(|error| format!("GPU           {error}\n"))
}

/// What a backend takes, in bytes.
struct Needs<'a> {
    /// All but the KV cache.
    fixed: u64,
    /// The KV cache for so many sequences of so many tokens.
    kv_cache: Box<dyn Fn(u32, u32) -> Result<u64> + 'a>,
}

impl<'a> Needs<'a> {
    fn of_cpu(estimate: &'a Estimate) -> Self {
        Self {
            fixed: estimate.weights.saturating_add(estimate.activations),
            kv_cache: Box::new(|sequences, tokens| Ok(estimate.kv_cache(sequences, tokens)?.bytes)),
        }
    }

    fn of_gpu(estimate: &'a spate_cuda::Estimate) -> Self {
        let parts = [estimate.weights, estimate.steps, estimate.driver];
        Self {
            fixed: parts.into_iter().fold(0, u64::saturating_add),
            kv_cache: Box::new(|sequences, tokens| {
                let kv = estimate.kv_cache(sequences, tokens);
                kv.with_context(|| {
                    format!("no KV cache holds {sequences} sequences of {tokens} tokens")
                })
            }),
        }
    }
}

impl InspectArgs {
    fn load(&self, settings: &Settings, config: &ModelConfig) -> Result<Load> {
        let longest = config.context_len.min(u32::MAX as usize) as u32;
        let tokens = self.context.or(settings.max_model_len);
        let tokens = tokens.unwrap_or(longest.min(4096));
        if tokens == 0 || tokens > longest {
            bail!("--context {tokens}: the model was made for 1 to {longest} tokens");
        }
        if self.concurrency == 0 {
            bail!("--concurrency 0: at least one sequence");
        }
        Ok(Load {
            sequences: self.concurrency,
            tokens,
        })
    }
}

fn describe(name: &str, model: &OpenModel, c: &ModelConfig) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: &str| {
        // Writing to a string can't fail.
        let _infallible = writeln!(text, "{name:<14}{value}");
    };
    let checkpoint = model.checkpoint();
    line("model", name);
    line("path", &checkpoint.path().display().to_string());
    line("format", model.format());
    let window = match &c.local {
        Some(local) => {
            let count = local.layers.iter().filter(|local| **local).count();
            format!(", {count} of them see {} tokens", local.window)
        }
        None => String::new(),
    };
    line(
        "architecture",
        &format!("{}, {} layers{window}", c.architecture, c.layers),
    );
    line(
        "",
        &format!(
            "width {}, feed-forward {}, {} heads of {} ({} for keys and values)",
            c.hidden, c.ffn, c.heads, c.head_dim, c.kv_heads
        ),
    );
    line(
        "",
        &format!("vocabulary {}, context {}", c.vocab_size, c.context_len),
    );
    let tensors = checkpoint.tensors();
    let parameters = tensors.iter().map(elements).sum::<u64>();
    line("parameters", &format_count(parameters));
    for (i, kind) in by_type(tensors).iter().enumerate() {
        line(if i == 0 { "tensors" } else { "" }, kind);
    }
    text
}

/// A line for each number format, the one with most bytes first.
fn by_type(tensors: &[TensorInfo]) -> Vec<String> {
    let mut sums: BTreeMap<&str, (usize, u64, u64)> = BTreeMap::new();
    for tensor in tensors {
        let sum = sums.entry(tensor.ggml_type.name()).or_default();
        sum.0 += 1;
        sum.1 += elements(tensor);
        sum.2 += tensor.bytes as u64;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, (_, _, bytes))| std::cmp::Reverse(*bytes));
    let line = |(name, (count, elements, bytes)): &(&str, (usize, u64, u64))| {
        let (elements, bytes) = (format_count(*elements), format_size(*bytes));
        format!("{name:<8}{count:>5} with {elements:>8} parameters in {bytes:>10}")
    };
    sums.iter().map(line).collect()
}

fn elements(tensor: &TensorInfo) -> u64 {
    tensor.dims.iter().product()
}

/// `134.5 M`
fn format_count(n: u64) -> String {
    let (unit, name) = match n {
        1_000_000_000.. => (1e9, " G"),
        1_000_000.. => (1e6, " M"),
        1_000.. => (1e3, " k"),
        _ => return n.to_string(),
    };
    format!("{:.1}{name}", n as f64 / unit)
}

/// The bytes of each part.
fn describe_needs(
    text: &mut String,
    estimate: &Estimate,
    load: Load,
    block_size: u32,
    mode: &str,
) -> Result<()> {
    let Load { sequences, tokens } = load;
    let kv = estimate.kv_cache(sequences, tokens)?;
    let mut line = |name: &str, part: &str, bytes: u64, note: &str| {
        let bytes = format_size(bytes);
        let _infallible = writeln!(text, "{name:<14}{part:<12}{bytes:>10}{note}");
    };
    let pool = |blocks: u32, of: &str| format!("  {blocks} blocks of {block_size} tokens{of}");
    let main = kv.local.map_or("", |_| " in layers that see all");
    line("memory", "weights", estimate.weights, "");
    line("", "KV cache", kv.main.1, &pool(kv.main.0, main));
    if let Some((blocks, bytes)) = kv.local {
        line("", "", bytes, &pool(blocks, " in layers with a window"));
    }
    line("", "activations", estimate.activations, "");
    let note = format!("  on a CPU, {mode}, for {sequences} sequences of {tokens} tokens");
    let total = Needs::of_cpu(estimate).fixed.saturating_add(kv.bytes);
    line("", "total", total, &note);
    Ok(())
}

/// Whether it fits, and if not, why and what would.
fn verdict(needs: &Needs<'_>, load: Load, available: Option<u64>) -> Result<String> {
    let Load { sequences, tokens } = load;
    let kv_bytes = (needs.kv_cache)(sequences, tokens)?;
    let needed = needs.fixed.saturating_add(kv_bytes);
    let Some(available) = available else {
        return Ok(format!(
            "it needs {}; this machine does not say how much it has\n",
            format_size(needed)
        ));
    };
    let has = format_size(available);
    if needed <= available {
        return Ok(format!("fits: it needs {} of {has}\n", format_size(needed)));
    }
    let Some(left) = available.checked_sub(needs.fixed) else {
        return Ok(format!(
            "does not fit, because the weights and activations alone need {}, and there are {has}\n",
            format_size(needs.fixed)
        ));
    };
    let fits = |sequences, tokens| {
        let kv = (needs.kv_cache)(sequences, tokens);
        kv.is_ok_and(|kv| kv <= left)
    };
    let advice = match most(sequences, |n| fits(n, tokens)) {
        0 => match most(tokens, |n| fits(1, n)) {
            0 => "no sequence would".to_owned(),
            n => format!("one sequence of {n} tokens would"),
        },
        1 => format!("1 sequence of {tokens} tokens would"),
        n => format!("{n} sequences of {tokens} tokens would"),
    };
    Ok(format!(
        "does not fit, because the KV cache needs {} and {} are left of {has}; {advice}\n",
        format_size(kv_bytes),
        format_size(left)
    ))
}

/// The largest number up to `limit` that fits, where smaller ones do too; otherwise 0.
fn most(limit: u32, fits: impl Fn(u32) -> bool) -> u32 {
    let (mut good, mut bad) = (0, limit.saturating_add(1));
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        *(if fits(middle) { &mut good } else { &mut bad }) = middle;
    }
    good
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use spate_model::Gguf;
    use spate_model::testing::{TempFile, TinyLlama, tiny_llama};

    /// What is said of a tiny model, whose KV blocks of 16 tokens take 8 KiB, when so much memory is
    /// left for them.
    fn judge(sequences: u32, tokens: u32, left: Option<i64>) -> String {
        let file = TempFile::new(&tiny_llama(&TinyLlama {
            layers: 4,
            ..TinyLlama::default()
        }));
        let gguf = Gguf::open(file.path()).unwrap();
        let config = cpu_config(&Settings::default()).unwrap();
        let estimate = Estimate::new(&gguf, &config).unwrap();
        assert_eq!(estimate.kv_cache(1, 16).unwrap().bytes, 8 << 10);
        let load = Load { sequences, tokens };
        let needs = Needs::of_cpu(&estimate);
        let available = left.map(|left| needs.fixed.checked_add_signed(left).unwrap());
        verdict(&needs, load, available).unwrap()
    }

    #[test]
    fn verdicts_say_why() {
        let fits = judge(2, 160, Some(160 << 10));
        assert!(fits.starts_with("fits: it needs "), "{fits}");
        let kv = judge(2, 161, Some(160 << 10));
        assert!(
            kv.contains("the KV cache needs 176 KiB and 160 KiB are left of "),
            "{kv}"
        );
        assert!(kv.ends_with("1 sequence of 161 tokens would\n"), "{kv}");
        let many = judge(9, 30, Some(127 << 10));
        assert!(many.ends_with("7 sequences of 30 tokens would\n"), "{many}");
        let long = judge(1, 400, Some(160 << 10));
        assert!(
            long.ends_with("one sequence of 320 tokens would\n"),
            "{long}"
        );
        assert!(judge(1, 16, Some(100)).ends_with("no sequence would\n"));
        let weights = judge(1, 16, Some(-1));
        assert!(weights.contains("weights and activations alone need "));
        assert!(judge(1, 16, None).contains("does not say"));
    }

    #[test]
    fn counts_are_readable() {
        for (n, text) in [
            (999, "999"),
            (1_500, "1.5 k"),
            (134_515_008, "134.5 M"),
            (7_241_732_096, "7.2 G"),
        ] {
            assert_eq!(format_count(n), text);
        }
    }
}
