//! Tests the attention kernels on this machine's GPU against float64 on the CPU, and times them.
//!
//! `attention [test] [time] [portable|hopper] [short] [block=N]`: without arguments, everything that the
//! GPU can run. `short` leaves long sequences out (for compute-sanitizer); `block` is the block size of the
//! timings.

#![allow(clippy::unwrap_used, clippy::too_many_arguments)]

use std::time::Duration;

use anyhow::{Result, ensure};
use half::bf16;
use spate_cuda::driver::{Arena, Device, Event, Graph, Plain, Priority, Slice, Stream};
use spate_cuda::kernels::{
    Attention, AttentionModel, AttentionStep, DecodeScratch, KvShape, Path, Sequence, Work,
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wants = |word: &str| arguments.iter().any(|a| a == word);
    let device = match Device::open(0) {
        Ok(device) => device,
        Err(error) => {
            println!("skipped: {error}");
            return Ok(());
        }
    };
    println!("{}", device.name());
    let mut paths = vec![Path::Portable];
    if Path::best(&device) == Path::Hopper {
        paths.push(Path::Hopper);
    }
    if wants("portable") {
        paths = vec![Path::Portable];
    } else if wants("hopper") {
        paths = vec![Path::Hopper];
    }
    let longest: &[u32] = match wants("short") {
        true => &[40, 200],
        false => &[40, 200, 700, 1500, 3300],
    };
    let block = arguments.iter().find_map(|a| a.strip_prefix("block="));
    let block_size = block.map_or(Ok(16), str::parse)?;
    for path in paths {
        if wants("test") || !wants("time") {
            test(&device, path, longest)?;
        }
        if wants("time") || !wants("test") {
            time(&device, path, block_size)?;
        }
    }
    Ok(())
}

/// SplitMix64 (Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: u32) -> u32 {
        (self.next() % u64::from(limit)) as u32
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u32) as usize]
    }
}

/// One of the streams of numbers that a case is made of.
#[derive(Clone, Copy)]
enum What {
    Query,
    Key,
    Value,
}

/// A vector of a position's head, the same whenever it is asked for.
fn vector(case: u64, what: What, sequence: usize, position: u32, head: u32, dim: u32) -> Vec<bf16> {
    let seed = [what as u64, sequence as u64, position.into(), head.into()]
        .iter()
        .fold(case, |seed, x| Random(seed ^ x).next());
    let mut random = Random(seed);
    // Scores of a few units, so that some positions weigh much more than others.
    let scale = if matches!(what, What::Query) {
        6.0
    } else {
        1.0
    };
    (0..dim)
        .map(|_| bf16::from_f32((random.next() >> 40) as f32 / (1 << 23) as f32 * scale - scale))
        .collect()
}

/// A model, some sequences and where their blocks lie.
struct Case {
    seed: u64,
    model: AttentionModel,
    window: Option<u32>,
    lengths: Vec<u32>,
    tables: Vec<Vec<u32>>,
}

const LAYERS: usize = 2;
const LAYER: usize = 1;

impl Case {
    fn new(seed: u64, head_dim: u32, longest: u32) -> Self {
        let random = &mut Random(seed);
        let kv_heads = random.pick(&[1, 2, 3]);
        let group = random.pick(&[1, 2, 3, 4, 5, 7, 8, 16, 20]);
        let block_size = random.pick(&[16, 16, 32, 48, 64, 128, 256]);
        let lengths: Vec<u32> = (0..1 + random.below(4))
            .map(|_| 1 + random.below(longest))
            .collect();
        let blocks: u32 = lengths.iter().map(|n| n.div_ceil(block_size)).sum();
        let pool = blocks + 3;
        let mut free: Vec<u32> = (0..pool).collect();
        let mut take = || free.swap_remove(random.below(free.len() as u32) as usize);
        let tables = lengths
            .iter()
            .map(|n| (0..n.div_ceil(block_size)).map(|_| take()).collect())
            .collect();
        let window = (random.below(2) == 0).then(|| 1 + random.below(longest));
        let softcap = (random.below(4) == 0).then_some(20.0);
        Self {
            seed,
            model: AttentionModel {
                heads: kv_heads * group,
                shape: KvShape {
                    blocks: pool,
                    kv_heads,
                    block_size,
                    head_dim,
                },
                scale: (head_dim as f32).powf(-0.5),
                softcap,
            },
            window,
            lengths,
            tables,
        }
    }

