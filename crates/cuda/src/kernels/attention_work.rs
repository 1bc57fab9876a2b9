use std::cmp::Reverse;

use spate_types::BlockId;

use crate::driver::Plain;

/// What a step computes of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sequence {
    /// Its first token in the step.
    pub token: u32,
    /// How many tokens.
    pub tokens: u32,
    /// Position of the first.
    pub position: u32,
    /// Where its block table begins in the step's tables.
    pub table: u32,
}

/// A unit of work, for each key/value head: a tile of query rows, or a split of positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Work {
    token: u32,
    tokens: u32,
    position: u32,
    table: u32,
    part: u32,
}

// SAFETY: numbers, laid out as in attention.cuh.
unsafe impl Plain for Work {}

/// A sequence that computes one new token, in the work of one of its splits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Sharer {
    token: u32,
    position: u32,
    slot: u32,
}

// SAFETY: numbers, laid out as in attention.cuh.
unsafe impl Plain for Sharer {}

/// Says that work is for as many blocks as there are.
pub const ALL_BLOCKS: u32 = u32::MAX;

/// What [`Tiling::decode_work`] lists.
#[derive(Debug, Clone, Default)]
pub struct DecodeWork {
    /// The work.
    pub work: Vec<Work>,
    /// Who shares it: of each work some neighbours, at least one.
    pub sharers: Vec<Sharer>,
}

impl DecodeWork {
    fn push(
        &mut self,
        sharers: impl Iterator<Item = Sharer>,
        position: u32,
        table: u32,
        part: u32,
    ) {
        let token = self.sharers.len() as u32;
        self.sharers.extend(sharers);
        self.work.push(Work {
            token,
            tokens: self.sharers.len() as u32 - token,
            position,
            table,
            part,
        });
    }
}

/// How attention cuts a step into works, of which each is done by one block.
#[derive(Debug, Clone, Copy)]
pub struct Tiling {
    /// Query heads per key/value head.
    pub group: u32,
    /// Positions of a block of the cache.
    pub block_size: u32,
    /// Query rows (a token's heads of one key/value head, token after token) of a tile of prompts.
    pub tile_rows: u32,
    /// Positions of a split.
    pub split: u32,
    /// How many sequences may share the work of a split.
    pub sharers: u32,
    /// Of the GPU, as far as it is used.
    pub sms: u32,
}

/// A split that others may share: which, its blocks, the sequence's table.
type Shareable<'a> = (u32, &'a [BlockId], u32, Sharer);

impl Tiling {
    /// Lists the work of sequences that compute prompt tokens, the largest first.
    pub fn prefill_work(&self, sequences: &[Sequence], window: Option<u32>, work: &mut Vec<Work>) {
        work.clear();
        for s in sequences {
            let Sequence {
                token,
                tokens,
                position,
                table,
            } = *s;
            work.extend((0..self.prefill_tiles(tokens)).map(|part| Work {
                token,
                tokens,
                position,
                table,
                part,
            }));
        }
        work.sort_by_key(|w| Reverse(self.prefill_positions(w, window)));
    }

    /// How many works so many prompt tokens of one sequence are.
    pub fn prefill_tiles(&self, tokens: u32) -> u32 {
        (tokens * self.group).div_ceil(self.tile_rows)
    }

    /// About how many positions a tile meets.
    fn prefill_positions(&self, work: &Work, window: Option<u32>) -> u32 {
        let end = ((work.part + 1) * self.tile_rows).div_ceil(self.group);
        (work.position + end.min(work.tokens)).min(window.unwrap_or(u32::MAX))
    }

