mod small;

use std::ops::Range;
use std::thread;

use half::bf16;
use spate_types::BlockId;

use super::kv::Row;
use super::lab::{Lab, Report, distance};
use crate::CudaError;
use crate::driver::{Device, Slice};
use crate::kernels::{
    ALL_BLOCKS, Attention, AttentionModel, AttentionStep, DecodeScratch, DecodeWork, Embed,
    KvDtype, KvShape, Path, Sequence, UnpackBlocks,
};

pub(super) use small::small;

/// Weights and outputs rounded to bfloat16.
const LIMIT: f64 = 6e-3;

pub(super) const DTYPES: [(KvDtype, &str); 3] = [
    (KvDtype::Bf16, ""),
    (KvDtype::Int8, " int8"),
    (KvDtype::Fp8, " fp8"),
];
/// The cache's part that kernels may read but that is nobody's.
const BEHIND: usize = 64;
/// Lengths that a case's sequences stay below: of one split of positions, of a few, of many.
const LONGEST: [usize; 6] = [40, 200, 200, 700, 1400, 2200];

/// Sequences that share blocks: how many at most, and how long.
const SHARERS: usize = 10;
const LONGEST_SHARED: usize = 3300;

/// Single tokens of a decode step; of one whose sequences share blocks.
const DECODES: usize = 30;
const SHARED_DECODES: usize = 60;
const MAX_WORKS: usize = 1024;

const LAYERS: usize = 2;
const LAYER: usize = 1;

pub(super) fn paths(device: &Device) -> Vec<(Path, &'static str)> {
    let mut paths = vec![(Path::Portable, "mma.sync")];
    if Path::best(device) == Path::Hopper {
        paths.push((Path::Hopper, "wgmma"));
    }
    paths
}

/// Heads of `HEAD_DIM` elements.
pub(super) fn attention<const HEAD_DIM: u32>(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let (mut reports, paths) = (Vec::new(), paths(lab.device()));
    for (dtype, dtype_name) in DTYPES {
        let mut found: Vec<Found> = paths.iter().map(|_| Found::default()).collect();
        for longest in LONGEST {
            let case = Case::random(lab, dtype, HEAD_DIM, longest);
            let expected = case.expected();
            for ((path, _), found) in paths.iter().zip(&mut found) {
                lab.clear()?;
                check(lab, *path, &case, &expected, found)?;
            }
        }
        let count = 2 + lab.below(SHARERS - 1);
        let shared = Case::sharing(lab, dtype, HEAD_DIM, count, LONGEST_SHARED);
        for ((path, _), found) in paths.iter().zip(&mut found) {
            lab.clear()?;
            check_sharing(lab, *path, &shared, found)?;
        }
        for ((_, name), found) in paths.iter().zip(&found) {
            let name = |what: &str| format!("attention {HEAD_DIM}{dtype_name} ({name}), {what}");
            reports.push(lab.report(&name("prefill"), &found.prefill, LIMIT));
            reports.push(lab.report(&name("decode"), &found.decode, LIMIT));
            reports.push(lab.report(&name("same bits"), &found.differing, 0.0));
        }
    }
    Ok(reports)
}

/// What the cases of a head size showed.
#[derive(Default)]
struct Found {
    prefill: Vec<f64>,
    decode: Vec<f64>,
    /// Shares of rows whose bits depend on what they must not depend on.
    differing: Vec<f64>,
}

/// A model, some sequences, and where their blocks lie.
#[derive(Clone)]
struct Case {
    seed: u64,
    model: AttentionModel,
    /// Keys and values are numbers that this shape's format has.
    values: KvShape,
    window: Option<u32>,
    lengths: Vec<u32>,
    tables: Vec<Vec<u32>>,
    /// Of each sequence, another one before it and how many of its first positions are that one's.
    prefixes: Vec<(usize, u32)>,
}

#[derive(Clone, Copy)]
enum What {
    Query,
    Key,
    Value,
}

