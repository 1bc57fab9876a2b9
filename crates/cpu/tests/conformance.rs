//! The suite that every executor must pass, on a random model.
#![allow(clippy::unwrap_used)]

mod common;

use common::tiny;
use spate_cpu::CpuMode;
use spate_executor::{Executor, conformance};
use spate_model::GgmlType;
use spate_model::testing::TinyLlama;

#[test]
fn exact_conforms() {
    conformance::run(&mut || Box::new(tiny(CpuMode::Exact, &TinyLlama::default()).exec));
}

#[test]
fn fast_conforms() {
    conformance::run(&mut || Box::new(tiny(CpuMode::Fast, &TinyLlama::default()).exec));
}

#[test]
fn rare_formats_conform() {
    for [weights, value_weights] in [
        [GgmlType::Q2K, GgmlType::Q3K],
        [GgmlType::Iq4Xs, GgmlType::Iq4Nl],
    ] {
        // Rows are whole blocks.
        let spec = TinyLlama {
            hidden: 256,
            head_dim: 64,
            ffn: 256,
            weights,
            value_weights,
            ..TinyLlama::default()
        };
        conformance::run(&mut || Box::new(tiny(CpuMode::Fast, &spec).exec));
    }
}

#[test]
fn two_pools_conform() {
    let spec = TinyLlama {
        architecture: "gemma3",
        layers: 4,
        window: Some(20),
        ..TinyLlama::default()
    };
    conformance::run(&mut || {
        let exec = tiny(CpuMode::Fast, &spec).exec;
        assert!(exec.capacity().local.is_some());
        Box::new(exec)
    });
}