    fn describe(&self) -> String {
        let AttentionModel { heads, shape, .. } = self.model;
        let KvShape {
            kv_heads,
            block_size,
            head_dim,
            ..
        } = shape;
        format!(
            "{heads}/{kv_heads} heads of {head_dim}, blocks of {block_size}, lengths {:?}, window {:?}, \
             softcap {:?}, seed {}",
            self.lengths, self.window, self.model.softcap, self.seed
        )
    }

    /// The cache: NaN wherever no sequence has a position.
    fn cache(&self) -> Vec<bf16> {
        let KvShape {
            kv_heads,
            block_size,
            head_dim,
            ..
        } = self.model.shape;
        let shape = self.model.shape;
        let mut cache = vec![bf16::NAN; LAYERS * shape.layer_len()];
        for (sequence, length) in self.lengths.iter().enumerate() {
            for position in 0..*length {
                let block = self.tables[sequence][(position / block_size) as usize] as usize;
                let block = LAYER * shape.layer_len() + block * shape.block_len();
                for (half, what) in [What::Key, What::Value].into_iter().enumerate() {
                    for head in 0..kv_heads {
                        let row =
                            (half as u32 * kv_heads + head) * block_size + position % block_size;
                        let from = block + (row * head_dim) as usize;
                        let x = vector(self.seed, what, sequence, position, head, head_dim);
                        cache[from..from + x.len()].copy_from_slice(&x);
                    }
                }
            }
        }
        cache
    }

    fn keys_or_values(&self, what: What, sequence: usize, head: u32) -> Vec<Vec<f64>> {
        (0..self.lengths[sequence])
            .map(|position| {
                let x = vector(
                    self.seed,
                    what,
                    sequence,
                    position,
                    head,
                    self.model.shape.head_dim,
                );
                x.iter().map(|x| x.to_f64()).collect()
            })
            .collect()
    }

    /// Positions whose outputs are checked: all of a short sequence, of a long one some and those around
    /// the kernels' splits.
    fn checked(&self, sequence: usize) -> Vec<u32> {
        let length = self.lengths[sequence];
        if length <= 200 {
            return (0..length).collect();
        }
        let mut random = Random(self.seed ^ sequence as u64);
        let splits = (0..length)
            .step_by(256)
            .flat_map(|p| [p, p.saturating_sub(1)]);
        let mut positions: Vec<u32> = (0..64).map(|_| random.below(length)).collect();
        positions.extend(splits.chain([length - 1]));
        positions.sort_unstable();
        positions.dedup();
        positions
    }

