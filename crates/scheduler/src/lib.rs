//! The pure scheduling state machine: which sequence computes which tokens in the next step.
//!
//! A [`Scheduler`] has no clock, does no I/O and never blocks: [`Scheduler::plan`] and
//! [`Scheduler::commit`] are functions of its state and their arguments. Where to read on:
//! - `policy`: every choice that is a matter of taste (who goes first, who gives way, which lane);
//! - `plan`: builds the next batch, with admission and preemption;
//! - `commit`: takes a finished batch in: new tokens, published blocks, forks, ends;
//! - `sequence`: what is known about one sequence.
//!
//! Invariants, checked by [`Scheduler::check_invariants`]:
//! - a sequence has rows in flight on at most one lane;
//! - blocks that a batch in flight names stay held until its commit;
//! - `free + cached + used == total` blocks, and none is used when idle;
//! - every request that was added ends exactly once.

mod commit;
mod events;
mod invariants;
mod plan;
mod policy;
mod scheduler;
mod sequence;
mod slots;

pub use events::{AddError, Event, Stats};
pub use scheduler::{Scheduler, SchedulerConfig};
