//! One module per file of `kernels/`: a kernel's parameters, checked and typed, and its launch.
//!
//! `launch` functions queue the kernel and return. They check every length that they are given, so
//! that a wrong size is a panic here and not a stray write there; what they can't check — that the
//! memory is alive, that ids and places are in range — is in their safety sections.

#![allow(clippy::too_many_arguments)] // a kernel has the parameters that it has

mod act_mul;
mod add_rms_norm;
mod attention;
mod attention_work;
mod copy_blocks;
mod embed;
mod gemm;
mod gemm_sm90a;
mod kv;
mod packed;
mod packed_sm90a;
mod rope;
mod sample;
mod scatter;
mod step_io;

pub use act_mul::ActMul;
pub use add_rms_norm::AddRmsNorm;
pub use attention::{Attention, AttentionModel, AttentionStep, DecodeScratch, Path};
pub use attention_work::{ALL_BLOCKS, DecodeWork, Sequence, Sharer, Tiling, Work};
pub use copy_blocks::CopyBlocks;
pub use embed::{Embed, LAST};
pub use gemm::{GemmPortable, Output, Product};
pub use gemm_sm90a::GemmHopper;
pub use kv::{KvDtype, KvShape, UnpackBlocks};
pub use packed::{Form, Pack, Packed};
pub use packed_sm90a::PackedHopper;
pub use rope::{NOWHERE, QkNormRopeAppend, Rope};
pub use sample::{
    Chosen, Edit, MAX_EDITS, MAX_TOP, MAX_VOCAB, NONE, Sample, SampleTile, SlotMemory, SlotParams,
    Top, Want, counts_stride,
};
pub use scatter::Scatter;
pub use step_io::{Delivery, Done, FAILED_AT, MASKS_AT, RING, StepIo, Turn};

/// The image of `kernels/<name>.cu`.
macro_rules! image {
    ($name:literal) => {
        crate::driver::Image {
            name: $name,
            bytes: include_bytes!(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../../kernels/prebuilt/",
                $name,
                ".fatbin"
            )),
        }
    };
}
pub(crate) use image;

/// Elements of a 16-byte access of bfloat16: widths are multiples of it.
const VEC: usize = 8;

/// Blocks that stride over `work` items of one thread each: enough to fill the stream's SMs.
fn striding_grid(work: usize, block: u32, sms: u32) -> u32 {
    let needed = work.div_ceil(block as usize).max(1);
    needed.min(sms as usize * 2048 / block as usize) as u32
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::path::Path;

    use sha2::{Digest, Sha256};

    fn hash(path: &Path) -> String {
        let digest = Sha256::digest(std::fs::read(path).unwrap());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// What is embedded was compiled from the sources beside it. (That the bytes are what the compiler
    /// makes of them, `cargo xtask kernels --check` says.)
    #[test]
    fn prebuilt_kernels_belong_to_the_sources() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../kernels");
        let text = std::fs::read(folder.join("prebuilt/manifest.json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_slice(&text).unwrap();
        let kernels = manifest["kernels"].as_object().unwrap();
        assert!(!kernels.is_empty());
        for (name, entry) in kernels {
            let fatbin = folder.join(format!("prebuilt/{name}.fatbin"));
            assert_eq!(entry["sha256"], hash(&fatbin), "{name}.fatbin");
            for (source, sha256) in entry["sources"].as_object().unwrap() {
                let message = format!("{source} changed: run `cargo xtask kernels`");
                assert_eq!(*sha256, hash(&folder.join(source)), "{message}");
            }
        }
    }
}
