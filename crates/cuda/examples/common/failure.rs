//! A small engine that fails: what its streams and its health say then.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use spate_engine::{EngineConfig, EngineHandle, Event, Health, SchedulerConfig, TokenStream};
use spate_executor::Executor;
use spate_model::Gguf;
use spate_model::testing::{TempFile, TinyLlama, tiny_llama};
use spate_types::{FinishReason, GenerationRequest, SamplingParams, StopParams};

use crate::common::SLOTS;

/// For everybody to notice.
const LIMIT: Duration = Duration::from_secs(1);

/// Streams that run when it happens.
pub(crate) const STREAMS: u32 = 4;

/// A random model whose streams last for seconds.
pub(crate) fn model() -> Result<Gguf> {
    let file = TempFile::new(&tiny_llama(&TinyLlama {
        hidden: 128,
        head_dim: 64,
        ffn: 192,
        context_len: 16_384,
        ..TinyLlama::default()
    }));
    Ok(Gguf::open(file.path())?)
}

pub(crate) fn start(executor: Box<dyn Executor>, step_timeout: Duration) -> Result<EngineHandle> {
    let max_model_len = executor.capacity().max_seq_len;
    let config = EngineConfig {
        scheduler: SchedulerConfig {
            max_num_seqs: SLOTS,
            max_batch_tokens: 512,
            max_model_len,
            max_waiting: SLOTS,
            prefix_caching: true,
        },
        step_timeout,
    };
    Ok(spate_engine::start(executor, config, |_| {})?)
}

/// Streams that have begun.
pub(crate) async fn streams(engine: &EngineHandle) -> Result<Vec<TokenStream>> {
    let mut streams = Vec::new();
    for i in 0..STREAMS {
        let mut stream = engine.submit(engine.admit(1)?, request(engine, i))?;
        ensure!(stream.next().await.is_some(), "no first token");
        streams.push(stream);
    }
    Ok(streams)
}

fn request(engine: &EngineHandle, i: u32) -> GenerationRequest {
    GenerationRequest {
        id: engine.next_id(),
        prompt: [i, 2, 3].as_slice().into(),
        sampling: Arc::new(SamplingParams::default()),
        stop: Arc::new(StopParams {
            max_tokens: engine.config().scheduler.max_model_len - 3,
            ..StopParams::default()
        }),
        n: 1,
        priority: 0,
        cache_salt: None,
        deadline: None,
    }
}

/// Sees to it that within [`LIMIT`] after `since` health is red and every stream has ended with an error; says
/// when and why.
pub(crate) async fn noticed(
    engine: &EngineHandle,
    since: Instant,
    streams: Vec<TokenStream>,
) -> Result<String> {
    let limit = tokio::time::Instant::from_std(since + LIMIT);
    let reason = tokio::time::timeout_at(limit, engine.dead()).await;
    let dead = since.elapsed();
    ensure!(reason.is_ok(), "nobody noticed for {dead:?}");
    ensure!(
        matches!(engine.health(), Health::Dead(_)),
        "health is not red"
    );
    for mut stream in streams {
        let mut end = None;
        while let Some(events) = tokio::time::timeout_at(limit, stream.next()).await? {
            for event in events {
                if let Event::Finished { reason, .. } = event {
                    end = Some(reason);
                }
            }
        }
        ensure!(
            end == Some(FinishReason::Error),
            "a stream ended with {end:?}"
        );
    }
    Ok(format!(
        "noticed after {dead:.1?}, {STREAMS} streams ended with an error after {:.1?}: {}",
        since.elapsed(),
        reason.unwrap_or_default()
    ))
}
