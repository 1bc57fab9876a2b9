//! Any bytes as a GGUF file: an error or a model, never a crash.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use spate_model::{Gguf, ModelConfig};

static FILE: LazyLock<PathBuf> = LazyLock::new(|| {
    let name = format!("spate-fuzz-{}.gguf", std::process::id());
    std::env::temp_dir().join(name)
});

fuzz_target!(|bytes: &[u8]| {
    fs::write(&*FILE, bytes).expect("the temporary directory can be written to");
    let Ok(gguf) = Gguf::open(&FILE) else {
        return;
    };
    let _ = ModelConfig::from_gguf(&gguf);
    let mut data = Vec::new();
    for tensor in gguf.tensors() {
        data.clear();
        gguf.read(tensor, &mut data)
            .expect("open checked that the file holds it");
    }
});