    /// The outputs of the checked positions in float64: `[sequence][checked, heads * head_dim]`.
    fn expected(&self) -> Vec<Vec<f64>> {
        let group = self.model.heads / self.model.shape.kv_heads;
        let one = |sequence: usize, kv_head: u32| -> Vec<Vec<f64>> {
            let keys = self.keys_or_values(What::Key, sequence, kv_head);
            let values = self.keys_or_values(What::Value, sequence, kv_head);
            let heads = kv_head * group..(kv_head + 1) * group;
            let position = |p| {
                let attend = |head| self.attend(sequence, p, head, &keys, &values);
                heads.clone().flat_map(attend).collect()
            };
            self.checked(sequence).into_iter().map(position).collect()
        };
        std::thread::scope(|scope| {
            let one = &one;
            let work: Vec<Vec<_>> = (0..self.lengths.len())
                .map(|sequence| {
                    let heads = 0..self.model.shape.kv_heads;
                    heads
                        .map(|head| scope.spawn(move || one(sequence, head)))
                        .collect()
                })
                .collect();
            let sequence = |heads: Vec<std::thread::ScopedJoinHandle<'_, Vec<Vec<f64>>>>| {
                let heads: Vec<_> = heads.into_iter().map(|w| w.join().unwrap()).collect();
                (0..heads[0].len())
                    .flat_map(|p| heads.iter().flat_map(move |h| h[p].clone()))
                    .collect()
            };
            work.into_iter().map(sequence).collect()
        })
    }

    fn attend(
        &self,
        sequence: usize,
        position: u32,
        head: u32,
        keys: &[Vec<f64>],
        values: &[Vec<f64>],
    ) -> Vec<f64> {
        let dim = self.model.shape.head_dim;
        let query = vector(self.seed, What::Query, sequence, position, head, dim);
        let query: Vec<f64> = query.iter().map(|x| x.to_f64()).collect();
        let first = (position + 1).saturating_sub(self.window.unwrap_or(u32::MAX)) as usize;
        let seen = first..position as usize + 1;
        let scores: Vec<f64> = keys[seen.clone()]
            .iter()
            .map(|key| {
                let dot: f64 = key.iter().zip(&query).map(|(k, q)| k * q).sum();
                let score = dot * f64::from(self.model.scale);
                match self.model.softcap.map(f64::from) {
                    Some(cap) => cap * (score / cap).tanh(),
                    None => score,
                }
            })
            .collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let mut out = vec![0.0; dim as usize];
        for (weight, value) in weights.iter().zip(&values[seen]) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight / sum * value;
            }
        }
        out
    }
}

/// A case on the GPU.
struct Bench<'a> {
    case: &'a Case,
    stream: Stream,
    arena: Arena,
    attention: Attention,
    scratch: DecodeScratch,
}

/// Tokens of a sequence that one step computes.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    sequence: usize,
    position: u32,
    tokens: u32,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Prefill,
    Decode,
}

impl<'a> Bench<'a> {
    fn new(device: &Device, path: Path, case: &'a Case) -> Result<Self> {
        let mut arena = Arena::new(device, "the test", 8 << 30)?;
        let stream = Stream::new(device, Priority::High)?;
        let host = case.cache();
        let cache = arena.take::<bf16>(host.len())?;
        let attention = Attention::load(device, path, case.model, cache)?;
        let scratch = attention.take_scratch(&mut arena, 1024)?;
        // SAFETY: everything is alive until `synchronize`.
        unsafe {
            stream.fill(arena.whole(), 0)?;
            stream.upload(&host, cache)?;
        }
        stream.synchronize()?;
        Ok(Self {
            case,
            stream,
            arena,
            attention,
            scratch,
        })
    }

    fn upload<T: Plain>(&mut self, from: &[T]) -> Result<Slice<T>> {
        let to = self.arena.take(from.len().max(1))?;
        // SAFETY: both are alive until `synchronize`.
        unsafe { self.stream.upload(from, to.range(0..from.len()))? };
        self.stream.synchronize()?;
        Ok(to)
    }

