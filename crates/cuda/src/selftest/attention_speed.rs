use std::cell::Cell;

use spate_types::BlockId;

use super::attention::{DTYPES, paths};
use super::lab::{Lab, Report};
use crate::CudaError;
use crate::driver::Slice;
use crate::kernels::{
    ALL_BLOCKS, Attention, AttentionModel, AttentionStep, DecodeWork, KvDtype, KvShape, Path,
    Sequence, UnpackBlocks,
};

/// What a timed step computes.
#[derive(Clone, Copy)]
struct Load {
    /// Heads, key/value heads, head size.
    model: [u32; 3],
    /// How many, tokens in the cache, new tokens of each.
    prompts: [u32; 3],
    /// How many, tokens in the cache.
    decodes: [u32; 2],
    /// How many of the decoding sequences share their first positions, and how many positions.
    shared: [u32; 2],
    /// Whether these and prompts run side by side.
    beside: bool,
}

const LLAMA: [u32; 3] = [32, 8, 128];

const fn prefill(model: [u32; 3], prompts: [u32; 3]) -> Load {
    Load {
        model,
        prompts,
        decodes: [0, 0],
        shared: [0, 0],
        beside: false,
    }
}

const fn decode(model: [u32; 3], decodes: [u32; 2]) -> Load {
    Load {
        decodes,
        ..prefill(model, [0, 0, 0])
    }
}

const fn sharing(decodes: [u32; 2], shared: [u32; 2]) -> Load {
    Load {
        shared,
        ..decode(LLAMA, decodes)
    }
}

const fn mixed(prompts: [u32; 3], decodes: [u32; 2], beside: bool) -> Load {
    Load {
        decodes,
        beside,
        ..prefill(LLAMA, prompts)
    }
}

const PREFILLS: [Load; 8] = [
    prefill(LLAMA, [1, 0, 8192]),
    prefill(LLAMA, [1, 6144, 2048]),
    prefill(LLAMA, [1, 0, 2048]),
    prefill(LLAMA, [8, 0, 512]),
    prefill(LLAMA, [16, 0, 64]),
    prefill([32, 8, 64], [1, 0, 8192]),
    prefill([32, 8, 96], [1, 0, 8192]),
    prefill([16, 4, 256], [1, 0, 8192]),
];
const DECODINGS: [Load; 10] = [
    decode(LLAMA, [1, 127]),
    decode(LLAMA, [1, 1023]),
    decode(LLAMA, [1, 8191]),
    decode(LLAMA, [4, 8191]),
    decode(LLAMA, [16, 8191]),
    decode(LLAMA, [8, 640]),
    decode(LLAMA, [64, 640]),
    decode(LLAMA, [256, 640]),
    decode([32, 8, 64], [16, 8191]),
    decode([16, 4, 256], [16, 8191]),
];
/// A prefix that most sequences have, in steps with and without prompts.
const SHARING: [Load; 6] = [
    sharing([64, 2175], [0, 0]),
    sharing([64, 2175], [51, 2048]),
    sharing([64, 2175], [64, 2048]),
    sharing([16, 8255], [0, 0]),
    sharing([16, 8255], [16, 8192]),
    sharing([2, 8255], [2, 8192]),
];
const MIXED: [Load; 12] = [
    prefill(LLAMA, [1, 512, 192]),
    decode(LLAMA, [64, 640]),
    mixed([1, 512, 192], [64, 640], false),
    mixed([1, 512, 192], [64, 640], true),
    prefill(LLAMA, [1, 512, 512]),
    decode(LLAMA, [256, 640]),
    mixed([1, 512, 512], [256, 640], false),
    mixed([1, 512, 512], [256, 640], true),
    prefill(LLAMA, [1, 6144, 512]),
    decode(LLAMA, [3, 8191]),
    mixed([1, 6144, 512], [3, 8191], false),
    mixed([1, 6144, 512], [3, 8191], true),
];

pub(super) fn throughput(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    speeds(lab, &PREFILLS, DTYPES[0])
}

pub(super) fn packed_throughput(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    // What unpacking adds for prompts.
    let mut reports = speeds(lab, &PREFILLS[..2], DTYPES[1])?;
    reports.extend(speeds(lab, &PREFILLS[..2], DTYPES[2])?);
    Ok(reports)
}

