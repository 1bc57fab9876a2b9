use std::collections::HashMap;
use std::sync::Arc;

use spate_executor::Bind;
use spate_types::{SamplingParams, TokenId};

/// What a slot remembers of its sequence between steps.
#[derive(Debug)]
pub(crate) struct SlotState {
    pub(crate) prompt: Arc<[TokenId]>,
    pub(crate) sampling: Arc<SamplingParams>,
    pub(crate) seed: u64,
    /// Sampled last; absent before the first sample and after a failed one.
    pub(crate) last: Option<TokenId>,
    /// Tokens sampled so far.
    pub(crate) generated: u32,
    /// How often each token of the prompt (0 at first) and of the output was sampled; kept only if
    /// a penalty needs it.
    pub(crate) counts: Option<HashMap<TokenId, u32>>,
}

impl SlotState {
    pub(crate) fn new(bind: Bind) -> Self {
        let Bind {
            prompt,
            sampling,
            seed,
        } = bind;
        let counts = sampling.has_penalties().then(|| {
            let prompt = prompt.iter().map(|&t| (t, 0));
            prompt.collect()
        });
        Self {
            prompt,
            sampling,
            seed,
            last: None,
            generated: 0,
            counts,
        }
    }

    pub(crate) fn sampled(&mut self, token: TokenId) {
        self.last = Some(token);
        self.generated += 1;
        if let Some(counts) = &mut self.counts {
            *counts.entry(token).or_insert(0) += 1;
        }
    }
}
