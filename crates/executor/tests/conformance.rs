//! The conformance suite must find what it looks for: each executor here breaks one promise.
#![allow(clippy::unwrap_used)]

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Instant;

use spate_executor::{
    Batch, Bind, Capacity, Completion, Executor, ExecutorError, Input, Lane, RowOutput, SimConfig,
    SimExecutor, Ticket, TokenMask,
    conformance::{self, Recompute},
};
use spate_types::Slot;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    AcceptsAnything,
    MixesTickets,
    Neighbours,
    Chunks,
    Placement,
    LosesCopies,
    Last,
    Recomputation,
    RecomputesBadly,
    KeepsBind,
    IgnoresSeed,
    IgnoresMasks,
    PromptLogprobs,
    PrefillLane,
    SharedPrefix,
}

struct Broken {
    fault: Fault,
    inner: SimExecutor,
    batches: HashMap<Ticket, (Lane, Batch)>,
    first_binds: HashMap<Slot, Bind>,
    accepted: VecDeque<Ticket>,
}

impl Broken {
    fn tamper_with_batch(&mut self, batch: &mut Batch) {
        // Bad batches, which have a copy or two, are still to be refused.
        if self.fault == Fault::LosesCopies && batch.copies.len() > 2 {
            batch.copies.clear();
        }
        // So are bad rows, which come second.
        let second = batch.rows.len() == 2 && batch.rows[0].bind.is_none();
        for row in &mut batch.rows {
            if self.fault == Fault::Last && row.input == Input::Last {
                row.input = Input::Tokens(vec![0]);
            }
            let Some(bind) = &mut row.bind else {
                continue;
            };
            if self.fault == Fault::IgnoresSeed {
                bind.seed = 0;
            }
            let first = self
                .first_binds
                .entry(row.slot)
                .or_insert_with(|| bind.clone());
            if self.fault == Fault::KeepsBind && !second {
                bind.sampling = Arc::clone(&first.sampling);
                bind.seed = first.seed;
            }
        }
    }

    fn tamper_with_outputs(&self, lane: Lane, batch: &Batch, outputs: &mut [RowOutput]) {
        for (row, output) in batch.rows.iter().zip(outputs) {
            let prompt_row = row.input != Input::Last;
            let wrong = match self.fault {
                Fault::Neighbours => batch.rows.len() > 1,
                Fault::Chunks => row.start == 24 && prompt_row,
                Fault::Placement => row.blocks.len() > 1 && row.blocks[0] > row.blocks[1],
                Fault::Recomputation => row.bind.is_none() && row.start == 0,
                Fault::PrefillLane => lane == Lane::Prefill,
                Fault::SharedPrefix => row.bind.is_some() && row.start > 0,
                _ => false,
            };
            // As little as can be wrong.
            if wrong
                && let Some(logprobs) = output.sampled.as_mut().and_then(|s| s.logprobs.as_mut())
            {
                logprobs.logprob = logprobs.logprob.next_down();
            }
            if self.fault == Fault::RecomputesBadly
                && row.bind.is_none()
                && row.start == 0
                && let Some(logprobs) = output.sampled.as_mut().and_then(|s| s.logprobs.as_mut())
            {
                logprobs.top[0].1 -= 0.2;
            }
            if self.fault == Fault::PromptLogprobs && row.start > 0 {
                output.prompt_logprobs.pop();
            }
        }
    }
}

impl Executor for Broken {
    fn capacity(&self) -> &Capacity {
        self.inner.capacity()
    }

    fn submit(&mut self, lane: Lane, mut batch: Batch) -> Result<Ticket, ExecutorError> {
        self.tamper_with_batch(&mut batch);
        match self.inner.submit(lane, batch.clone()) {
            Err(_) if self.fault == Fault::AcceptsAnything => Ok(Ticket(u64::MAX)),
            Err(error) => Err(error),
            Ok(ticket) => {
                self.batches.insert(ticket, (lane, batch));
                self.accepted.push_back(ticket);
                Ok(ticket)
            }
        }
    }

    fn mask(&mut self, ticket: Ticket, mut masks: Vec<TokenMask>) -> Result<(), ExecutorError> {
        if self.fault == Fault::IgnoresMasks && masks.len() > 1 {
            masks[0] = masks[0].iter().map(|_| u32::MAX).collect();
        }
        self.inner.mask(ticket, masks)
    }

    fn wait(&mut self, deadline: Instant) -> Result<Option<Completion>, ExecutorError> {
        let Some(mut completion) = self.inner.wait(deadline)? else {
            return Ok(None);
        };
        let (lane, batch) = self.batches.remove(&completion.ticket).unwrap();
        self.tamper_with_outputs(lane, &batch, &mut completion.outputs);
        self.accepted.pop_front();
        if self.fault == Fault::MixesTickets
            && let Some(&other) = self.accepted.front()
        {
            completion.ticket = other;
        }
        Ok(Some(completion))
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
    }
}

#[test]
fn each_broken_promise_is_found() {
    use Fault::*;
    let faults = [
        (AcceptsAnything, "must be rejected"),
        (MixesTickets, "order of submission"),
        (Neighbours, "neighbours"),
        (Chunks, "chunks"),
        (Placement, "place of its blocks"),
        // Told by the simulator, which knows what was never written.
        (LosesCopies, "not written"),
        (Last, "Input::Last"),
        (Recomputation, "recomputation"),
        // By whichever check first uses a slot again.
        (KeepsBind, "output"),
        (IgnoresSeed, "seed has no effect"),
        (IgnoresMasks, "a masked token was chosen"),
        (PromptLogprobs, "prompt's logprobs"),
        (PrefillLane, "the lane of the prefill"),
        (SharedPrefix, "computed by another sequence"),
    ];
    for (fault, expected) in faults {
        let message = complaint(fault, Recompute::Exact).expect("the suite passed it");
        assert!(message.contains(expected), "{fault:?}: {message}");
    }
}

#[test]
fn where_rounding_is_allowed_more_is_found() {
    assert_eq!(complaint(Fault::Recomputation, Recompute::Rounded), None);
    let message = complaint(Fault::RecomputesBadly, Recompute::Rounded).unwrap();
    assert!(message.contains("best token's"), "{message}");
}

/// What the suite says of a broken executor.
fn complaint(fault: Fault, recompute: Recompute) -> Option<String> {
    let config = SimConfig::new(Capacity {
        slots: 4,
        blocks: 40,
        block_size: 8,
        local: None,
        max_batch_tokens: 100,
        step_tokens: None,
        max_seq_len: 128,
        vocab_size: 50,
        lanes: vec![Lane::Main, Lane::Prefill],
        depth: 2,
    });
    let mut make = || -> Box<dyn Executor> {
        Box::new(Broken {
            fault,
            inner: SimExecutor::new(config.clone()),
            batches: HashMap::new(),
            first_binds: HashMap::new(),
            accepted: VecDeque::new(),
        })
    };
    let suite = AssertUnwindSafe(|| conformance::run_with(recompute, &mut make));
    let panic = catch_unwind(suite).err()?;
    Some(panic.downcast::<String>().map_or_else(
        |panic| panic.downcast::<&str>().unwrap().to_string(),
        |message| *message,
    ))
}