impl Case {
    fn random(lab: &mut Lab, dtype: KvDtype, head_dim: u32, longest: usize) -> Self {
        let count = 1 + lab.below(3);
        let case = Self::sharing(lab, dtype, head_dim, count, longest);
        Self {
            window: (lab.below(2) == 0).then(|| 1 + lab.below(longest) as u32),
            ..case
        }
    }

    /// Sequences of which many share their first blocks with others.
    fn sharing(lab: &mut Lab, dtype: KvDtype, head_dim: u32, count: usize, longest: usize) -> Self {
        let kv_heads = lab.pick(&[1, 2, 3]);
        let block_size = lab.pick(&[16, 16, 32, 48, 64, 128, 256]);
        let lengths: Vec<u32> = (0..count).map(|_| 1 + lab.below(longest) as u32).collect();
        let prefixes = (0..count).map(|i| {
            let (of, alone) = (lab.below(i), i == 0 || lab.below(4) == 0);
            let blocks = lengths[i].min(lengths[of]) / block_size;
            // Often all they can.
            let shared = (lab.below(2 * blocks as usize + 1) as u32).min(blocks);
            (of, if alone { 0 } else { shared * block_size })
        });
        let prefixes = prefixes.collect();
        let group = lab.pick(&[1, 2, 3, 4, 5, 7, 8, 16, 20]);
        let shape = KvShape::new(dtype, 0, kv_heads, block_size, head_dim);
        let mut case = Self::new(lab, shape, group, lengths, prefixes);
        case.model.softcap = (lab.below(4) == 0).then_some(20.0);
        case
    }

    /// Sequences of these lengths and [prefixes](Self::prefixes); `group` query heads per key/value head of `shape`.
    fn new(
        lab: &mut Lab,
        shape: KvShape,
        group: u32,
        lengths: Vec<u32>,
        prefixes: Vec<(usize, u32)>,
    ) -> Self {
        let in_blocks = |n: &u32| n.div_ceil(shape.block_size);
        // Some blocks are nobody's.
        let blocks = lengths.iter().map(in_blocks).sum::<u32>() + 3;
        let mut free: Vec<u32> = (0..blocks).collect();
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for (length, (of, shared)) in lengths.iter().zip(&prefixes) {
            let shared = (shared / shape.block_size) as usize;
            let mut table = tables.get(*of).map_or(Vec::new(), |t| t[..shared].to_vec());
            while table.len() < in_blocks(length) as usize {
                table.push(free.swap_remove(lab.below(free.len())));
            }
            tables.push(table);
        }
        let shape = shape.with(shape.dtype(), blocks);
        Self {
            seed: lab.random(),
            values: shape,
            model: AttentionModel {
                heads: shape.kv_heads * group,
                shape,
                scale: (shape.head_dim as f32).powf(-0.5),
                softcap: None,
            },
            window: None,
            lengths,
            tables,
            prefixes,
        }
    }

    fn width(&self) -> usize {
        (self.model.heads * self.model.shape.head_dim) as usize
    }

    /// The same with a cache of bfloat16.
    fn twin(&self) -> Self {
        let (mut twin, shape) = (self.clone(), self.model.shape);
        twin.model.shape = shape.with(KvDtype::Bf16, shape.blocks);
        twin
    }

    /// A head's vector at a position: the same whenever it is asked for.
    fn vector(&self, what: What, sequence: usize, position: u32, head: u32) -> Vec<bf16> {
        let random = self.random_vector(what, sequence, position, head);
        match (what, self.values.dtype()) {
            (What::Query, _) | (_, KvDtype::Bf16) => random,
            (_, dtype) => {
                let values = self.row(&random).values(dtype);
                values.into_iter().map(bf16::from_f64).collect()
            }
        }
    }

    fn row(&self, vector: &[bf16]) -> Row {
        let vector: Vec<f64> = vector.iter().map(|x| x.to_f64()).collect();
        Row::new(&self.values, &vector)
    }

