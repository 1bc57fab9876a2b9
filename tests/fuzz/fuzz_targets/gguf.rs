//! Any bytes as a GGUF file: an error or a model, never a crash.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use spate_fuzz::{Scratch, read_tensors};
use spate_model::{Gguf, ModelConfig};

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|bytes: &[u8]| {
    let file = SCRATCH.write("model.gguf", bytes);
    let Ok(gguf) = Gguf::open(&file) else {
        return;
    };
    let _ = ModelConfig::from_gguf(&gguf);
    read_tensors(&gguf);
});
