//! Replayed plan traces: the exact batches expected for small situations.
//!
//! A row is written `s1 4..7 *`: slot 1 computes positions 4 to 6 and samples. `last` means that its
//! input is the token sampled before; `bind` that it is the slot's first.
#![allow(clippy::unwrap_used)]

mod bench;
mod ends;
mod memory;
mod siblings;
mod steps;