/// Of Hopper's kernels: elsewhere nothing is shared, and steps run in turn.
pub(super) fn shared_throughput(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let mut reports = Vec::new();
    if Path::best(lab.device()) == Path::Hopper {
        for load in SHARING.into_iter().chain(MIXED) {
            reports.push(timed(lab, Path::Hopper, "", KvDtype::Bf16, 16, load)?);
        }
        for load in SHARING {
            reports.push(timed(lab, Path::Hopper, " int8", KvDtype::Int8, 16, load)?);
        }
    }
    Ok(reports)
}

fn speeds(
    lab: &mut Lab,
    prefills: &[Load],
    (dtype, dtype_name): (KvDtype, &str),
) -> Result<Vec<Report>, CudaError> {
    let mut reports = Vec::new();
    for (path, name) in paths(lab.device()) {
        let name = format!("{dtype_name} ({name})");
        for load in prefills.iter().chain(&DECODINGS) {
            reports.push(timed(lab, path, &name, dtype, 16, *load)?);
        }
        for load in [DECODINGS[4], DECODINGS[8]] {
            let name = format!("{name} blocks of 64");
            reports.push(timed(lab, path, &name, dtype, 64, load)?);
        }
    }
    Ok(reports)
}

impl Load {
    fn describe(&self) -> String {
        let [count, past, tokens] = self.prompts;
        let [decodes, positions] = self.decodes;
        let mut parts = Vec::new();
        if count > 0 {
            parts.push(format!("{count}x({past}+{tokens})"));
        }
        if decodes > 0 {
            parts.push(format!("{decodes}x({positions}+1)"));
        }
        let [sharers, shared] = self.shared;
        let how = match (self.beside, sharers) {
            (true, _) => " side by side".into(),
            (_, 0) => String::new(),
            _ => format!(", {sharers} share {shared}"),
        };
        parts.join(" and ") + &how
    }

    /// The sequences of a step, prompts first, and their blocks, of which there are so many.
    fn sequences(&self, lab: &mut Lab, block_size: u32) -> (Vec<Sequence>, Vec<u32>, u32) {
        let [count, past, tokens] = self.prompts;
        let [decodes, positions] = self.decodes;
        let [sharers, shared] = self.shared.map(|n| n as usize);
        let (mut sequences, mut tables, mut used) = (Vec::new(), Vec::new(), 0);
        let mut token = 0;
        for i in 0..count + decodes {
            let (position, tokens) = if i < count {
                (past, tokens)
            } else {
                (positions, 1)
            };
            let table = tables.len();
            let blocks = (position + tokens).div_ceil(block_size) as usize;
            if i > count && ((i - count) as usize) < sharers {
                let first = sequences.last().map_or(0, |s: &Sequence| s.table) as usize;
                tables.extend_from_within(first..first + shared / block_size as usize);
            }
            while tables.len() < table + blocks {
                tables.push(used);
                used += 1;
            }
            sequences.push(Sequence {
                token,
                tokens,
                position,
                table: table as u32,
            });
            token += tokens;
        }
        let mut places: Vec<u32> = (0..used).collect();
        for i in (1..places.len()).rev() {
            places.swap(i, lab.below(i + 1));
        }
        for block in &mut tables {
            *block = places[*block as usize];
        }
        (sequences, tables, used)
    }

    fn operations(&self) -> u64 {
        let [count, past, tokens] = self.prompts.map(u64::from);
        let [heads, _, head_dim] = self.model.map(u64::from);
        4 * count * heads * head_dim * (tokens * past + tokens * (tokens + 1) / 2)
    }

    /// Bytes of keys and values, those of a shared prefix once.
    fn bytes(&self, shape: &KvShape) -> u64 {
        let [decodes, positions] = self.decodes.map(u64::from);
        let [sharers, shared] = self.shared.map(u64::from);
        let positions = decodes * (positions + 1) - sharers.saturating_sub(1) * shared;
        2 * positions * u64::from(shape.kv_heads) * shape.row_bytes() as u64
    }
}