    fn random_vector(&self, what: What, sequence: usize, position: u32, head: u32) -> Vec<bf16> {
        let mut sequence = sequence;
        while position < self.prefixes[sequence].1 {
            sequence = self.prefixes[sequence].0;
        }
        let mut state = self.seed;
        for part in [what as u64, sequence as u64, position.into(), head.into()] {
            state = mix(state ^ part);
        }
        // Scores of a few units, so that some positions weigh much more than others.
        let range = if matches!(what, What::Query) {
            6.0
        } else {
            1.0
        };
        (0..self.model.shape.head_dim)
            .map(|_| {
                state = mix(state);
                bf16::from_f64(((state >> 11) as f64 / (1u64 << 52) as f64 - 1.0) * range)
            })
            .collect()
    }

    /// The cache: not a number wherever no sequence has a position.
    fn cache(&self) -> Vec<u8> {
        let shape = self.model.shape;
        let KvShape {
            kv_heads,
            block_size,
            ..
        } = shape;
        let mut cache = vec![0xff; LAYERS * shape.layer_bytes() + BEHIND];
        for (sequence, length) in self.lengths.iter().enumerate() {
            for position in self.prefixes[sequence].1..*length {
                let block = self.tables[sequence][(position / block_size) as usize] as usize;
                let block = LAYER * shape.layer_bytes() + block * shape.block_bytes();
                let offset = (position % block_size) as usize;
                for (half, what) in [What::Key, What::Value].into_iter().enumerate() {
                    for head in 0..kv_heads {
                        let at = (half * kv_heads as usize + head as usize) * shape.tile_bytes();
                        let tile = &mut cache[block + at..][..shape.tile_bytes()];
                        if shape.is_packed() {
                            let x = self.random_vector(what, sequence, position, head);
                            self.row(&x).write(&shape, tile, offset);
                            continue;
                        }
                        let x = self.vector(what, sequence, position, head);
                        let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
                        tile[offset * bytes.len()..][..bytes.len()].copy_from_slice(&bytes);
                    }
                }
            }
        }
        cache
    }

    /// Positions whose outputs are compared: all of a short sequence, of a long one some, and those where
    /// splits of positions meet.
    fn compared(&self, sequence: usize) -> Vec<u32> {
        let length = self.lengths[sequence];
        let step = length.div_ceil(60);
        let meet = (256..length).step_by(256).flat_map(|p| [p - 1, p]);
        let some = (0..length).step_by(step as usize);
        let mut positions: Vec<u32> = some.chain(meet).chain([length - 1]).collect();
        positions.sort_unstable();
        positions.dedup();
        positions
    }

    /// In float64, for each sequence the compared positions' outputs.
    fn expected(&self) -> Vec<Vec<Vec<f64>>> {
        let kv_heads = self.model.shape.kv_heads;
        let sequences = 0..self.lengths.len();
        let read = parallel(sequences.clone(), 0..kv_heads, &|sequence, head| {
            [What::Key, What::Value].map(|what| self.vectors(what, sequence, head))
        });
        let heads = parallel(sequences.clone(), 0..self.model.heads, &|sequence, head| {
            let kv_head = head * kv_heads / self.model.heads;
            let [keys, values] = &read[sequence][kv_head as usize];
            self.expected_of(sequence, head, keys, values)
        });
        let outputs = sequences.map(|sequence| {
            let positions = 0..self.compared(sequence).len();
            let row = |at: usize| {
                heads[sequence]
                    .iter()
                    .flat_map(move |head| head[at].clone())
            };
            positions.map(|at| row(at).collect()).collect()
        });
        outputs.collect()
    }

    fn vectors(&self, what: What, sequence: usize, head: u32) -> Vec<Vec<f64>> {
        let positions = 0..self.lengths[sequence];
        let vector = |position| self.vector(what, sequence, position, head);
        let wide = |vector: Vec<bf16>| vector.iter().map(|x| x.to_f64()).collect();
        positions.map(vector).map(wide).collect()
    }

