//! What the backend says about settings and models that can't work, and what it takes.
#![allow(clippy::unwrap_used)]

mod common;

use common::config;
use spate_cpu::{CpuConfig, CpuExecutor, CpuMode, Estimate};
use spate_executor::Executor;
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_model::{GgmlType, Gguf};

fn load(spec: &TinyLlama, change: impl Fn(&mut CpuConfig)) -> Result<CpuExecutor, String> {
    let file = TempFile::new(&tiny_llama(spec));
    let gguf = Gguf::open(file.path()).unwrap();
    let mut config = config(CpuMode::Fast);
    change(&mut config);
    CpuExecutor::load(&gguf, &config, &mut |_| {}).map_err(|e| e.to_string())
}

#[test]
fn settings_that_cannot_work_are_refused() {
    let refusal = |change: &dyn Fn(&mut CpuConfig)| {
        load(&TinyLlama::default(), change).err().expect("refused")
    };
    for size in [0, 8, 24, 2048, u32::MAX] {
        assert!(
            refusal(&|c| c.block_size = size).contains("block size"),
            "{size}"
        );
    }
    assert!(refusal(&|c| c.kv_cache_bytes = 100).contains("no room for one block"));
    assert!(refusal(&|c| c.kv_cache_bytes = u64::MAX).contains("no memory for the KV cache"));
    assert!(refusal(&|c| c.max_seq_len = 513).contains("context of 512"));
    assert!(refusal(&|c| c.slots = 0).contains("slots"));
    assert!(refusal(&|c| c.max_batch_tokens = 0).contains("max_batch_tokens"));
    let odd_head = TinyLlama {
        head_dim: 24,
        ..TinyLlama::default()
    };
    assert!(load(&odd_head, |_| ()).err().unwrap().contains("have 24"));
}

#[test]
fn capacity_and_budget_follow_the_settings() {
    let spec = TinyLlama {
        weights: GgmlType::F32,
        value_weights: GgmlType::F32,
        ..TinyLlama::default()
    };
    let executor = load(&spec, |c| c.kv_cache_bytes = 100_000).unwrap();
    // 2 layers, 2 heads of 16, keys and values, float16.
    let block = 16 * 2 * 2 * 16 * 2 * 2;
    let capacity = executor.capacity();
    assert_eq!(capacity.blocks, 100_000 / block);
    assert_eq!((capacity.max_seq_len, capacity.vocab_size), (512, 259));
    let budget = executor.memory_budget();
    let of = |name| budget.iter().find(|b| b.0 == name).unwrap().1;
    assert_eq!(of("KV cache"), u64::from(capacity.blocks * block));
    // Rows come in panels of 16: 272 of them for 259 tokens.
    let layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 96;
    assert_eq!(of("weights"), 4 * (2 * layer + 2 * 272 * 64));
    assert!(of("activations") > 512 * 4 * (3 * 64 + 64 + 3 * 96));

    let progress = &mut Vec::new();
    let file = TempFile::new(&tiny_llama(&spec));
    let gguf = Gguf::open(file.path()).unwrap();
    CpuExecutor::load(&gguf, &config(CpuMode::Exact), &mut |p| progress.push(p)).unwrap();
    assert_eq!(progress.last(), Some(&1.0));
}

