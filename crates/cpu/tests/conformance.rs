//! The suite that every executor must pass, on a random model.
#![allow(clippy::unwrap_used)]

mod common;

use common::tiny;
use spate_cpu::CpuMode;
use spate_executor::conformance;
use spate_model::testing::TinyLlama;

#[test]
fn exact_conforms() {
    conformance::run(&mut || Box::new(tiny(CpuMode::Exact, &TinyLlama::default()).exec));
}

#[test]
fn fast_conforms() {
    conformance::run(&mut || Box::new(tiny(CpuMode::Fast, &TinyLlama::default()).exec));
}