    /// Output rows of each chunk. Checks that no other row was written.
    fn run(&mut self, kind: Kind, chunks: &[Chunk]) -> Result<Vec<Vec<bf16>>> {
        let AttentionModel { heads, shape, .. } = self.case.model;
        let width = (heads * shape.head_dim) as usize;
        let row = ((heads + 2 * shape.kv_heads) * shape.head_dim) as usize;
        let (mut qkv, mut sequences, mut tables) = (Vec::new(), Vec::new(), Vec::new());
        for chunk in chunks {
            // A gap that belongs to nobody, between any two.
            qkv.resize(qkv.len() + row, bf16::NAN);
            sequences.push(Sequence {
                token: (qkv.len() / row) as u32,
                tokens: chunk.tokens,
                position: chunk.position,
                table: tables.len() as u32,
            });
            let blocks = (chunk.position + chunk.tokens).div_ceil(shape.block_size) as usize;
            tables.extend(&self.case.tables[chunk.sequence][..blocks]);
            for position in chunk.position..chunk.position + chunk.tokens {
                for head in 0..heads {
                    let case = self.case.seed;
                    let (what, dim) = (What::Query, shape.head_dim);
                    qkv.extend(vector(case, what, chunk.sequence, position, head, dim));
                }
                qkv.resize(qkv.len().next_multiple_of(row), bf16::NAN);
            }
        }
        let mut work: Vec<Work> = Vec::new();
        let window = self.case.window;
        match kind {
            Kind::Prefill => self.attention.prefill_work(&sequences, window, &mut work),
            Kind::Decode => self.attention.decode_work(&sequences, window, &mut work),
        }
        let step = AttentionStep {
            tables: self.upload(&tables)?,
            work: self.upload(&work)?,
            works: self.upload(&[work.len() as u32])?,
            window,
        };
        let queries = self.upload(&qkv)?;
        let out = self.arena.take::<bf16>(qkv.len() / row * width)?;
        let mut host = vec![bf16::ZERO; out.len()];
        // SAFETY: the work belongs to the step, whose blocks and tokens exist; all is alive until
        // `synchronize`.
        unsafe {
            self.stream.fill(out, 0xff)?;
            match kind {
                Kind::Prefill => {
                    self.attention
                        .prefill(&self.stream, &step, LAYER, queries, out)?
                }
                Kind::Decode => {
                    let scratch = &self.scratch;
                    self.attention
                        .decode(&self.stream, &step, scratch, LAYER, queries, out)?;
                }
            }
            self.stream.download(out, &mut host)?;
        }
        self.stream.synchronize()?;
        let mut owned = vec![false; host.len() / width];
        let rows = |s: &Sequence| s.token as usize..(s.token + s.tokens) as usize;
        for s in &sequences {
            owned[rows(s)].fill(true);
        }
        for (t, owned) in owned.iter().enumerate() {
            let untouched = host[t * width..][..width]
                .iter()
                .all(|x| x.to_bits() == 0xffff);
            ensure!(
                *owned != untouched,
                "row {t}: owned {owned}, untouched {untouched}"
            );
        }
        let take = |s: &Sequence| host[rows(s).start * width..rows(s).end * width].to_vec();
        Ok(sequences.iter().map(take).collect())
    }
}

/// ‖a − b‖ / ‖b‖, infinite when anything is not finite.
fn error(a: &[bf16], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| (a.to_f64() - b).powi(2)).sum();
    let error = (difference / b.iter().map(|b| b * b).sum::<f64>()).sqrt();
    if error.is_finite() {
        error
    } else {
        f64::INFINITY
    }
}

fn bits(a: &[bf16]) -> Vec<u16> {
    a.iter().map(|x| x.to_bits()).collect()
}

/// Worst errors of a head size.
#[derive(Default)]
struct Verdict {
    prefill: f64,
    decode: f64,
    /// Rows that decode and prefill computed, and how many of them have the same bits.
    compared: usize,
    equal: usize,
}

fn test(device: &Device, path: Path, longest: &[u32]) -> Result<()> {
    let mut failures = 0;
    for head_dim in [64, 96, 128, 256] {
        let mut verdict = Verdict::default();
        for (round, &longest) in longest.iter().enumerate() {
            for i in 0..3 {
                let seed = 1000 * u64::from(head_dim) + 10 * round as u64 + i;
                let case = Case::new(seed, head_dim, longest);
                if let Err(e) = check(device, path, &case, &mut verdict) {
                    println!("FAILED: {e:#}; {}", case.describe());
                    failures += 1;
                }
            }
        }
        println!(
            "{path:?} head_dim {head_dim}: error of prefill {:.1e}, of decode {:.1e}; \
             chunked == whole, alone == batched; decode == prefill in {} of {} rows",
            verdict.prefill, verdict.decode, verdict.equal, verdict.compared
        );
        if path == Path::Hopper && verdict.equal != verdict.compared {
            println!("FAILED: decode != prefill");
            failures += 1;
        }
    }
    ensure!(failures == 0, "{failures} failures");
    Ok(())
}