#[test]
fn layers_with_a_window_get_a_pool_of_their_own_where_it_pays() {
    let spec = TinyLlama {
        architecture: "gemma3",
        layers: 6,
        window: Some(64),
        context_len: 4096,
        ..TinyLlama::default()
    };
    let pools = |kv_bytes: u64, change: &dyn Fn(&mut TinyLlama)| {
        let mut spec = spec.clone();
        change(&mut spec);
        let executor = load(&spec, |c| c.kv_cache_bytes = kv_bytes).unwrap();
        let budget = executor.memory_budget();
        let used = budget.iter().find(|b| b.0 == "KV cache").unwrap().1;
        assert!(used <= kv_bytes && used > kv_bytes * 95 / 100, "{used}");
        let capacity = executor.capacity();
        (capacity.blocks, capacity.local)
    };
    let (main, local) = pools(64 << 20, &|_| ());
    let local = local.unwrap();
    // Sequences of 256 tokens fill both: 16 blocks of one, 5 of the other, and a step of 32 more.
    assert_eq!((local.window, local.blocks), (64, main * 5 / 16 + 32));
    // 4 of 6 layers keep but a part of it.
    let (single, none) = pools(64 << 20, &|s| s.window = None);
    assert_eq!(none, None);
    assert!(main > single * 17 / 10, "{main} blocks, not {single}");

    // All layers are local.
    let (main, local) = pools(64 << 20, &|s| s.architecture = "phi3");
    assert_eq!(local.unwrap().blocks, main * 5 / 16 + 32);
    assert!(main > 3 * single);

    // Memory or sequences are short.
    assert_eq!(pools(300_000, &|_| ()).1, None);
    assert_eq!(pools(64 << 20, &|s| s.context_len = 80).1, None);
}

#[test]
fn what_loading_takes_is_known_before() {
    for (mode, weights) in [
        (CpuMode::Exact, GgmlType::Q4_1),
        (CpuMode::Fast, GgmlType::Q4_1),
        (CpuMode::Fast, GgmlType::F16),
    ] {
        let file = TempFile::new(&tiny_llama(&TinyLlama {
            weights,
            ..TinyLlama::default()
        }));
        let gguf = Gguf::open(file.path()).unwrap();
        let config = config(mode);
        let estimate = Estimate::new(&gguf, &config).unwrap();
        let executor = CpuExecutor::load(&gguf, &config, &mut |_| {}).unwrap();
        let capacity = executor.capacity();
        let kv = estimate.kv_cache(capacity.blocks, capacity.block_size);
        let expected = [
            ("weights", estimate.weights),
            ("KV cache", kv.unwrap().bytes),
            ("activations", estimate.activations),
        ];
        assert_eq!(executor.memory_budget(), expected, "{mode:?} {weights}");
    }
}

#[test]
fn the_cache_that_a_load_is_said_to_need_holds_it() {
    let file = TempFile::new(&tiny_llama(&TinyLlama {
        architecture: "gemma3",
        layers: 6,
        window: Some(64),
        context_len: 1024,
        ..TinyLlama::default()
    }));
    let gguf = Gguf::open(file.path()).unwrap();
    let mut config = config(CpuMode::Fast);
    config.max_batch_tokens = 64;
    let estimate = Estimate::new(&gguf, &config).unwrap();
    let mut pools = [0, 0];
    for (sequences, tokens) in [(1, 1), (3, 16), (1, 1024), (7, 80), (20, 100), (50, 1000)] {
        let kv = estimate.kv_cache(sequences, tokens).unwrap();
        config.kv_cache_bytes = kv.bytes;
        let executor = CpuExecutor::load(&gguf, &config, &mut |_| {}).unwrap();
        let capacity = executor.capacity();
        let blocks = tokens.div_ceil(16);
        assert!(capacity.blocks >= sequences * blocks);
        assert_eq!(capacity.blocks, kv.main.0);
        assert_eq!(capacity.local.map(|l| l.blocks), kv.local.map(|l| l.0));
        if let Some(local) = capacity.local {
            // A window's blocks for each, and a step's.
            assert!(local.blocks >= sequences * blocks.min(5) + 4);
        }
        pools[usize::from(kv.local.is_some())] += 1;

        // Nothing is wasted: with the bytes of a block less in each layer, they would not fit.
        config.kv_cache_bytes -= config.kv_cache_bytes.min(kv.main.1 / u64::from(kv.main.0));
        if let Ok(less) = CpuExecutor::load(&gguf, &config, &mut |_| {}) {
            let less = less.capacity();
            let local = less.local.map_or(u32::MAX, |l| l.blocks);
            assert!(less.blocks < sequences * blocks || local < sequences * blocks.min(5) + 4);
        }
    }
    assert!(
        pools.iter().all(|&n| n > 1),
        "both kinds were seen: {pools:?}"
    );
    assert!(estimate.kv_cache(u32::MAX, 1024).is_err());
}
