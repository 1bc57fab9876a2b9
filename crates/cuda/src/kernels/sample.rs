use half::bf16;
use spate_types::{Logprobs, SamplingParams};

use super::{VEC, image};
use crate::CudaError;
use crate::driver::{Device, Kernel, Module, Plain, Shape, Slice, Stream};

/// Nothing: a slot, a token or a number of alternatives that is not there.
pub const NONE: u32 = u32::MAX;

/// Most alternatives that logprobs name.
pub const MAX_TOP: usize = 32;

/// Most logit biases of one sequence.
const MAX_BIASES: usize = 1024;

/// Most tokens that min_tokens bans in one sequence.
const MAX_BANS: usize = 2048;

/// Room for the edits of one slot: biases, then bans.
pub const MAX_EDITS: usize = MAX_BIASES + MAX_BANS;

/// Widest logits.
pub const MAX_VOCAB: usize = 500_000;

const THREADS: u32 = 1024;

/// From a slot's counts to the next one's: as in sampling.cuh.
pub fn counts_stride(vocab: usize) -> usize {
    vocab.next_multiple_of(4)
}

/// How a slot's sequence samples; `SlotParams` of sampling.cuh.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub struct SlotParams {
    inv_temperature: f32,
    top_p: f32,
    min_p: f32,
    top_k: u32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    has_penalties: u32,
    biases: u32,
    bans: u32,
    min_tokens: u32,
    top_logprobs: u32,
    prompt_top_logprobs: u32,
    padding: u32,
    seed: u64,
}

// SAFETY: numbers, laid out as in sampling.cuh.
unsafe impl Plain for SlotParams {}

/// Added to the logit of a token; `Edit` of sampling.cuh.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub struct Edit {
    token: u32,
    bias: f32,
}

// SAFETY: numbers, laid out as in sampling.cuh.
unsafe impl Plain for Edit {}

impl SlotParams {
    /// The device's form of a request's parameters, and the edits that go with it.
    ///
    /// # Errors
    /// When there are more biases, bans or alternatives than the kernel has room for; the message
    /// says which.
    pub fn new(params: &SamplingParams, seed: u64) -> Result<(Self, Vec<Edit>), CudaError> {
        let (biases, bans) = (&params.logit_bias, &params.min_tokens_banned);
        let tops = params.logprobs.max(params.prompt_logprobs).unwrap_or(0);
        for (name, len, max) in [
            ("logit biases", biases.len(), MAX_BIASES),
            ("tokens banned by min_tokens", bans.len(), MAX_BANS),
            ("alternatives in logprobs", tops as usize, MAX_TOP),
        ] {
            if len > max {
                return Err(CudaError::Config(format!(
                    "{len} {name} are more than the {max} that the GPU's sampler takes"
                )));
            }
        }
        let edits = biases.iter().map(|&(token, bias)| Edit { token, bias });
        let bans_as_edits = bans.iter().map(|&token| Edit {
            token,
            bias: f32::NEG_INFINITY,
        });
        let slot = Self {
            inv_temperature: match params.temperature {
                0.0 => 0.0,
                t => t.recip().min(f32::MAX),
            },
            top_p: params.top_p,
            min_p: params.min_p,
            top_k: params.top_k,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            has_penalties: params.has_penalties().into(),
            biases: biases.len() as u32,
            bans: bans.len() as u32,
            min_tokens: params.min_tokens,
            top_logprobs: params.logprobs.unwrap_or(NONE),
            prompt_top_logprobs: params.prompt_logprobs.unwrap_or(0),
            padding: 0,
            seed,
        };
        Ok((slot, edits.chain(bans_as_edits).collect()))
    }
}

/// A position that wants logits; `Want` of sampling.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct Want {
    /// [`NONE`]: padding, nothing to do.
    pub slot: u32,
    /// Of the batch.
    pub row: u32,
    /// Of the token that comes next.
    pub position: u32,
    /// The prompt token that comes next, if its logprob is wanted, else [`NONE`].
    pub target: u32,
    /// Whether (1) or not (0) to choose the token that comes next.
    pub sample: u32,
    /// Which of [`SampleTile::masks`] says what may be chosen; [`NONE`]: nothing is forbidden.
    pub mask: u32,
}

// SAFETY: numbers, laid out as in sampling.cuh.
unsafe impl Plain for Want {}

