use spate_types::{Logprobs, SampledToken, SamplingParams, TokenId};

/// A pretend language model: a history of tokens is a number, from which the next token's
/// distribution follows. The token of rank `r` has probability 2^-r; the ranking is a rotation of
/// the vocabulary that depends on the history.
#[derive(Debug, Clone, Copy)]
pub(super) struct Model {
    pub(super) seed: u64,
    pub(super) vocab_size: u32,
}

/// Stands for everything that was computed up to a position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct History(u64);

impl Model {
    pub(super) fn start(&self) -> History {
        History(mix(self.seed))
    }

    /// What is stored for `token` after `history`: like real KV, it depends on all tokens before.
    pub(super) fn digest(&self, history: History, token: TokenId) -> u64 {
        mix(history.0 ^ u64::from(token).rotate_left(32))
    }

    /// Reads one stored position.
    pub(super) fn attend(&self, history: History, digest: u64) -> History {
        History(mix(history.0.wrapping_add(digest)))
    }

    /// Chooses the token at `position`, the `nth` (from 0) output token of its sequence, among those that
    /// `mask` allows.
    pub(super) fn sample(
        &self,
        history: History,
        sampling: &SamplingParams,
        seed: u64,
        position: u32,
        nth: u32,
        mask: Option<&[u32]>,
    ) -> SampledToken {
        let banned = |token: TokenId| {
            mask.is_some_and(|mask| mask[token as usize / 32] >> (token % 32) & 1 == 0)
                || (nth < sampling.min_tokens && sampling.min_tokens_banned.contains(&token))
                || sampling
                    .logit_bias
                    .iter()
                    .any(|&(id, bias)| id == token && bias <= -100.0)
        };
        let forced = sampling
            .logit_bias
            .iter()
            .find(|&&(id, bias)| bias >= 100.0 && !banned(id));
        let token = match forced {
            Some(&(id, _)) => id,
            None => {
                let drawn = if sampling.temperature > 0.0 {
                    // Trailing zeros of a random number have just the distribution wanted.
                    mix(seed ^ mix(u64::from(position))).trailing_zeros()
                } else {
                    0
                };
                let keep = if sampling.top_k == 0 {
                    self.vocab_size
                } else {
                    sampling.top_k
                };
                let first = drawn % keep.min(self.vocab_size);
                let ranks = (first..self.vocab_size).chain(0..first);
                let mut tokens = ranks.map(|rank| self.token_of_rank(history, rank));
                tokens.find(|&token| !banned(token)).unwrap_or(0)
            }
        };
        let logprobs = sampling
            .logprobs
            .map(|top| Box::new(self.logprobs(history, token, top)));
        SampledToken { token, logprobs }
    }

    /// Log-probabilities after `history`, where `token` follows.
    pub(super) fn logprobs(&self, history: History, token: TokenId, top: u32) -> Logprobs {
        let best = self.token_of_rank(history, 0);
        let rank = (token + self.vocab_size - best) % self.vocab_size;
        let logprob = |rank: u32| -((rank + 1) as f32) * std::f32::consts::LN_2;
        let top = (0..top.min(self.vocab_size))
            .map(|rank| (self.token_of_rank(history, rank), logprob(rank)))
            .collect();
        Logprobs {
            token,
            logprob: logprob(rank),
            rank: rank + 1,
            top,
        }
    }

    /// `rank` counts from 0.
    fn token_of_rank(&self, history: History, rank: u32) -> TokenId {
        let best = mix(history.0) % u64::from(self.vocab_size);
        ((best + u64::from(rank)) % u64::from(self.vocab_size)) as TokenId
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
pub(super) fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