fn check(device: &Device, path: Path, case: &Case, verdict: &mut Verdict) -> Result<()> {
    const TOLERANCE: f64 = 6e-3;
    let random = &mut Random(case.seed ^ 0xabcd);
    let width = (case.model.heads * case.model.shape.head_dim) as usize;
    let expected = case.expected();
    let mut bench = Bench::new(device, path, case)?;

    let whole: Vec<Chunk> = (0..case.lengths.len())
        .map(|sequence| Chunk {
            sequence,
            position: 0,
            tokens: case.lengths[sequence],
        })
        .collect();
    let together = bench.run(Kind::Prefill, &whole)?;
    for (sequence, expected) in expected.iter().enumerate() {
        let rows = case.checked(sequence).into_iter();
        let row = |p| &together[sequence][p as usize * width..][..width];
        let out: Vec<bf16> = rows.flat_map(row).copied().collect();
        let error = error(&out, expected);
        verdict.prefill = verdict.prefill.max(error);
        ensure!(
            error < TOLERANCE,
            "prefill of sequence {sequence}: error {error:.1e}"
        );
    }

    for chunk in &whole {
        let mut parts = Vec::new();
        let mut position = 0;
        while position < chunk.tokens {
            let tokens = 1 + random.below(chunk.tokens - position);
            parts.push(Chunk {
                position,
                tokens,
                ..*chunk
            });
            position += tokens;
        }
        let mut chunked = Vec::new();
        for part in &parts {
            chunked.extend(bench.run(Kind::Prefill, &[*part])?.concat());
        }
        let same = bits(&chunked) == bits(&together[chunk.sequence]);
        ensure!(same, "prefill of {parts:?} differs from that of the whole");
    }

    // Single tokens, in any order.
    let mut tokens: Vec<Chunk> = (0..40)
        .map(|i| {
            let sequence = random.below(case.lengths.len() as u32) as usize;
            let positions = case.checked(sequence);
            let last = positions.len() - 1;
            Chunk {
                sequence,
                position: positions[if i % 3 == 0 {
                    last
                } else {
                    random.below(last as u32 + 1) as usize
                }],
                tokens: 1,
            }
        })
        .collect();
    let batched = bench.run(Kind::Decode, &tokens)?;
    for (token, out) in tokens.iter().zip(&batched) {
        let at = token.position as usize * width;
        let row = case
            .checked(token.sequence)
            .binary_search(&token.position)
            .unwrap()
            * width;
        let error = error(out, &expected[token.sequence][row..row + width]);
        verdict.decode = verdict.decode.max(error);
        ensure!(error < TOLERANCE, "decode of {token:?}: error {error:.1e}");
        let prefilled = &together[token.sequence][at..at + width];
        verdict.compared += 1;
        verdict.equal += usize::from(bits(prefilled) == bits(out));
    }
    for i in 0..4 {
        let alone = bench.run(Kind::Decode, &tokens[i..=i])?;
        ensure!(
            bits(&alone[0]) == bits(&batched[i]),
            "decode alone differs: {:?}",
            tokens[i]
        );
    }
    tokens.reverse();
    let mut reversed = bench.run(Kind::Decode, &tokens)?;
    reversed.reverse();
    let same = batched
        .iter()
        .zip(&reversed)
        .all(|(a, b)| bits(a) == bits(b));
    ensure!(same, "decode depends on the order of sequences");
    Ok(())
}

