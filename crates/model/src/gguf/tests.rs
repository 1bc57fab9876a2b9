#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use crate::testing::hf::TempDir;
use crate::testing::{GgufBuilder, TempFile, TinyLlama, tiny_llama};
use crate::{Checkpoint, Gguf, ModelConfig, ModelError};

fn open(bytes: &[u8]) -> Result<Gguf, ModelError> {
    Gguf::open(TempFile::new(bytes).path())
}

/// The message, after checking that it names the file and a byte offset.
fn refusal(bytes: &[u8]) -> String {
    let file = TempFile::new(bytes);
    let message = Gguf::open(file.path()).unwrap_err().to_string();
    assert!(message.contains(file.path().to_str().unwrap()), "{message}");
    assert!(message.contains("at byte "), "{message}");
    message
}

fn small() -> GgufBuilder {
    let mut g = GgufBuilder::default();
    g.str("general.architecture", "llama")
        .u32("answer", 42)
        .f32("half", 0.5)
        .bool("yes", true)
        .strs("words", &["a".into(), "bc".into()])
        .i32s("ints", &[-1, 7])
        .tensor("a", &[4, 2], 0, vec![1; 32])
        .tensor("b", &[3], 0, vec![2; 12]);
    g
}

#[test]
fn reads_what_was_written() {
    let file = TempFile::new(&small().build());
    let gguf = Gguf::open(file.path()).unwrap();
    let m = gguf.metadata();
    assert_eq!(gguf.architecture(), "llama");
    assert_eq!(m.get_u32("answer").unwrap(), Some(42));
    assert_eq!(m.get_f32("half").unwrap(), Some(0.5));
    assert_eq!(m.get_bool("yes").unwrap(), Some(true));
    assert_eq!(m.get_array_str("words").unwrap().unwrap(), ["a", "bc"]);
    assert_eq!(m.get_array_i32("ints").unwrap(), Some(vec![-1, 7]));
    assert_eq!(m.get_str("absent").unwrap(), None);
    let wrong = m.get_str("answer").unwrap_err().to_string();
    assert!(
        wrong.contains("`answer` is an integer, expected a string"),
        "{wrong}"
    );
    assert!(m.get_array_i32("answer").is_err());

    let mut bytes = Vec::new();
    gguf.read(gguf.tensor("b").unwrap(), &mut bytes).unwrap();
    assert_eq!(bytes, [2; 12]);
    // Cut behind our back: an error, not a crash.
    let half = gguf.tensor("b").unwrap().offset + 5;
    std::fs::File::options()
        .write(true)
        .open(file.path())
        .unwrap()
        .set_len(half)
        .unwrap();
    let cut = gguf
        .read(gguf.tensor("b").unwrap(), &mut bytes)
        .unwrap_err();
    assert!(cut.to_string().contains("tensor `b` is cut"), "{cut}");
}

#[test]
fn every_cut_is_an_error() {
    let whole = small().build();
    for len in 0..whole.len() {
        refusal(&whole[..len]);
    }
    assert!(open(&whole).is_ok());
}

#[test]
fn a_directory_or_nothing_is_an_error() {
    assert!(Gguf::open(&std::env::temp_dir()).is_err());
    assert!(Gguf::open(&std::env::temp_dir().join("spate-no-such-file")).is_err());
}

#[test]
fn wrong_magic_and_versions() {
    let mut bytes = small().build();
    bytes[4..8].copy_from_slice(&2u32.to_le_bytes());
    assert!(refusal(&bytes).contains("version 2"));
    bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert!(refusal(&bytes).contains("big-endian"));
    bytes[0] = b'X';
    assert!(refusal(&bytes).contains("not a GGUF file"));
}

#[test]
fn absurd_counts_are_refused_before_allocating() {
    for at in [8, 16] {
        for count in [u64::MAX, 1 << 62, 1 << 40, 1000] {
            let mut bytes = small().build();
            bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
            assert!(refusal(&bytes).contains("count"), "{count} at {at}");
        }
    }
    for count in [u64::MAX, 1 << 61, 1 << 33, 9] {
        let mut g = GgufBuilder::default();
        let bytes = g.array("strings", 8, count, &[0; 8]).build();
        assert!(refusal(&bytes).contains("array length"), "{count}");
    }
    let mut g = GgufBuilder::default();
    let bytes = g.raw("s", 8, &u64::MAX.to_le_bytes()).build();
    assert!(refusal(&bytes).contains("metadata value"));
}