fn timed(
    lab: &mut Lab,
    path: Path,
    name: &str,
    dtype: KvDtype,
    block_size: u32,
    load: Load,
) -> Result<Report, CudaError> {
    /// Several layers in turn: those of the last run are in L2.
    const COLD: usize = 400 << 20;
    lab.clear()?;
    let [heads, kv_heads, head_dim] = load.model;
    let (sequences, tables, blocks) = load.sequences(lab, block_size);
    let shape = KvShape::new(dtype, blocks, kv_heads, block_size, head_dim);
    let layers = COLD.div_ceil(shape.layer_bytes()).min(64);
    let row = (heads + 2 * kv_heads) * head_dim;
    let cache = lab.random_bf16s(layers * shape.layer_bytes() / 2)?.cast();
    let tokens: u32 = sequences.iter().map(|s| s.tokens).sum();
    let qkv = lab.random_bf16s((tokens * row) as usize)?;
    let out = lab.output((tokens * heads * head_dim) as usize)?.slice;
    let model = AttentionModel {
        heads,
        shape,
        scale: (head_dim as f32).powf(-0.5),
        softcap: None,
    };
    let attention = Attention::load(lab.device(), path, model, cache)?;

    let (prompts, decodes) = sequences.split_at(load.prompts[0] as usize);
    let (mut work, mut list) = (Vec::new(), DecodeWork::default());
    attention.tiling().prefill_work(prompts, None, &mut work);
    let ids: Vec<BlockId> = tables.iter().copied().map(BlockId).collect();
    let decodes: Vec<_> = decodes
        .iter()
        .map(|s| (*s, &ids[s.table as usize..]))
        .collect();
    attention.tiling().decode_work(&decodes, None, &mut list);
    let prefill_blocks = match load.beside {
        true => attention.tiling().prefill_blocks(&work, &list.work, None),
        false => ALL_BLOCKS,
    };
    let scratch = lab.take(|arena| attention.take_scratch(arena, list.sharers.len()))?;
    // SAFETY: the arena is alive.
    unsafe { scratch.reset(&lab.stream)? };
    let tables = lab.upload(&tables)?;
    let prefill = AttentionStep {
        tables,
        work: lab.upload(&work)?,
        works: lab.upload(&[work.len() as u32, prefill_blocks])?,
        sharers: Slice::null(),
        window: None,
        beside: false,
    };
    let decode = AttentionStep {
        tables,
        work: lab.upload(&list.work)?,
        works: lab.upload(&[list.work.len() as u32, ALL_BLOCKS])?,
        sharers: lab.upload(&list.sharers)?,
        window: None,
        beside: load.beside,
    };
    // Prompts read bfloat16.
    let unpacked_shape = shape.with(KvDtype::Bf16, shape.blocks);
    let unpacked = match dtype {
        KvDtype::Int8 | KvDtype::Fp8 if !prompts.is_empty() => {
            let memory = lab.output(unpacked_shape.layer_bytes())?.slice;
            let model = AttentionModel {
                shape: unpacked_shape,
                ..model
            };
            let blocks = lab.upload(&(0..shape.blocks).collect::<Vec<_>>())?;
            let reads = Attention::load(lab.device(), path, model, memory)?;
            Some((UnpackBlocks::load(lab.device())?, reads, memory, blocks))
        }
        _ => None,
    };
    let next = Cell::new(0);
    let time = lab.time(|stream| {
        let layer = next.replace((next.get() + 1) % layers);
        // SAFETY: the step describes what is allocated; the arena is alive.
        unsafe {
            match &unpacked {
                _ if prompts.is_empty() => {}
                Some((kernel, reads, memory, blocks)) => {
                    kernel.launch(stream, &shape, cache, layer, *blocks, *memory)?;
                    reads.prefill(stream, &prefill, 0, qkv, out)?;
                }
                None => attention.prefill(stream, &prefill, layer, qkv, out)?,
            }
            match decodes.is_empty() {
                true => Ok(()),
                false => attention.decode(stream, &decode, &scratch, layer, qkv, out),
            }
        }
    })?;
    let what = format!("attention {head_dim}{name} {}", load.describe());
    let mut report = lab.report(&what, &[], 0.0);
    report.time = Some(time);
    report.operations = (!prompts.is_empty()).then(|| load.operations());
    report.bytes = (!decodes.is_empty()).then(|| load.bytes(&shape));
    Ok(report)
}
