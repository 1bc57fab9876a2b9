//! What targets share.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use spate_model::Checkpoint;
use spate_text::{Detokenizer, Tokenizer};

/// Uses a tokenizer: encodes text, decodes it and arbitrary ids, in one go and in pieces.
pub fn exercise(tokenizer: &Arc<Tokenizer>, bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let bound = tokenizer.vocab_size() as u32;
    let mut ids = Vec::new();
    for (add, parse) in [(false, false), (true, true)] {
        ids = tokenizer
            .encode(&text, add, parse)
            .expect("shorter than 4 GiB");
        assert!(
            ids.iter().all(|&id| id < bound),
            "an id outside the vocabulary"
        );
    }
    let arbitrary = bytes.iter().map(|&b| u32::from(b) * bound / 250);
    ids.extend(arbitrary);
    for skip in [false, true] {
        let whole = tokenizer.decode(&ids, skip);
        let mut detokenizer = Detokenizer::at_start(tokenizer.clone(), skip);
        let mut pieces: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
        pieces.push_str(&detokenizer.flush());
        assert_eq!(whole, pieces);
    }
}

/// Reads all tensors of a model whose headers were found good.
pub fn read_tensors(model: &dyn Checkpoint) {
    let mut data = Vec::new();
    for tensor in model.tensors() {
        data.clear();
        model
            .read(tensor, &mut data)
            .expect("opening checked that the file holds it");
        assert_eq!(data.len(), tensor.bytes);
    }
}

/// A directory for the files of one input after the other.
pub struct Scratch(PathBuf);

impl Scratch {
    /// A new directory that only this process uses.
    pub fn new() -> Self {
        let path = std::env::temp_dir().join(format!("spate-fuzz-{}", std::process::id()));
        fs::create_dir_all(&path).expect("the temporary directory can be written to");
        Self(path)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Puts a file there.
    pub fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, bytes).expect("the temporary directory can be written to");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

/// The parts of an input, which zero bytes separate: `N - 1` without one, and the rest.
pub fn parts<const N: usize>(bytes: &[u8]) -> [&[u8]; N] {
    let mut parts = bytes.splitn(N, |&b| b == 0);
    std::array::from_fn(|_| parts.next().unwrap_or_default())
}