#[test]
fn arrays_nest_only_so_deep() {
    let nested = |depth: usize| {
        // Each level: an array of one array; innermost an empty array of bytes.
        let mut payload = Vec::new();
        for _ in 1..depth {
            payload.extend(9u32.to_le_bytes());
            payload.extend(1u64.to_le_bytes());
        }
        payload.extend(0u32.to_le_bytes());
        payload.extend(0u64.to_le_bytes());
        GgufBuilder::default().raw("deep", 9, &payload).build()
    };
    assert!(open(&nested(4)).is_ok());
    assert!(refusal(&nested(5)).contains("nest deeper"));
    assert!(refusal(&nested(100_000)).contains("nest deeper"));
}

#[test]
fn bad_metadata() {
    let twice = small().u32("answer", 1).build();
    assert!(refusal(&twice).contains("`answer` appears twice"));
    let unknown = GgufBuilder::default().raw("x", 13, &[0; 8]).build();
    assert!(refusal(&unknown).contains("unknown metadata type 13"));
    let not_bool = GgufBuilder::default().raw("x", 7, &[2]).build();
    assert!(refusal(&not_bool).contains("bool"));
    let not_utf8 = [1u64.to_le_bytes().as_slice(), &[0xff]].concat();
    let not_utf8 = GgufBuilder::default().raw("x", 8, &not_utf8).build();
    assert!(refusal(&not_utf8).contains("UTF-8"));
    for alignment in [0, 1, 4, 33, 1 << 31, u32::MAX] {
        let bytes = small().u32("general.alignment", alignment).build();
        assert!(refusal(&bytes).contains("alignment"), "{alignment}");
    }
}

#[test]
fn bad_tensors() {
    let with = |name: &str, dims: &[u64], kind: u32, bytes: usize| {
        refusal(&small().tensor(name, dims, kind, vec![0; bytes]).build())
    };
    assert!(with("a", &[1], 0, 4).contains("`a` appears twice"));
    assert!(with("c", &[], 0, 4).contains("0 dimensions"));
    assert!(with("c", &[1; 5], 0, 4).contains("5 dimensions"));
    assert!(with("c", &[1], 999, 4).contains("999"));
    for dims in [
        &[0][..],
        &[u64::MAX],
        &[u64::MAX, u64::MAX],
        &[1 << 62, 4],
        &[1 << 32, 1 << 32],
    ] {
        assert!(with("c", dims, 0, 4).contains("no F32 tensor"), "{dims:?}");
    }
    // 31 is no multiple of a block of 32.
    assert!(with("c", &[31], 8, 34).contains("no Q8_0 tensor"));
    // The data is shorter than the dimensions say.
    assert!(with("c", &[1 << 40], 0, 4).contains("beyond the end"));
    assert!(with("c", &[100], 0, 4).contains("beyond the end"));
}

/// Rewrites the offset field of the last tensor.
fn with_last_offset(offset: u64) -> Vec<u8> {
    let mut bytes = small().build();
    let name = bytes
        .windows(9)
        .rposition(|w| w == b"\x01\0\0\0\0\0\0\0b")
        .unwrap();
    let at = name + 9 + 4 + 8 + 4;
    bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
    bytes
}

#[test]
fn bad_offsets() {
    assert!(open(&with_last_offset(32)).is_ok());
    assert!(refusal(&with_last_offset(33)).contains("alignment"));
    assert!(refusal(&with_last_offset(64)).contains("beyond the end"));
    assert!(refusal(&with_last_offset(u64::MAX - 31)).contains("beyond the end"));
    assert!(refusal(&with_last_offset(0)).contains("`a` and `b` overlap"));
}

