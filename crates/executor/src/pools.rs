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

/// What sequences of the length for which the pools are sized take, in blocks.
struct Shares {
    /// Of the main pool, each.
    typical: u128,
    /// Of the local pool, each: a window may begin within a block.
    windowed: u128,
    /// Of the local pool, once: prompts that are being computed need room for a step beside their
    /// windows.
    step: u32,
}

impl KvMemory {
    /// Sizes two pools so that sequences of a typical length fill both alike: blocks of the main pool,
    /// and the other one. `None` if that would not pay: sequences are short, or the memory is.
    pub fn divide(&self, window: u32) -> Option<(u32, LocalKv)> {
        let shares = self.shares(window);
        if shares.windowed >= shares.typical {
            return None;
        }
        let local_block = u128::from(self.local_block);
        let budget = u128::from(self.bytes).saturating_sub(local_block * u128::from(shares.step));
        let main = budget * shares.typical / self.typical_bytes(&shares);
        let main = main.min(u32::MAX.into());
        let local = (main * shares.windowed / shares.typical) as u32;
        let (main, blocks) = (main as u32, local.saturating_add(shares.step));
        let least = LocalKv::least_blocks(window, self.block_size, self.max_batch_tokens);
        (blocks >= least && blocks < main).then_some((main, LocalKv { window, blocks }))
    }

    /// The least memory, whatever [`bytes`](Self::bytes) says, in which `sequences` of `tokens`
    /// positions have room together. `None` if no memory is enough: blocks are counted in 32 bits.
    pub fn needed(&self, window: Option<u32>, sequences: u32, tokens: u32) -> Option<u64> {
        let blocks = u128::from(tokens.div_ceil(self.block_size).max(1));
        let sequences = u128::from(sequences);
        let main = sequences * blocks;
        let block_bytes = u128::from(self.main_block) + u128::from(self.local_block);
        let one_pool = main * block_bytes;
        let Some(window) = window else {
            let most = u128::from(u32::MAX) * block_bytes;
            return (one_pool <= most).then_some(u64::try_from(one_pool).ok()?);
        };
        let shares = self.shares(window);
        let local = sequences * blocks.min(shares.windowed);
        let typical = main.max((local * shares.typical).div_ceil(shares.windowed));
        let two_pools = (typical * self.typical_bytes(&shares)).div_ceil(shares.typical)
            + u128::from(self.local_block) * u128::from(shares.step);
        // Which of them there will be depends on the memory.
        let holds = |bytes: &u128| {
            let Ok(bytes) = u64::try_from(*bytes) else {
                return false;
            };
            match (Self { bytes, ..*self }).divide(window) {
                Some((blocks, pool)) => {
                    u128::from(blocks) >= main
                        && u128::from(pool.blocks) >= local + u128::from(shares.step)
                }
                None => (main..=u32::MAX.into()).contains(&(u128::from(bytes) / block_bytes)),
            }
        };
        let sizes = [one_pool.min(two_pools), one_pool.max(two_pools)];
        sizes.into_iter().find(holds).map(|bytes| bytes as u64)
    }

    fn shares(&self, window: u32) -> Shares {
        let typical = window.saturating_mul(TYPICAL_WINDOWS).min(self.max_seq_len);
        Shares {
            typical: typical.div_ceil(self.block_size).max(1).into(),
            windowed: (window.div_ceil(self.block_size) + 1).into(),
            step: self.max_batch_tokens.div_ceil(self.block_size),
        }
    }

    /// Bytes that a sequence of the typical length takes, times its blocks of the main pool.
    fn typical_bytes(&self, shares: &Shares) -> u128 {
        let (main_block, local_block) = (u128::from(self.main_block), u128::from(self.local_block));
        main_block * shares.typical + local_block * shares.windowed
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

    #[test]
    fn what_is_needed_holds_the_sequences_and_little_more() {
        let mut pools = [0, 0];
        for sequences in [1, 2, 9, 64, 300] {
            for tokens in [1, 16, 200, 512, 529, 2048, 5000, 32_768] {
                let bytes = MEMORY
                    .needed(Some(512), sequences, tokens)
                    .expect("not many");
                let main = sequences * tokens.div_ceil(16);
                let local = sequences * tokens.div_ceil(16).min(33) + 32;
                let holds = |bytes| match (KvMemory { bytes, ..MEMORY }).divide(512) {
                    Some((blocks, pool)) => blocks >= main && pool.blocks >= local,
                    None => bytes / 240_000 >= main.into(),
                };
                assert!(holds(bytes), "{sequences} of {tokens}");
                assert!(!holds(bytes - 240_000), "{sequences} of {tokens}");
                pools[usize::from(bytes < u64::from(main) * 240_000)] += 1;
            }
        }
        assert!(
            pools.iter().all(|&n| n > 5),
            "one pool, two pools: {pools:?}"
        );
        assert_eq!(MEMORY.needed(None, 3, 17), Some(6 * 240_000));
        for window in [None, Some(512)] {
            assert_eq!(MEMORY.needed(window, u32::MAX, 32_768), None);
        }
    }
}