// ---- timing

/// Fills memory with random finite numbers, a piece of the host's over and over.
fn randomise(stream: &Stream, to: Slice<bf16>) -> Result<()> {
    let mut random = Random(7);
    let piece: Vec<bf16> = (0..1 << 22)
        .map(|_| bf16::from_f32((random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0))
        .collect();
    for start in (0..to.len()).step_by(piece.len()) {
        let len = piece.len().min(to.len() - start);
        // SAFETY: both are alive; `synchronize` below.
        unsafe { stream.upload(&piece[..len], to.range(start..start + len))? };
    }
    Ok(stream.synchronize()?)
}

/// Median time of one of `launches` in a graph.
fn median(
    stream: &Stream,
    launches: usize,
    launch: impl Fn(usize) -> Result<()>,
) -> Result<Duration> {
    let graph = Graph::capture(stream, || {
        (0..launches).try_for_each(&launch).map_err(GraphError)
    })
    .map_err(|e| e.0)?;
    let (start, end) = (Event::new(stream.device())?, Event::new(stream.device())?);
    let mut times = Vec::new();
    for _ in 0..7 {
        stream.record(&start)?;
        // SAFETY: what it touches is alive.
        unsafe { graph.launch(stream)? };
        stream.record(&end)?;
        end.synchronize()?;
        times.push(end.since(&start)? / launches as u32);
    }
    times.sort();
    Ok(times[times.len() / 2])
}

struct GraphError(anyhow::Error);

impl From<spate_cuda::CudaError> for GraphError {
    fn from(error: spate_cuda::CudaError) -> Self {
        Self(error.into())
    }
}

/// Read bandwidth and bfloat16 rate of an H100 SXM, as measured: bytes and operations per second.
const BANDWIDTH: f64 = 3.08e12;
const RATE: f64 = 800e12;

fn time(device: &Device, path: Path, block_size: u32) -> Result<()> {
    let llama = (32, 8, 128);
    for (heads, sequences, past, tokens) in [
        (llama, 1, 0, 8192),
        (llama, 1, 0, 2048),
        (llama, 8, 0, 512),
        (llama, 1, 6144, 2048),
        (llama, 16, 0, 64),
        ((32, 8, 64), 1, 0, 8192),
        ((32, 8, 96), 1, 0, 8192),
        ((16, 4, 256), 1, 0, 8192),
        ((32, 32, 128), 1, 0, 8192),
    ] {
        time_one(
            device,
            path,
            Kind::Prefill,
            heads,
            sequences,
            past,
            tokens,
            block_size,
        )?;
    }
    for (heads, sequences, past) in [
        (llama, 1, 127),
        (llama, 1, 1023),
        (llama, 1, 8191),
        (llama, 4, 8191),
        (llama, 16, 8191),
        (llama, 64, 8191),
        (llama, 8, 640),
        (llama, 64, 640),
        (llama, 256, 640),
        ((32, 8, 64), 16, 8191),
        ((16, 4, 256), 16, 8191),
        ((32, 32, 128), 16, 8191),
        ((64, 8, 128), 16, 8191),
    ] {
        time_one(
            device,
            path,
            Kind::Decode,
            heads,
            sequences,
            past,
            1,
            block_size,
        )?;
    }
    Ok(())
}

fn time_one(
    device: &Device,
    path: Path,
    kind: Kind,
    (heads, kv_heads, head_dim): (u32, u32, u32),
    count: u32,
    past: u32,
    tokens: u32,
    block_size: u32,
) -> Result<()> {
    let per_sequence = (past + tokens).div_ceil(block_size);
    let shape = KvShape {
        blocks: per_sequence * count,
        kv_heads,
        block_size,
        head_dim,
    };
    let model = AttentionModel {
        heads,
        shape,
        scale: (head_dim as f32).powf(-0.5),
        softcap: None,
    };
    // Enough layers that what one reads is no longer in L2 when it comes round again.
    let layer_bytes = shape.layer_len() * 2;
    let layers = (400usize << 20).div_ceil(layer_bytes).clamp(1, 64);
    let all_tokens = (count * tokens) as usize;
    let row = ((heads + 2 * kv_heads) * head_dim) as usize;
    let room = layers * layer_bytes + all_tokens * row * 4 + (1 << 28);
    let mut arena = Arena::new(device, "timing", room as u64 + (1 << 28))?;
    let stream = Stream::new(device, Priority::High)?;
    // SAFETY: alive; nothing in it is needed yet. The scratch's counters start at zero.
    unsafe { stream.fill(arena.whole(), 0)? };
    let cache = arena.take::<bf16>(layers * shape.layer_len())?;
    let qkv = arena.take::<bf16>(all_tokens * row)?;
    let out = arena.take::<bf16>(all_tokens * (heads * head_dim) as usize)?;
    randomise(&stream, cache)?;
    randomise(&stream, qkv)?;

    let mut random = Random(3);
    let mut tables: Vec<u32> = (0..shape.blocks).collect();
    for i in (1..tables.len()).rev() {
        tables.swap(i, random.below(i as u32 + 1) as usize);
    }
    let sequences: Vec<Sequence> = (0..count)
        .map(|i| Sequence {
            token: i * tokens,
            tokens,
            position: past,
            table: i * per_sequence,
        })
        .collect();
    let attention = Attention::load(device, path, model, cache)?;
    let mut work = Vec::new();
    match kind {
        Kind::Prefill => attention.prefill_work(&sequences, None, &mut work),
        Kind::Decode => attention.decode_work(&sequences, None, &mut work),
    }
    let scratch = match kind {
        Kind::Prefill => None,
        Kind::Decode => Some(attention.take_scratch(&mut arena, work.len())?),
    };
    let step = AttentionStep {
        tables: arena.take(tables.len())?,
        work: arena.take(work.len())?,
        works: arena.take(1)?,
        window: None,
    };
    // SAFETY: all is alive until `synchronize`.
    unsafe {
        stream.upload(&tables, step.tables)?;
        stream.upload(&work, step.work)?;
        stream.upload(&[work.len() as u32], step.works)?;
    }
    stream.synchronize()?;
    let launches = if all_tokens > 5000 { 4 } else { 32 };
    let took = median(&stream, launches, |i| {
        // SAFETY: the step describes what is allocated.
        unsafe {
            match &scratch {
                None => attention.prefill(&stream, &step, i % layers, qkv, out)?,
                Some(scratch) => {
                    attention.decode(&stream, &step, scratch, i % layers, qkv, out)?;
                }
            }
        }
        Ok(())
    })?
    .as_secs_f64();
    let what =
        format!("{path:?} {kind:?} {heads}/{kv_heads}x{head_dim}, {count} x ({past} + {tokens})");
    match kind {
        Kind::Prefill => {
            let (n, past) = (f64::from(tokens), f64::from(past));
            let pairs = f64::from(count * heads) * (n * past + n * (n + 1.0) / 2.0);
            let operations = pairs * 4.0 * f64::from(head_dim);
            println!(
                "{what}: {:.1} us, {:.0} TFLOP/s (floor {:.1} us)",
                took * 1e6,
                operations / took / 1e12,
                operations / RATE * 1e6
            );
        }
        Kind::Decode => {
            let bytes = f64::from(count * kv_heads * head_dim) * f64::from(past + 1) * 4.0;
            println!(
                "{what}: {:.1} us, {:.2} TB/s, {:.0} % (floor {:.1} us)",
                took * 1e6,
                bytes / took / 1e12,
                100.0 * bytes / took / BANDWIDTH,
                bytes / BANDWIDTH * 1e6
            );
        }
    }
    Ok(())
}