#[test]
fn a_random_model_has_a_configuration() {
    let gguf = open(&tiny_llama(&TinyLlama::default())).unwrap();
    let config = ModelConfig::from_gguf(&gguf).unwrap();
    assert_eq!((config.layers, config.hidden, config.ffn), (2, 64, 96));
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (4, 2, 16));
    assert_eq!((config.vocab_size, config.context_len), (259, 512));
    assert_eq!(config.rope.base, 10_000.0);
}

/// Two files of a model: `a` in the first, `b` in the second.
struct Split {
    files: [GgufBuilder; 2],
    dir: TempDir,
}

impl Split {
    fn new() -> Self {
        let files = [0, 1].map(|i| {
            let mut g = GgufBuilder::default();
            g.u32("split.no", i).u32("split.count", 2);
            g.u32("split.tensors.count", 2);
            g.tensor(["a", "b"][i as usize], &[4], 0, vec![i as u8 + 1; 16]);
            g
        });
        let dir = TempDir::new();
        Self { files, dir }
    }

    fn open(&self) -> Result<Gguf, ModelError> {
        let first = self
            .dir
            .write("m-00001-of-00002.gguf", self.files[0].build());
        self.dir
            .write("m-00002-of-00002.gguf", self.files[1].build());
        Gguf::open(&first)
    }

    fn refusal(&self) -> String {
        self.open().unwrap_err().to_string()
    }
}

#[test]
fn models_in_several_files() {
    let mut split = Split::new();
    split.files[0].str("general.architecture", "llama");
    let gguf = split.open().unwrap();
    assert_eq!(gguf.architecture(), "llama");
    for (name, byte) in [("a", 1), ("b", 2)] {
        let mut bytes = Vec::new();
        gguf.read(gguf.tensor(name).unwrap(), &mut bytes).unwrap();
        assert_eq!(bytes, [byte; 16]);
    }
    let sizes = split.files.iter().map(|f| f.build().len() as u64);
    assert_eq!(gguf.file_bytes(), sizes.sum::<u64>());
}

#[test]
fn split_models_must_be_complete() {
    let split = Split::new();
    split.open().unwrap();
    let second = split.dir.path().join("m-00002-of-00002.gguf");
    let named = Gguf::open(&second).unwrap_err().to_string();
    assert!(named.contains("file 2 of 2; name the first"), "{named}");
    std::fs::remove_file(&second).unwrap();
    let first = split.dir.path().join("m-00001-of-00002.gguf");
    let missing = Gguf::open(&first).unwrap_err().to_string();
    assert!(
        missing.contains("m-00002-of-00002.gguf: cannot read"),
        "{missing}"
    );
    let renamed = split.dir.path().join("other.gguf");
    std::fs::rename(first, &renamed).unwrap();
    let lost = Gguf::open(&renamed).unwrap_err().to_string();
    assert!(
        lost.contains("must be called NAME-00001-of-00002.gguf"),
        "{lost}"
    );
}

#[test]
fn files_of_a_split_model_must_agree() {
    let mut split = Split::new();
    split.files[1].tensor("a", &[1], 0, vec![0; 4]);
    assert!(split.refusal().contains("`a` is in another file"));

    let mut split = Split::new();
    split.files[1].tensor("c", &[1], 0, vec![0; 4]);
    assert!(split.refusal().contains("hold 3 tensors"));

    let mut split = Split::new();
    split.files[1] = GgufBuilder::default();
    assert!(
        split
            .refusal()
            .contains("does not say that it is file 2 of 2")
    );

    let mut split = Split::new();
    split.files[0] = GgufBuilder::default();
    split.files[0].u32("split.count", u32::MAX);
    assert!(split.refusal().contains("is over"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever is overwritten, opening ends, with a file or an error, and never panics.
    #[test]
    fn damage_never_panics(at in 0usize..400, junk in prop::collection::vec(any::<u8>(), 1..9)) {
        let mut bytes = small().build();
        let at = at % bytes.len();
        let end = (at + junk.len()).min(bytes.len());
        bytes[at..end].copy_from_slice(&junk[..end - at]);
        if let Ok(gguf) = open(&bytes) {
            for tensor in gguf.tensors() {
                prop_assert!(tensor.offset + tensor.bytes as u64 <= bytes.len() as u64);
            }
        }
    }
}