    /// Lists the work of sequences that compute one new token each: the splits of positions that they see,
    /// the largest first. Where sequences have the same blocks in a split, and no window, it is one work.
    pub fn decode_work(
        &self,
        sequences: &[(Sequence, &[BlockId])],
        window: Option<u32>,
        list: &mut DecodeWork,
    ) {
        let split = self.split;
        let (mut shareable, mut slot) = (Vec::new(), 0);
        list.work.clear();
        list.sharers.clear();
        for (s, blocks) in sequences {
            let end = s.position + 1;
            let first = window.map_or(0, |window| end.saturating_sub(window)) / split;
            let sharer = Sharer {
                token: s.token,
                position: s.position,
                slot,
            };
            slot += end.div_ceil(split) - first;
            // What all see to its end can be shared.
            let whole = match window {
                None if self.sharers > 1 => end / split,
                _ => first,
            };
            shareable.extend((first..whole).map(|part| -> Shareable<'_> {
                (part, self.blocks_of(part, blocks), s.table, sharer)
            }));
            for part in whole..end.div_ceil(split) {
                list.push([sharer].into_iter(), s.position, s.table, part);
            }
        }
        // Equal splits become neighbours. Nearly always the ends of splits tell them apart.
        let ends = |blocks: &[BlockId]| (blocks.first().copied(), blocks.last().copied());
        shareable.sort_by_key(|s| (s.0, ends(s.1)));
        for same in shareable.chunk_by(|a, b| (a.0, a.1) == (b.0, b.1)) {
            for shared in same.chunks(self.sharers as usize) {
                let (part, _, table, sharer) = shared[0];
                let position = match shared.len() {
                    1 => sharer.position,
                    _ => (part + 1) * split - 1,
                };
                list.push(shared.iter().map(|s| s.3), position, table, part);
            }
        }
        list.work
            .sort_by_key(|w| Reverse((self.decode_positions(w), w.tokens)));
    }

    /// The blocks of a split.
    fn blocks_of<'a>(&self, part: u32, blocks: &'a [BlockId]) -> &'a [BlockId] {
        let first = part * self.split / self.block_size;
        let end = ((part + 1) * self.split).div_ceil(self.block_size);
        &blocks[first as usize..end as usize]
    }

    /// Positions of a split up to the query's own.
    fn decode_positions(&self, work: &Work) -> u32 {
        (work.position + 1 - work.part * self.split).min(self.split)
    }

    /// How many thread blocks should compute prompts while others decode, if any do. Prompts are bound by
    /// arithmetic and leave the memory to decoding, which needs only some SMs to keep it busy: so they get as many
    /// as will do to end somewhat sooner, all if decoding is little.
    pub fn prefill_blocks(&self, prompts: &[Work], decodes: &[Work], window: Option<u32>) -> u32 {
        // In these units a tile and position of prompts take an H100 about as long as a position of a split; and
        // to begin and end a tile, as long as some positions more.
        const TILE: u64 = 256;
        let prompts = prompts
            .iter()
            .map(|w| u64::from(self.prefill_positions(w, window)) + TILE);
        let decodes = decodes.iter().map(|w| u64::from(self.decode_positions(w)));
        let (prompts, decodes) = (prompts.sum::<u64>(), decodes.sum::<u64>());
        match 4 * prompts < 3 * decodes {
            true => self
                .sms
                .div_ceil(4)
                .max((u64::from(self.sms) * 4 * prompts / (3 * decodes)) as u32),
            false => ALL_BLOCKS,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const TILING: Tiling = Tiling {
        group: 4,
        block_size: 48,
        tile_rows: 128,
        split: 1024,
        sharers: 16,
        sms: 132,
    };

    fn sequence(token: u32, position: u32) -> Sequence {
        Sequence {
            token,
            tokens: 1,
            position,
            table: 1000 * token,
        }
    }

    /// Who computes which split of whom, checked: (token, split), in the order of the list.
    fn splits(list: &DecodeWork, sequences: &[(Sequence, &[BlockId])]) -> Vec<(u32, u32)> {
        let mut splits = Vec::new();
        let mut slots = Vec::new();
        for work in &list.work {
            let sharers = &list.sharers[work.token as usize..][..work.tokens as usize];
            let blocks = |token: u32| TILING.blocks_of(work.part, sequences[token as usize].1);
            for sharer in sharers {
                splits.push((sharer.token, work.part));
                slots.push(sharer.slot + work.part);
                if work.tokens > 1 {
                    assert_eq!(blocks(sharer.token), blocks(sharers[0].token));
                    assert!((work.part + 1) * TILING.split <= sharer.position + 1);
                    assert_eq!(work.position, (work.part + 1) * TILING.split - 1);
                } else {
                    assert_eq!(work.position, sharer.position);
                }
            }
        }
        slots.sort_unstable();
        assert!(slots.into_iter().eq(0..list.sharers.len() as u32));
        splits
    }

    proptest! {
        #[test]
        fn each_split_is_computed_once(
            sequences in prop::collection::vec((0u32..4000, 0usize..4, 0usize..90), 1..50)
        ) {
            // Each sequence has the first blocks of one of four prefixes, and then its own.
            let tables: Vec<Vec<BlockId>> = sequences.iter().zip(1u32..).map(|(s, i)| {
                let own = |block: usize| match block < s.2 {
                    true => 10_000 * s.1 + block,
                    false => 100_000 * i as usize + block,
                };
                (0..=s.0 as usize / 48).map(|block| BlockId(own(block) as u32)).collect()
            }).collect();
            let decodes: Vec<(Sequence, &[BlockId])> = sequences.iter().zip(&tables).zip(0..)
                .map(|((s, table), token)| (sequence(token, s.0), &table[..]))
                .collect();
            let mut list = DecodeWork::default();
            TILING.decode_work(&decodes, None, &mut list);
            let mut found = splits(&list, &decodes);
            found.sort_unstable();
            let expected = decodes.iter().flat_map(|(s, _)| {
                (0..=s.position / TILING.split).map(|part| (s.token, part))
            });
            prop_assert!(found.into_iter().eq(expected));
            let positions = list.work.iter().map(|w| Reverse(TILING.decode_positions(w)));
            prop_assert!(positions.is_sorted());
        }
    }

    #[test]
    fn a_shared_prefix_is_read_by_as_few_works_as_can_be() {
        let prefix: Vec<BlockId> = (0..2048 / 32).map(BlockId).collect();
        let tables: Vec<Vec<BlockId>> = (0..51)
            .map(|i| [&prefix[..], &[1000 + i, 2000 + i].map(BlockId)].concat())
            .collect();
        let decodes: Vec<(Sequence, &[BlockId])> = tables
            .iter()
            .zip(0..)
            .map(|(table, token)| (sequence(token, 2100), &table[..]))
            .collect();
        let tiling = Tiling {
            block_size: 32,
            ..TILING
        };
        let mut list = DecodeWork::default();
        tiling.decode_work(&decodes, None, &mut list);
        let shared = list.work.iter().filter(|w| w.tokens > 1).count();
        assert_eq!((list.work.len(), shared), (8 + 51, 8));
        // A window hides some of it from some.
        tiling.decode_work(&decodes, Some(2048), &mut list);
        assert_eq!(list.work.len(), 3 * 51);
        assert!(list.work.iter().all(|w| w.tokens == 1));
    }

    #[test]
    fn prompts_leave_room_for_decoding_that_takes_longer() {
        let prompt = |tokens, position| Sequence {
            token: 0,
            tokens,
            position,
            table: 0,
        };
        let blocks = |prompt: Sequence, decoding: u32, position: u32| {
            let (mut prompts, mut decodes) = (Vec::new(), DecodeWork::default());
            TILING.prefill_work(&[prompt], None, &mut prompts);
            let table = |i: u32| (0..200).map(|block| BlockId(200 * i + block)).collect();
            let tables: Vec<Vec<BlockId>> = (0..decoding).map(table).collect();
            let sequences = tables.iter().zip(0..);
            let sequences: Vec<(Sequence, &[BlockId])> = sequences
                .map(|(table, token)| (sequence(token, position), &table[..]))
                .collect();
            TILING.decode_work(&sequences, None, &mut decodes);
            TILING.prefill_blocks(&prompts, &decodes.work, None)
        };
        assert_eq!(blocks(prompt(512, 512), 256, 640), 33);
        assert_eq!(blocks(prompt(512, 512), 50, 640), 91);
        assert_eq!(blocks(prompt(512, 6144), 3, 8191), ALL_BLOCKS);
        assert_eq!(blocks(prompt(512, 512), 0, 0), ALL_BLOCKS);
    }
}
