use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::Instant;

use spate_executor::{
    Batch, Capacity, Completion, Contract, Executor, ExecutorError, Lane, RowOutput, Ticket,
    TokenMask,
};
use spate_model::{Checkpoint, LoadError, ModelConfig, Transformer, Weights};
use spate_types::Slot;

use crate::common_key::common_keys;
use crate::kv::{KvCache, KvDtype, KvPlan};
use crate::linear::Isa;
use crate::masks::Masks;
use crate::ops::CpuOps;
use crate::rope::Ropes;
use crate::slots::SlotState;
use crate::step::Step;
use crate::weights::{CpuLoader, Matrix};
use crate::{CpuError, ThreadPool};

/// Batches that may wait for their completion.
const DEPTH: u32 = 2;

/// How numbers are represented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuMode {
    /// Float32 everywhere: weights are dequantised at load, the KV cache is float32 if no other was asked for. The oracle.
    Exact,
    /// Weights stay quantised and meet int8 activations, the KV cache is float16 if no
    /// other was asked for.
    Fast,
}

/// Settings of the CPU backend.
#[derive(Debug, Clone)]
pub struct CpuConfig {
    /// How numbers are represented.
    pub mode: CpuMode,
    /// Threads that compute; 0 takes all cores.
    pub threads: usize,
    /// Positions in a KV block; a multiple of 16, at most 1024.
    pub block_size: u32,
    /// Size of the KV pool.
    pub kv_cache_bytes: u64,
    /// How its numbers are stored; by default as wide as the mode computes.
    pub kv_dtype: Option<KvDtype>,
    /// Most positions in one sequence; 0 takes the model's context length.
    pub max_seq_len: u32,
    /// Sequences that can be alive at once.
    pub slots: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
}

impl CpuConfig {
    pub(crate) fn kv_dtype(&self) -> KvDtype {
        self.kv_dtype.unwrap_or(match self.mode {
            CpuMode::Exact => KvDtype::F32,
            CpuMode::Fast => KvDtype::F16,
        })
    }
}

