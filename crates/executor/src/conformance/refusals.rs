//! Batches that break a rule must be refused whole.

use std::sync::Arc;

use spate_types::{BlockId, LocalBlocks, SamplingParams, Slot};

use super::{Job, Rig, sampled};
use crate::{Batch, Bind, BlockCopy, Capacity, ExecutorError, Input, Lane, Row};

impl Rig {
    /// Each batch has a good row first: nothing of it may run.
    pub(super) fn refuses_bad_batches(&mut self) {
        let good = self.job(1, 0, 0);
        let alone = self.alone(&good);
        let first = self.step(vec![good.prompt_row(0, good.prompt_len(), true)]);
        let next = || good.decode_row(good.prompt_len(), Input::Last);
        let job = self.job(2, 1, 1);
        let row = job.prompt_row(0, job.prompt_len(), true);
        let Capacity {
            slots,
            blocks,
            vocab_size,
            max_seq_len,
            ..
        } = self.capacity;
        let bound_with = |sampling: SamplingParams| {
            Some(Bind {
                sampling: Arc::new(sampling),
                ..job.bind.clone()
            })
        };

        let bad_rows = [
            (
                "a slot out of range",
                Row {
                    slot: Slot(slots),
                    ..row.clone()
                },
            ),
            (
                "a slot twice",
                Row {
                    slot: good.slot,
                    ..row.clone()
                },
            ),
            (
                "a first row without a bind",
                Row {
                    bind: None,
                    ..row.clone()
                },
            ),
            (
                "a mask without a sample",
                Row {
                    sample: false,
                    masked: true,
                    ..row.clone()
                },
            ),
            (
                "no input",
                Row {
                    input: Input::Tokens(Vec::new()),
                    ..row.clone()
                },
            ),
            (
                "an input id out of the vocabulary",
                Row {
                    input: Input::Tokens(vec![vocab_size]),
                    ..row.clone()
                },
            ),
            (
                "Input::Last before a sample",
                Row {
                    input: Input::Last,
                    ..row.clone()
                },
            ),
            (
                "a position past the longest sequence",
                Row {
                    start: max_seq_len,
                    ..row.clone()
                },
            ),
            (
                "a position that overflows",
                Row {
                    start: u32::MAX,
                    ..row.clone()
                },
            ),
            (
                "too few blocks",
                Row {
                    blocks: Arc::new(Vec::new()),
                    ..row.clone()
                },
            ),
            (
                "a block out of range",
                Row {
                    blocks: Arc::new(vec![BlockId(blocks); self.width as usize]),
                    ..row.clone()
                },
            ),
            (
                "a block that another row writes",
                // Both write the block of the good row's next position.
                Row {
                    blocks: Arc::clone(&good.blocks),
                    ..job.prompt_row_at(good.prompt_len())
                },
            ),
            (
                "an empty prompt",
                Row {
                    bind: Some(Bind {
                        prompt: Arc::new([]),
                        ..job.bind.clone()
                    }),
                    ..row.clone()
                },
            ),
            (
                "a prompt id out of the vocabulary",
                Row {
                    bind: Some(Bind {
                        prompt: Arc::new([vocab_size]),
                        ..job.bind.clone()
                    }),
                    ..row.clone()
                },
            ),
            (
                "a logit_bias id out of the vocabulary",
                Row {
                    bind: bound_with(SamplingParams {
                        logit_bias: vec![(vocab_size, 1.0)],
                        ..SamplingParams::default()
                    }),
                    ..row.clone()
                },
            ),
            (
                "a banned id out of the vocabulary",
                Row {
                    bind: bound_with(SamplingParams {
                        min_tokens_banned: vec![vocab_size],
                        ..SamplingParams::default()
                    }),
                    ..row.clone()
                },
            ),
        ];
        self.refused("no rows", Vec::new());
        for (what, bad) in bad_rows {
            self.refused(what, vec![next(), bad]);
        }
        self.refuses_bad_local_blocks(&next(), &row);
        self.refuses_bad_copies(&next());
        self.refuses_too_many_tokens(&next());
        if !self.capacity.lanes.contains(&Lane::Prefill) {
            let batch = Batch {
                rows: vec![next()],
                ..Batch::default()
            };
            let result = self.executor.submit(Lane::Prefill, batch);
            assert!(
                matches!(result, Err(ExecutorError::Rejected(_))),
                "an unknown lane"
            );
        }

        let mut output = vec![sampled(&first[0])];
        self.decode(&good, &mut output);
        assert_eq!(output, alone, "something of a rejected batch ran");
    }

