//! Any bytes as `config.json` and `generation_config.json`, with a zero byte between: an error or a
//! model, never a crash.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use spate_fuzz::{Scratch, parts};
use spate_model::{DummyModel, HfDirectory};

static SCRATCH: LazyLock<Scratch> = LazyLock::new(Scratch::new);

fuzz_target!(|bytes: &[u8]| {
    let [config, generation] = parts(bytes);
    SCRATCH.write("config.json", config);
    SCRATCH.write("generation_config.json", generation);
    let Ok(directory) = HfDirectory::open(SCRATCH.path()) else {
        return;
    };
    let _ = directory.generation_defaults();
    let _ = DummyModel::new(&directory, 0);
});
