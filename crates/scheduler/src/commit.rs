use std::sync::Arc;

use spate_executor::{Lane, RowOutput};
use spate_types::{FinishReason, Logprobs, Micros, RequestId, SampledToken};

use crate::Event;
use crate::policy;
use crate::scheduler::{Scheduler, StepRow, last_step_of};
use crate::sequence::{Rank, Sequence};

impl Scheduler {
    /// The oldest uncommitted step of `lane` came back.
    ///
    /// # Panics
    /// If nothing is in flight on `lane`, or `outputs` has not one entry per row.
    pub fn commit(&mut self, lane: Lane, outputs: Vec<RowOutput>, now: Micros) {
        let step = self.in_flight[lane as usize]
            .pop_front()
            .expect("a step is in flight");
        assert_eq!(step.rows.len(), outputs.len(), "one output per row");
        // First these: a source of a copy goes before the sequence's other blocks, its parents.
        for block in step.retired_blocks {
            self.blocks.release_block(block);
        }
        for block in step.retired_local {
            self.blocks.release_local_block(block);
        }
        for slot in step.retired_slots {
            self.slots.release(slot);
        }
        for (row, output) in step.rows.iter().zip(outputs) {
            self.commit_row(row, output, now);
        }
    }

    fn commit_row(&mut self, row: &StepRow, output: RowOutput, now: Micros) {
        self.counters.computed_tokens += u64::from(row.end - row.start);
        let rank = row.rank;
        // In line if it was preempted meanwhile: its token counts all the same, its KV is gone.
        let running = self.running.contains_key(&rank);
        let line = if running {
            &mut self.running
        } else {
            &mut self.waiting
        };
        let Some(seq) = line.get_mut(&rank) else {
            return; // It ended while this row was in flight.
        };
        let id = seq.id;
        seq.in_flight -= 1;
        seq.pending -= u32::from(row.sample);
        if output.failed {
            self.end(id.request, id.index, FinishReason::Error, now);
            return;
        }
        self.deliver_prompt_logprobs(id.request, row.start + 1, output.prompt_logprobs);
        if running {
            self.commit_kv(rank, row);
        }
        if let Some(token) = output.sampled {
            self.commit_token(rank, token, now);
        }
    }

    /// Prompt logprobs of positions `first ..`; those delivered before a preemption come again.
    fn deliver_prompt_logprobs(&mut self, id: RequestId, first: u32, mut logprobs: Vec<Logprobs>) {
        if logprobs.is_empty() {
            return;
        }
        let request = self.requests.get_mut(&id).expect("its sequence is live");
        debug_assert!(
            first <= request.next_prompt_logprob,
            "prompt logprobs were skipped"
        );
        let known = request.next_prompt_logprob.saturating_sub(first) as usize;
        logprobs.drain(..known.min(logprobs.len()));
        if !logprobs.is_empty() {
            request.next_prompt_logprob += logprobs.len() as u32;
            self.events.push(Event::PromptLogprobs {
                request: id,
                logprobs,
            });
        }
    }

    /// The KV of a running sequence's row is written: publish it, and fork the siblings that waited
    /// for the prompt.
    fn commit_kv(&mut self, rank: Rank, row: &StepRow) {
        let seq = self.running.get_mut(&rank).expect("the caller found it");
        seq.committed = row.end;
        let replaced = self
            .blocks
            .publish(&mut seq.table, &seq.tokens[..row.end as usize]);
        match last_step_of(&mut self.in_flight, seq) {
            Some(step) => step.retired_blocks.extend(replaced),
            None => replaced
                .into_iter()
                .for_each(|block| self.blocks.release_block(block)),
        }
        // Rows in flight start behind this one, and so does what comes, but for siblings, which
        // begin with its last position.
        self.blocks.trim(&mut seq.table, row.end - 1);
        let id = seq.id;
        // Not before it samples: were it recomputing on the prefill lane, it would go on writing
        // there to the block that its siblings copy on the main one.
        if id.index == 0 && row.sample {
            self.fork_siblings(rank, id.request);
        }
    }

    /// The siblings share the prompt's blocks and compute only its last token again (for the
    /// logits), each in its own copy of the last block. Those that cannot run now line up.
    fn fork_siblings(&mut self, rank: Rank, id: RequestId) {
        let request = self.requests.get_mut(&id).expect("its sequence is live");
        let unborn = std::mem::take(&mut request.unborn);
        if unborn.is_empty() {
            return;
        }
        let shared = Arc::clone(&request.request);
        self.unborn -= unborn.len() as u32;
        let mut forked = 0;
        for index in unborn {
            let sibling = Rank { index, ..rank };
            self.line_up(&shared, sibling);
            let first = self
                .waiting
                .first_key_value()
                .is_some_and(|(&head, _)| head == sibling);
            let room = self.running.len() < self.config.max_num_seqs as usize
                && self.slots.available() > 0
                && self.blocks.available() > policy::reserve_blocks(self.capacity.blocks) + forked
                && self.blocks.local_available() > forked;
            // Not if it was preempted before its first token came and is past the prompt now.
            let table = &self.running[&rank].table;
            let sees = self
                .blocks
                .sees_back_from(table, shared.prompt.len() as u32 - 1);
            if first && room && sees {
                self.fork(rank, sibling);
                forked += 1;
            }
        }
    }

    /// Starts a waiting sibling on the blocks of `parent`'s prompt.
    fn fork(&mut self, parent: Rank, sibling: Rank) {
        let mut seq = self.waiting.remove(&sibling).expect("it was just lined up");
        let prompt_len = seq.prompt_len();
        seq.table = self.blocks.fork(&self.running[&parent].table, prompt_len);
        seq.planned = prompt_len - 1;
        seq.committed = prompt_len - 1;
        seq.slot = self.slots.take();
        self.running.insert(sibling, seq);
    }

    fn commit_token(&mut self, rank: Rank, token: SampledToken, now: Micros) {
        let seq = self.sequence_mut(rank).expect("the caller found it");
        seq.tokens.push(token.token);
        // After its prompt a sequence decodes on the main lane. Nothing of it is in flight on the
        // prefill lane now, which runs no decodes.
        seq.lane = Lane::Main;
        let (id, reason) = (seq.id, seq.finish_reason());
        let request = self
            .requests
            .get_mut(&id.request)
            .expect("its sequence is live");
        if request.usage.completion_tokens == 0 {
            request.timings.first_token = now;
        }
        request.usage.completion_tokens += 1;
        self.counters.generation_tokens += 1;
        self.events.push(Event::Token { seq: id, token });
        if let Some(reason) = reason {
            self.end(id.request, id.index, reason, now);
        }
    }

    fn sequence_mut(&mut self, rank: Rank) -> Option<&mut Sequence> {
        self.running
            .get_mut(&rank)
            .or_else(|| self.waiting.get_mut(&rank))
    }
}
