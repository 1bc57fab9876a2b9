//! `spate inspect`: what a model is, what it would take, and whether this machine has that.

use std::collections::BTreeMap;
use std::fmt::Write;

use anyhow::{Result, bail};
use spate_cpu::{CpuConfig, Estimate};
use spate_model::{ModelConfig, TensorInfo};

use crate::backend::cpu_config;
use crate::memory;
use crate::opened::OpenModel;
use crate::resolve::{Cache, Progress, Reference, resolve};
use crate::settings::units::{format_size, parse_size};
use crate::settings::{SettingFlags, Settings, Sizes};

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
    sequences: u64,
    tokens: u64,
}

/// Prints the report.
pub(crate) fn run(args: &InspectArgs) -> Result<()> {
    let settings = args.settings.load()?.settings;
    let reference = Reference::parse(&settings.model)?;
    let resolved = resolve(&reference, &Cache::from_env()?, &mut Progress::to_people())?;
    let model = OpenModel::open(&resolved.path, settings.load_format)?;
    let config = model.checkpoint().config()?;
    let load = args.load(&settings, &config)?;
    let estimate = Estimate::new(
        model.checkpoint(),
        &CpuConfig {
            // Of any size: a block's is asked for.
            kv_cache_bytes: u64::MAX,
            ..cpu_config(&settings)?
        },
    )?;
    let mut text = describe(&resolved.name, &model, &config);
    let block_size = Sizes::on_cpu(&settings).block_size;
    let needs = Needs::new(&estimate, load, block_size.into());
    needs.describe(&mut text, load, settings.cpu_mode.name());
    text.push_str(&verdict(
        needs,
        load,
        args.memory.or_else(memory::available),
    ));
    print!("{text}");
    Ok(())
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
            sequences: self.concurrency.into(),
            tokens: tokens.into(),
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

/// Bytes of each part.
#[derive(Debug, Clone, Copy)]
struct Needs {
    weights: u64,
    kv_cache: u64,
    activations: u64,
    /// Of the KV cache, for one sequence.
    sequence: u64,
}

impl Needs {
    fn new(estimate: &Estimate, load: Load, block_size: u64) -> Self {
        let blocks = load.tokens.div_ceil(block_size);
        let sequence = estimate.kv_block.saturating_mul(blocks);
        Self {
            weights: estimate.weights,
            kv_cache: sequence.saturating_mul(load.sequences),
            activations: estimate.activations,
            sequence,
        }
    }

    fn total(&self) -> u64 {
        let fixed = self.weights.saturating_add(self.activations);
        fixed.saturating_add(self.kv_cache)
    }

    fn describe(&self, text: &mut String, load: Load, mode: &str) {
        let Load { sequences, tokens } = load;
        let heading = format!("CPU, {mode}: {sequences} sequences of {tokens} tokens");
        let lines = [
            ("memory", heading),
            ("", format!("weights     {:>10}", format_size(self.weights))),
            (
                "",
                format!("KV cache    {:>10}", format_size(self.kv_cache)),
            ),
            (
                "",
                format!("activations {:>10}", format_size(self.activations)),
            ),
            ("", format!("total       {:>10}", format_size(self.total()))),
        ];
        for (name, value) in lines {
            let _infallible = writeln!(text, "{name:<14}{value}");
        }
    }
}

/// Whether it fits, and if not, why and what would.
fn verdict(needs: Needs, load: Load, available: Option<u64>) -> String {
    let total = format_size(needs.total());
    let Some(available) = available else {
        return format!("it needs {total}; this machine does not say how much it has\n");
    };
    let has = format_size(available);
    if needs.total() <= available {
        return format!("fits: it needs {total} of {has}\n");
    }
    let fixed = needs.weights.saturating_add(needs.activations);
    let Some(left) = available.checked_sub(fixed) else {
        let weights = format_size(fixed);
        return format!(
            "does not fit, because the weights and activations alone need {weights}, and there are {has}\n"
        );
    };
    let kv = format_size(needs.kv_cache);
    let advice = match left / needs.sequence {
        0 => {
            let tokens = (u128::from(left) * u128::from(load.tokens)) / u128::from(needs.sequence);
            format!("one sequence of {tokens} tokens would")
        }
        1 => format!("1 sequence of {} tokens would", load.tokens),
        n => format!("{n} sequences of {} tokens would", load.tokens),
    };
    format!(
        "does not fit, because the KV cache needs {kv} and {} are left of {has}; {advice}\n",
        format_size(left)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(sequences: u64, tokens: u64, available: Option<u64>) -> String {
        let estimate = Estimate {
            weights: 100 << 20,
            kv_block: 1 << 20,
            activations: 4 << 20,
        };
        let load = Load { sequences, tokens };
        verdict(Needs::new(&estimate, load, 16), load, available)
    }

    #[test]
    fn verdicts_say_why() {
        let fits = judge(2, 160, Some(124 << 20));
        assert_eq!(fits, "fits: it needs 124 MiB of 124 MiB\n");
        let kv = judge(2, 161, Some(124 << 20));
        assert!(
            kv.contains("the KV cache needs 22.0 MiB and 20.0 MiB are left of 124 MiB"),
            "{kv}"
        );
        assert!(kv.ends_with("1 sequence of 161 tokens would\n"), "{kv}");
        let long = judge(1, 640, Some(124 << 20));
        assert!(
            long.ends_with("one sequence of 320 tokens would\n"),
            "{long}"
        );
        let weights = judge(1, 16, Some(100 << 20));
        assert!(
            weights.contains("weights and activations alone need 104 MiB"),
            "{weights}"
        );
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
