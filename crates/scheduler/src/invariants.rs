use std::collections::HashSet;

use spate_executor::{Lane, LocalKv};
use spate_types::BlockId;

use crate::scheduler::{Scheduler, StepRow};
use crate::sequence::{Rank, Sequence};

impl Scheduler {
    /// Recounts everything. Takes time proportional to the pool and to all tables: for tests, and
    /// for an engine that fell idle.
    ///
    /// # Panics
    /// With a message if an invariant is broken.
    pub fn check_invariants(&self) {
        self.check_blocks();
        self.check_sequences();
        self.check_requests();
        if self.is_idle() {
            let used = (self.blocks.used(), self.blocks.local_used());
            assert_eq!(used, (0, 0), "idle, but blocks are held");
            assert!(self.deadlines.is_empty(), "idle, but a deadline is pending");
        }
    }

    fn sequences(&self) -> impl Iterator<Item = (&Rank, &Sequence)> {
        self.running.iter().chain(&self.waiting)
    }

    fn check_blocks(&self) {
        let tables = self
            .sequences()
            .flat_map(|(_, seq)| seq.table.blocks().iter());
        let steps = self.in_flight.iter().flatten();
        let retired = steps.clone().flat_map(|step| &step.retired_blocks);
        let held: Vec<BlockId> = tables.chain(retired).copied().collect();
        let tables = self
            .sequences()
            .flat_map(|(_, seq)| seq.table.local().blocks.iter());
        let retired = steps.clone().flat_map(|step| &step.retired_local);
        let held_local: Vec<BlockId> = tables.chain(retired).copied().collect();
        self.blocks
            .check_invariants(held.iter().copied(), held_local.iter().copied());
        let held: HashSet<BlockId> = held.into_iter().collect();
        let held_local: HashSet<BlockId> = held_local.into_iter().collect();
        for row in steps.flat_map(|step| &step.rows) {
            let pinned = row.blocks.iter().all(|block| held.contains(block))
                && self
                    .local_blocks(row)
                    .all(|block| held_local.contains(&block));
            assert!(
                pinned,
                "{:?}: a block of its row in flight is not held",
                row.rank
            );
        }
        let slots = self.sequences().filter_map(|(_, seq)| seq.slot);
        let retired = self
            .in_flight
            .iter()
            .flatten()
            .flat_map(|step| &step.retired_slots);
        self.slots.check_invariants(slots.chain(retired.copied()));
    }

    /// The local blocks that a row in flight reads or writes.
    fn local_blocks(&self, row: &StepRow) -> impl Iterator<Item = BlockId> {
        let size = self.capacity.block_size;
        let first = |local: &LocalKv| local.first_seen(row.start, size);
        let range = self.capacity.local.as_ref().map(first);
        let range = range.map_or(0..0, |first| first..row.end.div_ceil(size));
        range.map(|i| {
            let block = row.local.get(i as usize);
            block.expect("the contract was kept: its local blocks cover what it sees")
        })
    }

    fn check_sequences(&self) {
        assert!(
            self.running.len() <= self.config.max_num_seqs as usize,
            "too many are running"
        );
        for (rank, seq) in self.sequences() {
            let rows = |lane: Lane| {
                let rows = self.in_flight[lane as usize]
                    .iter()
                    .flat_map(|step| &step.rows);
                rows.filter(|row| row.rank == *rank).count() as u32
            };
            let other = if seq.lane == Lane::Main {
                Lane::Prefill
            } else {
                Lane::Main
            };
            assert_eq!(
                rows(seq.lane),
                seq.in_flight,
                "{rank:?}: rows in flight miscounted"
            );
            assert_eq!(rows(other), 0, "{rank:?}: in two lanes at once");
            assert!(
                seq.committed <= seq.planned && seq.planned <= seq.len(),
                "{rank:?}: positions"
            );
            assert!(seq.len() <= seq.limit, "{rank:?}: planned past its end");
        }
        for (rank, seq) in &self.running {
            assert!(seq.slot.is_some(), "{rank:?}: runs without a slot");
            let covered = seq.table.len() as u32 * self.capacity.block_size;
            assert!(
                covered >= seq.planned,
                "{rank:?}: blocks do not cover its positions"
            );
        }
        for (rank, seq) in &self.waiting {
            assert!(seq.table.is_empty(), "{rank:?}: waits, but holds blocks");
            assert!(!self.running.contains_key(rank), "{rank:?}: waits and runs");
        }
    }

    fn check_requests(&self) {
        let mut live = 0;
        for request in self.requests.values() {
            let lines = [&self.running, &self.waiting];
            let born = |&index: &u32| {
                lines
                    .iter()
                    .any(|line| line.contains_key(&request.rank(index)))
            };
            let born = (0..request.request.n).filter(born).count() as u32;
            assert_eq!(
                born + request.unborn.len() as u32,
                request.live,
                "live sequences miscounted"
            );
            assert!(request.live > 0, "a request without sequences");
            live += request.live;
        }
        let known = self.running.len() as u32 + self.waiting.len() as u32 + self.unborn;
        assert_eq!(known, live, "a sequence without a request");
    }
}