    /// One head's outputs.
    fn expected_of(
        &self,
        sequence: usize,
        head: u32,
        keys: &[Vec<f64>],
        values: &[Vec<f64>],
    ) -> Vec<Vec<f64>> {
        let positions = self.compared(sequence).into_iter();
        let outputs = positions.map(|position| {
            let query = self.vector(What::Query, sequence, position, head);
            let query: Vec<f64> = query.iter().map(|x| x.to_f64()).collect();
            let from = (position + 1).saturating_sub(self.window.unwrap_or(u32::MAX));
            let seen = from as usize..position as usize + 1;
            self.attend(&query, &keys[seen.clone()], &values[seen])
        });
        outputs.collect()
    }

    fn attend(&self, query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
        let score = |key: &Vec<f64>| {
            let dot: f64 = key.iter().zip(query).map(|(k, q)| k * q).sum();
            let score = dot * f64::from(self.model.scale);
            match self.model.softcap.map(f64::from) {
                Some(cap) => cap * (score / cap).tanh(),
                None => score,
            }
        };
        let scores: Vec<f64> = keys.iter().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut out = vec![0.0; query.len()];
        for (weight, value) in weights.iter().zip(values) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight / sum * value;
            }
        }
        out
    }
}

/// What `of` gives for each sequence and head.
fn parallel<T: Send>(
    sequences: Range<usize>,
    heads: Range<u32>,
    of: &(impl Fn(usize, u32) -> T + Sync),
) -> Vec<Vec<T>> {
    thread::scope(|scope| {
        let start = |sequence| {
            let heads = heads.clone();
            heads
                .map(|head| scope.spawn(move || of(sequence, head)))
                .collect::<Vec<_>>()
        };
        let works: Vec<_> = sequences.map(start).collect();
        let join = |work: thread::ScopedJoinHandle<'_, T>| {
            work.join().expect("plain arithmetic doesn't panic")
        };
        let works = works.into_iter();
        works
            .map(|heads| heads.into_iter().map(join).collect())
            .collect()
    })
}

/// SplitMix64's output function.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Tokens of a sequence that one step computes.
#[derive(Clone, Copy)]
struct Chunk {
    sequence: usize,
    position: u32,
    tokens: u32,
}

/// How a step is run.
#[derive(Clone, Copy)]
enum How {
    /// Prompts, then single tokens.
    InTurn,
    /// The same, and splits are read for each sequence by itself.
    Unshared,
    /// Single tokens beside prompts, which so many blocks compute.
    Beside(u32),
}

/// A case on the GPU.
struct Bench<'a> {
    case: &'a Case,
    path: Path,
    cache: Slice<u8>,
    attention: Attention,
    scratch: DecodeScratch,
    gather: Embed,
}

impl<'a> Bench<'a> {
    fn new(lab: &mut Lab, path: Path, case: &'a Case) -> Result<Self, CudaError> {
        let bytes = case.cache();
        let cache = lab.upload(&bytes)?.range(0..bytes.len() - BEHIND);
        let attention = Attention::load(lab.device(), path, case.model, cache)?;
        let scratch = lab.take(|arena| attention.take_scratch(arena, MAX_WORKS))?;
        // SAFETY: the arena is alive.
        unsafe { scratch.reset(&lab.stream)? };
        Ok(Self {
            case,
            path,
            cache,
            attention,
            scratch,
            gather: Embed::load(lab.device())?,
        })
    }

    /// Blocks of a cache of codes as a cache of bfloat16 with one layer.
    fn unpacked(&self, lab: &mut Lab, blocks: Slice<u32>) -> Result<Attention, CudaError> {
        let (model, count) = (self.case.model, blocks.len() as u32);
        let shape = model.shape.with(KvDtype::Bf16, count);
        let out = lab.output::<u8>(shape.layer_bytes())?.slice;
        let kernel = UnpackBlocks::load(lab.device())?;
        // SAFETY: the blocks exist; the arena is alive.
        unsafe { kernel.launch(&lab.stream, &model.shape, self.cache, LAYER, blocks, out)? };
        let model = AttentionModel { shape, ..model };
        Attention::load(lab.device(), self.path, model, out)
    }