/// Runs a model on the CPU: one step thread, which takes batches in order, and a pool that shares
/// the work of a step.
pub struct CpuExecutor {
    contract: Contract,
    budget: Vec<(&'static str, u64)>,
    /// Dropped to end the thread.
    commands: Option<Sender<Command>>,
    /// Dropped with them.
    masks: Option<Sender<(Ticket, Vec<TokenMask>)>>,
    completions: Receiver<Result<Completion, String>>,
    thread: Option<JoinHandle<()>>,
    /// Why no completion will come any more.
    fatal: Option<String>,
}

enum Command {
    Run(Ticket, Batch),
    Release(Slot),
}

impl CpuExecutor {
    /// Loads a model. Calls `progress` with the share that is done, from 0 to 1.
    ///
    /// # Errors
    /// When the file, the settings or the system don't allow it; the message says which.
    pub fn load(
        checkpoint: &dyn Checkpoint,
        config: &CpuConfig,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Self, CpuError> {
        let model = checkpoint.config()?;
        let max_seq_len = max_seq_len(&model, config)?;
        let kv_plan = KvPlan::new(&model, config, max_seq_len)?;
        let capacity = capacity(&model, config, max_seq_len, &kv_plan)?;
        let pool = ThreadPool::new(config.threads).map_err(CpuError::Thread)?;
        let loader = CpuLoader::new(config.mode)?;
        let weights = Weights::load(checkpoint, &model, &loader, pool.threads(), progress);
        let weights = weights.map_err(|e| match e {
            LoadError::Model(e) => CpuError::Model(e),
            LoadError::Backend(e) => e,
        })?;
        let ropes = Ropes::new(&model, max_seq_len as usize);
        let biases = weights.layers.iter().map(|l| l.qkv.bias.as_deref());
        // Float32 is exact enough to hold keys as they are.
        let common_keys = match kv_plan.dtype {
            KvDtype::F32 => vec![Vec::new(); model.layers],
            _ => common_keys(&model, &ropes, max_seq_len, biases),
        };
        let kv = KvCache::new(&kv_plan)?;
        let (slots, tokens) = (config.slots as usize, config.max_batch_tokens as usize);
        let (masks, inbox) = mpsc::channel();
        let masks_inbox = Masks::new(inbox);
        let sizes = [slots, tokens];
        let mut ops = CpuOps::new(pool, &model, ropes, common_keys, kv, sizes, masks_inbox)?;
        let weight_bytes = weight_bytes(&weights);
        let transformer = Transformer::new(model, weights, &mut ops)?;
        let budget = vec![
            ("weights", weight_bytes),
            ("KV cache", kv_plan.bytes()),
            ("activations", ops.activation_bytes()),
        ];
        let worker = Worker {
            ops,
            transformer,
            step: Step::default(),
        };
        Self::start(capacity, budget, worker, masks)
    }

    fn start(
        capacity: Capacity,
        budget: Vec<(&'static str, u64)>,
        worker: Worker,
        masks: Sender<(Ticket, Vec<TokenMask>)>,
    ) -> Result<Self, CpuError> {
        let (commands, inbox) = mpsc::channel();
        let (outbox, completions) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("spate-step".into())
            .spawn(move || worker.run(&inbox, &outbox))
            .map_err(CpuError::Thread)?;
        Ok(Self {
            contract: Contract::new(capacity),
            budget,
            commands: Some(commands),
            masks: Some(masks),
            completions,
            thread: Some(thread),
            fatal: None,
        })
    }

    /// What the memory went to, in bytes.
    pub fn memory_budget(&self) -> Vec<(&'static str, u64)> {
        self.budget.clone()
    }

    /// The instruction set that the kernels use.
    pub fn simd(&self) -> &'static str {
        Isa::best().name()
    }

    fn fatal(&mut self, why: String) -> ExecutorError {
        ExecutorError::Fatal(self.fatal.get_or_insert(why).clone())
    }

    fn send(&mut self, command: Command) -> Result<(), ExecutorError> {
        let sent = match &self.commands {
            Some(commands) if self.fatal.is_none() => commands.send(command).is_ok(),
            _ => false,
        };
        if sent {
            Ok(())
        } else {
            Err(self.fatal("the step thread has ended".into()))
        }
    }
}

impl Executor for CpuExecutor {
    fn capacity(&self) -> &Capacity {
        self.contract.capacity()
    }

    fn submit(&mut self, lane: Lane, batch: Batch) -> Result<Ticket, ExecutorError> {
        let ticket = self.contract.submit(lane, &batch)?;
        self.send(Command::Run(ticket, batch))?;
        Ok(ticket)
    }

    fn mask(&mut self, ticket: Ticket, masks: Vec<TokenMask>) -> Result<(), ExecutorError> {
        self.contract.mask(ticket, &masks)?;
        let inbox = self.masks.as_ref();
        match inbox.is_some_and(|inbox| inbox.send((ticket, masks)).is_ok()) {
            true => Ok(()),
            false => Err(self.fatal("the step thread has ended".into())),
        }
    }