    fn refuses_bad_local_blocks(&mut self, good: &Row, row: &Row) {
        let with = |first: u32, block: u32| Row {
            local: LocalBlocks {
                first,
                blocks: Arc::new(vec![BlockId(block); self.width as usize]),
            },
            ..row.clone()
        };
        let copy = |src: u32, dst: u32| {
            let (src, dst) = (BlockId(src), BlockId(dst));
            vec![BlockCopy { src, dst }]
        };
        let Some(local) = self.capacity.local else {
            let bad = vec![good.clone(), with(0, 0)];
            return self.refused("local blocks where there is no pool of them", bad);
        };
        let copies = Batch {
            local_copies: copy(0, local.blocks),
            rows: vec![good.clone()],
            ..Batch::default()
        };
        let twice = Row {
            local: good.local.clone(),
            ..row.clone()
        };
        let none = Row {
            local: LocalBlocks::default(),
            ..row.clone()
        };
        let bad = [
            ("a local block out of range", with(0, local.blocks)),
            ("local blocks that begin behind what is seen", with(1, 0)),
            ("no local blocks", none),
        ];
        for (what, bad) in bad {
            self.refused(what, vec![good.clone(), bad]);
        }
        self.refused_batch("a local copy to out of range", copies);
        // Both start at 0, in the same local blocks.
        let first = Row {
            start: 0,
            ..good.clone()
        };
        self.refused("a local block that another row writes", vec![first, twice]);
    }

    fn refuses_bad_copies(&mut self, good: &Row) {
        let copy = |src: u32, dst: u32| BlockCopy {
            src: BlockId(src),
            dst: BlockId(dst),
        };
        let (last, beyond) = (self.capacity.blocks - 1, self.capacity.blocks);
        let bad = [
            ("a copy from out of range", vec![copy(beyond, last)]),
            ("a copy to out of range", vec![copy(last, beyond)]),
            ("a copy onto itself", vec![copy(last, last)]),
            (
                "two copies to one block",
                vec![copy(last - 1, last), copy(last - 2, last)],
            ),
            (
                "a copy of a copy",
                vec![copy(last - 2, last - 1), copy(last - 1, last)],
            ),
        ];
        for (what, copies) in bad {
            self.refused_batch(
                what,
                Batch {
                    copies,
                    rows: vec![good.clone()],
                    ..Batch::default()
                },
            );
        }
    }

    fn refuses_too_many_tokens(&mut self, good: &Row) {
        // Only if one row can hold them all.
        let len = self.capacity.max_batch_tokens;
        let width = len.div_ceil(self.capacity.block_size);
        if len > self.capacity.max_seq_len || 2 * width > self.capacity.blocks {
            return;
        }
        let blocks = (self.capacity.blocks - width..self.capacity.blocks)
            .map(BlockId)
            .collect();
        let big = Row {
            input: Input::Tokens(vec![0; len as usize]),
            blocks: Arc::new(blocks),
            ..self.job(2, 1, 1).prompt_row(0, 1, true)
        };
        self.refused("more tokens than a batch may have", vec![good.clone(), big]);
    }
}

impl Job {
    /// The first prompt token, put at `position`.
    fn prompt_row_at(&self, position: u32) -> Row {
        Row {
            start: position,
            ..self.prompt_row(0, 1, true)
        }
    }
}