    fn prefill(&self, lab: &mut Lab, chunks: &[Chunk]) -> Result<Vec<Vec<bf16>>, CudaError> {
        self.run(lab, chunks, &[], How::InTurn)
    }

    fn decode(&self, lab: &mut Lab, tokens: &[Chunk]) -> Result<Vec<Vec<bf16>>, CudaError> {
        self.run(lab, &[], tokens, How::InTurn)
    }

    /// The outputs of each prompt chunk and each single token, `[tokens, width]`.
    fn run(
        &self,
        lab: &mut Lab,
        prompts: &[Chunk],
        singles: &[Chunk],
        how: How,
    ) -> Result<Vec<Vec<bf16>>, CudaError> {
        let AttentionModel { heads, shape, .. } = self.case.model;
        let (width, row) = (
            self.case.width(),
            ((heads + 2 * shape.kv_heads) * shape.head_dim) as usize,
        );
        let (mut qkv, mut sequences, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in prompts.iter().chain(singles) {
            // Before each, a token that is nobody's.
            qkv.resize(qkv.len() + row, bf16::NAN);
            sequences.push(Sequence {
                token: (qkv.len() / row) as u32,
                tokens: chunk.tokens,
                position: chunk.position,
                table: tables.len() as u32,
            });
            let end = chunk.position + chunk.tokens;
            let blocks = end.div_ceil(shape.block_size) as usize;
            tables.extend(&self.case.tables[chunk.sequence][..blocks]);
            for position in chunk.position..end {
                for head in 0..heads {
                    let query = self
                        .case
                        .vector(What::Query, chunk.sequence, position, head);
                    qkv.extend(query);
                }
                qkv.resize(qkv.len().next_multiple_of(row), bf16::NAN);
            }
        }
        let rows: Vec<u32> = (0..(qkv.len() / row) as u32).collect();
        let (rows, last) = (lab.upload(&rows)?, lab.upload(&[0])?);
        let (source, queries) = (lab.upload(&qkv)?, lab.output(qkv.len())?.slice);
        let out = lab.output::<bf16>(rows.len() * width)?;
        let read = lab.output::<bf16>(rows.len() * width)?;

        let (prompts, singles) = sequences.split_at(prompts.len());
        let prefill = self.prefill_step(lab, prompts, &tables, how)?;
        let decode = self.decode_step(lab, singles, &tables, how)?;
        let (stream, gather) = (&lab.stream, &self.gather);
        // SAFETY: the work is that of the step, whose blocks and tokens exist; the arena is alive.
        unsafe {
            // Kernels before and after, which may overlap with these as in a step.
            gather.launch(stream, rows, last, source, 1.0, row, queries)?;
            match &prefill {
                (_, step) if step.work.is_empty() => {}
                (Some(unpacked), step) => {
                    unpacked.prefill(stream, step, 0, queries, out.slice)?;
                }
                (None, step) => {
                    let attention = &self.attention;
                    attention.prefill(stream, step, LAYER, queries, out.slice)?;
                }
            }
            if !singles.is_empty() {
                let (attention, scratch) = (&self.attention, &self.scratch);
                attention.decode(stream, &decode, scratch, LAYER, queries, out.slice)?;
            }
            gather.launch(stream, rows, last, out.slice, 1.0, width, read.slice)?;
        }
        let (read, mut out) = (lab.read(read)?, lab.read(out)?);
        let rows = |s: &Sequence| s.token as usize * width..(s.token + s.tokens) as usize * width;
        let outs = sequences.iter().map(|s| read[rows(s)].to_vec()).collect();
        for s in &sequences {
            out[rows(s)].fill(bf16::from_bits(POISONED));
        }
        lab.damaged |= out.iter().any(|x| x.to_bits() != POISONED);
        Ok(outs)
    }

    /// The step of prompts, and what they read if the cache has codes.
    fn prefill_step(
        &self,
        lab: &mut Lab,
        prompts: &[Sequence],
        tables: &[u32],
        how: How,
    ) -> Result<(Option<Attention>, AttentionStep), CudaError> {
        let (mut work, window) = (Vec::new(), self.case.window);
        self.attention
            .tiling()
            .prefill_work(prompts, window, &mut work);
        let blocks = match how {
            How::Beside(blocks) => blocks,
            _ => ALL_BLOCKS,
        };
        let mut step = AttentionStep {
            tables: lab.upload(tables)?,
            work: lab.upload(&work)?,
            works: lab.upload(&[work.len() as u32, blocks])?,
            sharers: Slice::null(),
            window,
            beside: false,
        };
        let mut unpacked = None;
        if !prompts.is_empty() && self.case.model.shape.is_packed() {
            unpacked = Some(self.unpacked(lab, step.tables)?);
            step.tables = lab.upload(&(0..tables.len() as u32).collect::<Vec<_>>())?;
        }
        Ok((unpacked, step))
    }

    fn decode_step(
        &self,
        lab: &mut Lab,
        singles: &[Sequence],
        tables: &[u32],
        how: How,
    ) -> Result<AttentionStep, CudaError> {
        let (mut list, window) = (DecodeWork::default(), self.case.window);
        // Work is planned by these ids.
        let ids: Vec<BlockId> = match how {
            How::Unshared => (0..tables.len() as u32).map(BlockId).collect(),
            _ => tables.iter().copied().map(BlockId).collect(),
        };
        let decodes: Vec<_> = singles
            .iter()
            .map(|s| (*s, &ids[s.table as usize..]))
            .collect();
        self.attention
            .tiling()
            .decode_work(&decodes, window, &mut list);
        Ok(AttentionStep {
            tables: lab.upload(tables)?,
            work: lab.upload(&list.work)?,
            works: lab.upload(&[list.work.len() as u32, ALL_BLOCKS])?,
            sharers: lab.upload(&list.sharers)?,
            window,
            beside: matches!(how, How::Beside(_)),
        })
    }
}

/// An output that was not written.
const POISONED: u16 = 0xffff;

fn check(
    lab: &mut Lab,
    path: Path,
    case: &Case,
    expected: &[Vec<Vec<f64>>],
    found: &mut Found,
) -> Result<(), CudaError> {
    let width = case.width();
    let bench = Bench::new(lab, path, case)?;
    let whole: Vec<Chunk> = (0..case.lengths.len())
        .map(|sequence| Chunk {
            sequence,
            position: 0,
            tokens: case.lengths[sequence],
        })
        .collect();
    let together = bench.prefill(lab, &whole)?;
    let row =
        |sequence: usize, position: u32| &together[sequence][position as usize * width..][..width];
    for (sequence, expected) in expected.iter().enumerate() {
        for (position, expected) in case.compared(sequence).into_iter().zip(expected) {
            found
                .prefill
                .push(distance(row(sequence, position), expected));
        }
    }

    for chunk in &whole {
        let mut chunked = Vec::new();
        let mut position = 0;
        while position < chunk.tokens {
            let tokens = 1 + lab.below((chunk.tokens - position) as usize) as u32;
            let part = Chunk {
                position,
                tokens,
                ..*chunk
            };
            chunked.extend(bench.prefill(lab, &[part])?.concat());
            position += tokens;
        }
        found
            .differing
            .push(differing(&chunked, &together[chunk.sequence], width));
    }

    let (mut tokens, mut wanted) = (Vec::new(), Vec::new());
    for _ in 0..DECODES {
        let sequence = lab.below(case.lengths.len());
        let compared = case.compared(sequence);
        // Often the last: it sees most.
        let at = (lab.below(3 * compared.len() / 2)).min(compared.len() - 1);
        tokens.push(Chunk {
            sequence,
            position: compared[at],
            tokens: 1,
        });
        wanted.push(&expected[sequence][at]);
    }
    let batched = bench.decode(lab, &tokens)?;
    for ((token, out), wanted) in tokens.iter().zip(&batched).zip(wanted) {
        found.decode.push(distance(out, wanted));
        if path == Path::Hopper {
            let prefilled = row(token.sequence, token.position);
            found.differing.push(differing(out, prefilled, width));
        }
    }
    if case.model.shape.is_packed() {
        let case = case.twin();
        let twin = Bench::new(lab, path, &case)?;
        let decoded = twin.decode(lab, &tokens)?.concat();
        let prefilled = twin.prefill(lab, &whole)?.concat();
        let pairs = [(decoded, batched.concat()), (prefilled, together.concat())];
        let differ = pairs.map(|(twin, packed)| differing(&twin, &packed, width));
        found.differing.extend(differ);
    }
    for (token, batched) in tokens.iter().zip(&batched).take(4) {
        let alone = bench.decode(lab, &[*token])?;
        found.differing.push(differing(&alone[0], batched, width));
    }
    tokens.reverse();
    let mut reversed = bench.decode(lab, &tokens)?;
    reversed.reverse();
    found
        .differing
        .push(differing(&reversed.concat(), &batched.concat(), width));
    Ok(())
}

/// Of sequences that share blocks: that reading a split once for several, and single tokens beside prompts,
/// changes no bit.
fn check_sharing(
    lab: &mut Lab,
    path: Path,
    case: &Case,
    found: &mut Found,
) -> Result<(), CudaError> {
    let width = case.width();
    let bench = Bench::new(lab, path, case)?;
    let token = |lab: &mut Lab| {
        let sequence = lab.below(case.lengths.len());
        let length = case.lengths[sequence];
        // The last of a split, or any; mostly the sequence's last.
        let position = match lab.below(6) {
            0 => (1 + lab.below(length as usize) as u32).next_multiple_of(1024) - 1,
            1 => lab.below(length as usize) as u32,
            _ => length - 1,
        };
        Chunk {
            sequence,
            position: position.min(length - 1),
            tokens: 1,
        }
    };
    let tokens: Vec<Chunk> = (0..SHARED_DECODES).map(|_| token(lab)).collect();
    let shared = bench.decode(lab, &tokens)?.concat();
    let unshared = bench.run(lab, &[], &tokens, How::Unshared)?.concat();
    found.differing.push(differing(&shared, &unshared, width));

    let mut prompts = Vec::new();
    for sequence in 0..case.lengths.len().min(3) {
        let position = lab.below(case.lengths[sequence] as usize) as u32;
        let tokens = (case.lengths[sequence] - position).min(300);
        prompts.push(Chunk {
            sequence,
            position,
            tokens,
        });
    }
    let mut in_turn = bench.prefill(lab, &prompts)?.concat();
    for some in [&tokens[..], &tokens[..1]] {
        let blocks = lab.pick(&[1, 7, 66, ALL_BLOCKS]);
        let beside = bench.run(lab, &prompts, some, How::Beside(blocks))?;
        in_turn.extend(&shared[..some.len() * width]);
        let beside = beside.concat();
        found.differing.push(differing(&beside, &in_turn, width));
        in_turn.truncate(in_turn.len() - some.len() * width);
    }
    Ok(())
}

/// Share of rows whose bits differ.
fn differing(a: &[bf16], b: &[bf16], width: usize) -> f64 {
    assert_eq!(a.len(), b.len());
    let bits = |x: &[bf16]| x.iter().map(|x| x.to_bits()).collect::<Vec<u16>>();
    let rows = a.chunks(width).zip(b.chunks(width));
    let differ = rows.filter(|(a, b)| bits(a) != bits(b)).count();
    (differ * width) as f64 / a.len() as f64
}