    fn wait(&mut self, deadline: Instant) -> Result<Option<Completion>, ExecutorError> {
        if let Some(why) = &self.fatal {
            return Err(ExecutorError::Fatal(why.clone()));
        }
        let timeout = deadline.saturating_duration_since(Instant::now());
        match self.completions.recv_timeout(timeout) {
            Ok(Ok(completion)) => {
                self.contract.complete(Lane::Main);
                Ok(Some(completion))
            }
            Ok(Err(why)) => Err(self.fatal(why)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => {
                Err(self.fatal("the step thread has ended".into()))
            }
        }
    }

    fn release(&mut self, slot: Slot) {
        if self.contract.release(slot).is_err() {
            return; // a slot in use keeps what it needs
        }
        // A lost thread shows itself at the next submit or wait.
        let _ = self.send(Command::Release(slot));
    }
}

impl Drop for CpuExecutor {
    fn drop(&mut self) {
        (self.commands, self.masks) = (None, None);
        if let Some(thread) = self.thread.take() {
            // It catches the panics of steps; there is nothing to learn from another.
            let _ = thread.join();
        }
    }
}

/// What the step thread owns.
struct Worker {
    ops: CpuOps,
    transformer: Transformer<CpuOps>,
    step: Step,
}

impl Worker {
    /// Runs batches until the executor is dropped or one of them panics.
    fn run(mut self, inbox: &Receiver<Command>, outbox: &Sender<Result<Completion, String>>) {
        for command in inbox {
            match command {
                Command::Release(slot) => {
                    if let Some(slot) = self.ops.slots.get_mut(slot.0 as usize) {
                        *slot = None;
                    }
                }
                Command::Run(ticket, batch) => {
                    let start = Instant::now();
                    let outputs = catch_unwind(AssertUnwindSafe(|| self.step(ticket, batch)));
                    let done = match outputs {
                        Ok(Ok(outputs)) => Ok(Completion {
                            ticket,
                            outputs,
                            busy: start.elapsed(),
                        }),
                        Ok(Err(error)) => Err(error.to_string()),
                        Err(panic) => Err(format!("a step panicked: {}", message(&*panic))),
                    };
                    let failed = done.is_err();
                    if outbox.send(done).is_err() || failed {
                        return;
                    }
                }
            }
        }
    }

    fn step(&mut self, ticket: Ticket, mut batch: Batch) -> Result<Vec<RowOutput>, CpuError> {
        for copy in batch.copies.drain(..) {
            self.ops.copy_block(copy, false);
        }
        for copy in batch.local_copies.drain(..) {
            self.ops.copy_block(copy, true);
        }
        for row in &mut batch.rows {
            if let Some(bind) = row.bind.take() {
                self.ops.slots[row.slot.0 as usize] = Some(SlotState::new(bind));
            }
        }
        self.step
            .fill(ticket, &batch, &self.ops.slots, &self.ops.ropes.rotations);
        let layers = 0..self.transformer.config().layers;
        self.transformer
            .forward(&mut self.ops, &mut self.step, layers)?;
        Ok(std::mem::take(&mut self.step.outputs))
    }
}

fn message(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("no message")
}

/// The longest sequence.
pub(crate) fn max_seq_len(model: &ModelConfig, config: &CpuConfig) -> Result<u32, CpuError> {
    let context = model.context_len as u32;
    match config.max_seq_len {
        0 => Ok(context),
        len if len <= context => Ok(len),
        len => Err(CpuError::Config(format!(
            "a sequence length of {len} is more than the model's context of {context}"
        ))),
    }
}

fn capacity(
    model: &ModelConfig,
    config: &CpuConfig,
    max_seq_len: u32,
    kv: &KvPlan,
) -> Result<Capacity, CpuError> {
    for (name, value) in [
        ("slots", config.slots),
        ("max_batch_tokens", config.max_batch_tokens),
    ] {
        if value == 0 {
            return Err(CpuError::Config(format!("{name} must be at least 1")));
        }
    }
    Ok(Capacity {
        slots: config.slots,
        blocks: kv.main.blocks as u32,
        block_size: config.block_size,
        local: kv.local(),
        max_batch_tokens: config.max_batch_tokens,
        step_tokens: None,
        max_seq_len,
        vocab_size: model.vocab_size as u32,
        lanes: vec![Lane::Main],
        depth: DEPTH,
    })
}

fn weight_bytes(weights: &Weights<Matrix, Vec<f32>>) -> u64 {
    let layers = weights.layers.iter();
    let matrices = layers.flat_map(|l| [&l.qkv, &l.attn_out, &l.gate_up, &l.down]);
    let tables = [Some(&weights.embedding), weights.head.as_ref()];
    let matrices = matrices.chain(tables.into_iter().flatten());
    // Norms are a thousandth of it.
    matrices.map(Matrix::bytes).sum()
}
