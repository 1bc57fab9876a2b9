use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// For keys that come from a model's file alone, so that nobody can aim collisions at it.
pub(crate) type FileHashMap<K, V> = HashMap<K, V, BuildHasherDefault<FileHasher>>;

/// One multiplication per eight bytes (Fibonacci hashing, Knuth vol. 3, 6.4).
#[derive(Default)]
pub(crate) struct FileHasher(u64);

impl Hasher for FileHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.write_u64(u64::from_le_bytes(word));
        }
    }

    fn write_u64(&mut self, x: u64) {
        let product = (self.0 ^ x).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The table takes its bucket from the low bits, and the product is best in the high ones.
        self.0 = product ^ product >> 32;
    }
}