/// A chosen token or a prompt token; `Chosen` of sampling.cuh.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C)]
pub struct Chosen {
    /// -1: the row has failed, or nothing was asked for.
    pub token: i32,
    /// Its log-probability, if asked for.
    pub logprob: f32,
    /// Its rank, 1 for the most likely; 0 where no logprobs were asked for.
    pub rank: u32,
    /// How many alternatives there are.
    pub tops: u32,
}

// SAFETY: numbers, laid out as in sampling.cuh.
unsafe impl Plain for Chosen {}

/// An alternative.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[repr(C)]
pub struct Top {
    /// Which token.
    pub token: u32,
    /// Its log-probability.
    pub logprob: f32,
}

// SAFETY: numbers, laid out as in sampling.cuh.
unsafe impl Plain for Top {}

impl Chosen {
    /// The logprobs, if there are any. `tops`: those of this position.
    pub fn logprobs(&self, tops: &[Top]) -> Option<Logprobs> {
        let token = u32::try_from(self.token).ok()?;
        (self.rank > 0).then(|| Logprobs {
            token,
            logprob: self.logprob,
            rank: self.rank,
            top: tops[..self.tops as usize]
                .iter()
                .map(|t| (t.token, t.logprob))
                .collect(),
        })
    }
}

/// What slots remember on the device. A slot's part starts at its index times the slot's size.
#[derive(Debug, Clone, Copy)]
pub struct SlotMemory {
    /// One per slot.
    pub params: Slice<SlotParams>,
    /// [`MAX_EDITS`] per slot: biases, then bans.
    pub edits: Slice<Edit>,
    /// `[slots, counts_stride(vocab)]`: 0 for tokens never seen, else 1 + how often the token was sampled.
    pub counts: Slice<u16>,
    /// Tokens sampled so far, one per slot.
    pub generated: Slice<u32>,
    /// The token sampled last, one per slot; -1: none.
    pub last: Slice<i32>,
}

/// One tile of logits and where its results go.
#[derive(Debug, Clone, Copy)]
pub struct SampleTile {
    /// `[wants, stride]`; changed and restored.
    pub logits: Slice<f32>,
    /// Elements from row to row, a multiple of 4.
    pub stride: usize,
    /// Width of the logits.
    pub vocab: usize,
    /// What to do with each row.
    pub wants: Slice<Want>,
    /// `[masks, vocab / 32]` (rounded up), a bit for each token that is allowed.
    pub masks: Slice<u32>,
    /// One per row of the batch: 1 if it has failed; read and written.
    pub failed: Slice<u32>,
    /// `[2][wants]`: for prompt tokens, for sampled tokens.
    pub chosen: Slice<Chosen>,
    /// `[2][wants][MAX_TOP]`.
    pub tops: Slice<Top>,
}

/// From logits to tokens.
pub struct Sample {
    sample: Kernel,
    bind: Kernel,
    check: Kernel,
}

impl Sample {
    /// Loads the kernels.
    ///
    /// # Errors
    /// When the GPU can't run them.
    pub fn load(device: &Device) -> Result<Self, CudaError> {
        let module = Module::load(device, &image!("sample"))?;
        Ok(Self {
            sample: module.kernel(c"sample")?,
            bind: module.kernel(c"bind_slots")?,
            check: module.kernel(c"check_rows")?,
        })
    }

