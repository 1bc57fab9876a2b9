//! How fast weights reach the GPU: `load MODEL_DIRECTORY [SHARDS_DIRECTORY]`.
//!
//! The model directory needs only a `config.json`. Loads random weights of that shape; with a second
//! directory, first writes them there as safetensors shards in bfloat16, whose copies in the page cache
//! it then loads, too. Without a GPU it says so and passes.

#[path = "common/device.rs"]
mod device;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use spate_cuda::{CudaConfig, CudaExecutor, KvDtype, Overlap};
use spate_model::{Checkpoint, DummyModel, HfDirectory, HfModel, TensorInfo};

/// Tensors of a shard.
const SHARD: usize = 12;

fn main() -> Result<()> {
    if device::first()?.is_none() {
        return Ok(());
    }
    let mut args = std::env::args_os().skip(1);
    let config = args
        .next()
        .context("usage: load MODEL_DIRECTORY [SHARDS_DIRECTORY]")?;
    let directory = HfDirectory::open(Path::new(&config))?;
    let dummy = DummyModel::new(&directory, 1)?;
    report("random weights", &dummy)?;
    if let Some(to) = args.next() {
        let start = Instant::now();
        write_shards(&dummy, Path::new(&config), Path::new(&to))?;
        println!("written in {:.1?}", start.elapsed());
        let directory = HfDirectory::open(Path::new(&to))?;
        let model = HfModel::open(&directory)?;
        for _ in 0..2 {
            report("safetensors", &model)?;
        }
    }
    Ok(())
}

fn report(what: &str, model: &dyn Checkpoint) -> Result<()> {
    let config = CudaConfig {
        kv_dtype: KvDtype::Bf16,
        device: 0,
        block_size: 16,
        kv_cache_bytes: Some(1 << 30),
        memory_utilization: 0.9,
        max_seq_len: 4096,
        slots: 16,
        max_batch_tokens: 2048,
        overlap: Overlap::Off,
        graphs: false,
    };
    let bytes: usize = model.tensors().iter().map(|t| t.bytes).sum();
    let start = Instant::now();
    let (mut first, mut last) = (Duration::ZERO, Duration::ZERO);
    let executor = CudaExecutor::load(model, &config, &mut |_| {
        last = start.elapsed();
        if first.is_zero() {
            first = last;
        }
    })?;
    let total = start.elapsed();
    let gib = bytes as f64 / 1e9;
    println!(
        "{what}: {gib:.1} GB in {last:.2?} ({:.1} GB/s; first part after {first:.2?}), ready after \
         {total:.2?}, resident {} MiB, at most {} MiB",
        gib / last.as_secs_f64(),
        memory("VmRSS:")?,
        memory("VmHWM:")?,
    );
    for format in executor.weight_formats() {
        println!(
            "  {} quantised {}: {} MiB",
            format.file,
            format.quantized,
            format.bytes >> 20
        );
    }
    Ok(())
}

/// MiB of this process.
fn memory(key: &str) -> Result<u64> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib
        .context("the kernel says how much memory is used")?
        .parse::<u64>()?
        >> 10)
}

/// Writes all tensors under their names in Llama's checkpoints.
fn write_shards(model: &DummyModel, config: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    fs::copy(config.join("config.json"), to.join("config.json"))?;
    let shards: Vec<&[TensorInfo]> = model.tensors().chunks(SHARD).collect();
    let name = |i: usize| format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
    let mut map = serde_json::Map::new();
    for (i, shard) in shards.iter().enumerate() {
        for tensor in *shard {
            map.insert(hf_name(&tensor.name)?, name(i).into());
        }
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(to.join("model.safetensors.index.json"), index.to_string())?;
    thread::scope(|scope| {
        let writers: Vec<_> = shards
            .iter()
            .enumerate()
            .map(|(i, shard)| scope.spawn(move || write_shard(model, shard, &to.join(name(i)))))
            .collect();
        let mut results = writers
            .into_iter()
            .map(|w| w.join().expect("writers don't panic"));
        results.try_for_each(|result| result)
    })
}

fn write_shard(model: &DummyModel, tensors: &[TensorInfo], path: &Path) -> Result<()> {
    const PIECE: usize = 4 << 20;
    let mut header = serde_json::Map::new();
    let mut offset = 0;
    for tensor in tensors {
        let shape: Vec<u64> = tensor.dims.iter().rev().copied().collect();
        let dtype = tensor.ggml_type.to_string();
        let end = offset + tensor.bytes;
        let entry =
            serde_json::json!({ "dtype": dtype, "shape": shape, "data_offsets": [offset, end] });
        header.insert(hf_name(&tensor.name)?, entry);
        offset = end;
    }
    let header = serde_json::to_vec(&header)?;
    let mut file = BufWriter::with_capacity(PIECE, File::create(path)?);
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut piece = vec![0; PIECE];
    for tensor in tensors {
        for start in (0..tensor.bytes).step_by(PIECE) {
            let len = PIECE.min(tensor.bytes - start);
            model.read_at(tensor, start, &mut piece[..len])?;
            file.write_all(&piece[..len])?;
        }
    }
    Ok(file.flush()?)
}

fn hf_name(name: &str) -> Result<String> {
    const MODULES: [(&str, &str); 9] = [
        ("attn_norm", "input_layernorm"),
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.o_proj"),
        ("ffn_norm", "post_attention_layernorm"),
        ("ffn_gate", "mlp.gate_proj"),
        ("ffn_up", "mlp.up_proj"),
        ("ffn_down", "mlp.down_proj"),
    ];
    Ok(match name {
        "token_embd.weight" => "model.embed_tokens.weight".into(),
        "output_norm.weight" => "model.norm.weight".into(),
        "output.weight" => "lm_head.weight".into(),
        _ => {
            let parts: Vec<&str> = name.split('.').collect();
            let module = |short: &str| MODULES.iter().find(|(gguf, _)| *gguf == short);
            ensure!(parts.len() == 4, "tensor {name} is not one of Llama's");
            let (_, long) = module(parts[2]).with_context(|| format!("Llama has no {name}"))?;
            format!("model.layers.{}.{long}.{}", parts[1], parts[3])
        }
    })
}
