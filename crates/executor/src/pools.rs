use crate::LocalKv;

/// What decides how KV memory is cut between the main pool and that of layers with a window.
#[derive(Debug, Clone, Copy)]
pub struct KvMemory {
    /// For all blocks of both pools.
    pub bytes: u64,
    /// Bytes of a main block, in all layers of that pool.
    pub main_block: u64,
    /// The same of the local pool.
    pub local_block: u64,
    /// Tokens of a block.
    pub block_size: u32,
    /// Most positions in one sequence.
    pub max_seq_len: u32,
    /// Most input tokens in one step.
    pub max_batch_tokens: u32,
}

/// Windows in a sequence of the length for which the pools are sized: shorter sequences run out of
/// local blocks first, longer ones of main blocks.
const TYPICAL_WINDOWS: u32 = 4;

impl KvMemory {
    /// Sizes two pools so that sequences of a typical length fill both alike: blocks of the main pool,
    /// and the other one. `None` if that would not pay: sequences are short, or the memory is.
    pub fn divide(&self, window: u32) -> Option<(u32, LocalKv)> {
        let size = self.block_size;
        let typical = window.saturating_mul(TYPICAL_WINDOWS);
        let typical = typical.min(self.max_seq_len).div_ceil(size);
        // A window may begin within a block.
        let windowed = window.div_ceil(size) + 1;
        if windowed >= typical {
            return None;
        }
        let (typical, windowed) = (u128::from(typical), u128::from(windowed));
        let (main_block, local_block) = (u128::from(self.main_block), u128::from(self.local_block));
        // Prompts that are being computed need room for a step beside their window.
        let step = self.max_batch_tokens.div_ceil(size);
        let budget = u128::from(self.bytes).saturating_sub(local_block * u128::from(step));
        let per_typical = main_block * typical + local_block * windowed;
        let main = (budget * typical / per_typical).min(u32::MAX.into());
        let local = (main * windowed / typical) as u32;
        let (main, blocks) = (main as u32, local.saturating_add(step));
        let least = LocalKv::least_blocks(window, size, self.max_batch_tokens);
        (blocks >= least && blocks < main).then_some((main, LocalKv { window, blocks }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORY: KvMemory = KvMemory {
        bytes: 1 << 30,
        main_block: 40_000,
        local_block: 200_000,
        block_size: 16,
        max_seq_len: 32_768,
        max_batch_tokens: 512,
    };

    #[test]
    fn sequences_of_four_windows_fill_both_pools_within_the_memory() {
        let window = 512;
        let (main, local) = MEMORY.divide(window).expect("a long context");
        let used =
            u64::from(main) * MEMORY.main_block + u64::from(local.blocks) * MEMORY.local_block;
        assert!(
            used <= MEMORY.bytes && used > MEMORY.bytes * 99 / 100,
            "{used}"
        );
        let sequences = main / (4 * window / 16);
        assert!(local.blocks >= sequences * (window / 16 + 1));
    }

    #[test]
    fn short_sequences_and_little_memory_get_one_pool() {
        let short = KvMemory {
            max_seq_len: 520,
            ..MEMORY
        };
        let little = KvMemory {
            bytes: 10 << 20,
            ..MEMORY
        };
        for memory in [short, little] {
            assert_eq!(memory.divide(512), None);
        }
    }
}