    /// Chooses a token for, or gives logprobs of, each wanted position.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Slots, rows, masks and tokens in `wants` are in range, no slot is sampled twice, the slots' edits
    /// name tokens below `vocab`; all memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If a buffer is too small or the vocabulary larger than [`MAX_VOCAB`].
    pub unsafe fn sample(
        &self,
        stream: &Stream,
        tile: &SampleTile,
        slots: &SlotMemory,
    ) -> Result<(), CudaError> {
        let (n, vocab) = (tile.wants.len(), tile.vocab);
        assert!(tile.stride.is_multiple_of(4) && tile.stride >= vocab && vocab <= MAX_VOCAB);
        assert!(tile.logits.len() >= n * tile.stride);
        assert!(tile.chosen.len() == 2 * n && tile.tops.len() == 2 * n * MAX_TOP);
        assert!(slots.edits.len() >= slots.params.len() * MAX_EDITS);
        assert!(slots.counts.len() >= slots.params.len() * counts_stride(vocab));
        if n == 0 {
            return Ok(());
        }
        let arguments = (
            tile.logits,
            tile.stride as u32,
            vocab as u32,
            tile.wants,
            slots.params,
            slots.edits,
            MAX_EDITS as u32,
            slots.counts,
            tile.masks,
            slots.generated,
            slots.last,
            tile.failed,
            tile.chosen,
            tile.tops,
        );
        // SAFETY: the types are those of sample.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe {
            self.sample
                .launch(stream, Shape::new(n as u32, THREADS), &arguments)
        }
    }

    /// Starts slots whose parameters were written before. `bound`: slot, first token in `prompts`
    /// and number of tokens, for each.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Slots and ranges are in range, tokens below `vocab`; all memory is alive until the kernel has
    /// run.
    pub unsafe fn bind(
        &self,
        stream: &Stream,
        bound: Slice<u32>,
        prompts: Slice<u32>,
        vocab: usize,
        slots: &SlotMemory,
    ) -> Result<(), CudaError> {
        let n = bound.len() / 3;
        if n == 0 {
            return Ok(());
        }
        let arguments = (
            bound,
            prompts,
            slots.params,
            vocab as u32,
            slots.counts,
            slots.generated,
            slots.last,
        );
        // SAFETY: the types are those of sample.cu, the caller vouches for the rest.
        unsafe {
            self.bind
                .launch(stream, Shape::new(n as u32, THREADS), &arguments)
        }
    }

    /// Marks rows that can't go on: the hidden state of their last token in `x`, `[tokens, width]`,
    /// is not finite, or the token they were to continue from does not exist. `rows`: index of the
    /// last token, and the slot whose last token is the input or [`NONE`], for each.
    ///
    /// # Errors
    /// When the device is lost.
    ///
    /// # Safety
    /// Indices and slots are in range; all memory is alive until the kernel has run.
    ///
    /// # Panics
    /// If the width is not a multiple of 8 or `failed` is too small.
    pub unsafe fn check(
        &self,
        stream: &Stream,
        x: Slice<bf16>,
        width: usize,
        rows: Slice<u32>,
        last: Slice<i32>,
        failed: Slice<u32>,
    ) -> Result<(), CudaError> {
        let n = rows.len() / 2;
        assert!(width.is_multiple_of(VEC) && failed.len() >= n);
        let shape = Shape::new(n.div_ceil(4) as u32, 128);
        let arguments = (x, width as u32, rows, n as u32, last, failed);
        // SAFETY: the types are those of sample.cu, the lengths were checked, the caller vouches for
        // the rest.
        unsafe { self.check.launch(stream, shape, &arguments) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn parameters_that_the_kernel_has_no_room_for_are_refused() {
        let params = SamplingParams {
            logprobs: Some(MAX_TOP as u32 + 1),
            ..SamplingParams::default()
        };
        let error = SlotParams::new(&params, 0).unwrap_err().to_string();
        assert!(error.contains("33 alternatives"), "{error}");
        let params = SamplingParams {
            logit_bias: (0..=MAX_BIASES as u32).map(|t| (t, 1.0)).collect(),
            ..SamplingParams::default()
        };
        assert!(SlotParams::new(&params, 0).is_err());
    }

    #[test]
    fn biases_come_before_bans() {
        let params = SamplingParams {
            logit_bias: vec![(3, 1.5)],
            min_tokens_banned: vec![7],
            ..SamplingParams::default()
        };
        let (slot, edits) = SlotParams::new(&params, 9).unwrap();
        assert_eq!((slot.biases, slot.bans, slot.seed), (1, 1, 9));
        let edits: Vec<_> = edits.iter().map(|e| (e.token, e.bias)).collect();
        assert_eq!(edits, [(3, 1.5), (7, f32::NEG_INFINITY)]);
    }

    /// The kernel reads these structs as sampling.cuh declares them.
    #[test]
    fn layouts_are_those_of_the_header() {
        assert_eq!(size_of::<SlotParams>(), 64);
        assert_eq!(std::mem::offset_of!(SlotParams, seed), 56);
        assert_eq!(size_of::<Want>(), 24);
        assert_eq!(size_of::<Chosen>(), 16);
        assert_eq!((size_of::<Top>(), size_of::<Edit>()), (8, 8));
    }
}
