use cudarc::driver::sys::CUresult;
use spate_model::ModelError;

/// Why the GPU can't be used, or stopped working.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// There is no GPU that this build can use. Not a fault: the CPU serves instead.
    #[error("no usable GPU: {0}")]
    Unavailable(String),
    /// A call of the driver failed.
    #[error("{what}: {} ({code:?})", meaning(*code))]
    Driver {
        /// What was being done.
        what: &'static str,
        /// What the driver said.
        code: CUresult,
    },
    /// The GPU has no room.
    #[error(
        "no GPU memory for {what}: {} MiB are needed, {} MiB are free; {}",
        bytes >> 20, free >> 20, advice(what)
    )]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much was asked for.
        bytes: u64,
        /// How much there was.
        free: u64,
    },
    /// What is left of the share of the GPU's memory that may be used is no KV cache.
    #[error(
        "no GPU memory for a KV cache: of {} MiB that may be used, weights take {} MiB, a step of {tokens} \
         tokens and {slots} sequences {} MiB, the driver {} MiB; raise --gpu-memory-utilization, or lower \
         --max-num-batched-tokens (now {tokens}) or --max-num-seqs (now {slots})",
        usable >> 20, weights >> 20, steps >> 20, driver >> 20
    )]
    NoKvCache {
        /// Bytes that may be used.
        usable: u64,
        /// Bytes of the weights.
        weights: u64,
        /// Bytes of activations and slots.
        steps: u64,
        /// Bytes that are left to the driver.
        driver: u64,
        /// Most tokens of a step.
        tokens: u32,
        /// Most sequences.
        slots: u32,
    },
    /// The settings can't work with this model or this GPU.
    #[error("{0}")]
    Config(String),
    /// The model file is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// What makes room, in names of settings.
fn advice(what: &str) -> &'static str {
    match what {
        WEIGHTS => "serve a smaller or a quantised model, or stop other programs on this GPU",
        _ => {
            "lower --gpu-memory-utilization, --kv-cache-memory or --max-num-batched-tokens, or stop \
             other programs on this GPU"
        }
    }
}

/// What [`CudaError::OutOfMemory`] calls the weights.
pub(crate) const WEIGHTS: &str = "the weights";

/// Result of a driver call.
pub(crate) trait Check {
    /// Says what failed if it failed.
    fn check(self, what: &'static str) -> Result<(), CudaError>;
}

impl Check for CUresult {
    fn check(self, what: &'static str) -> Result<(), CudaError> {
        match self {
            Self::CUDA_SUCCESS => Ok(()),
            code => Err(CudaError::Driver { what, code }),
        }
    }
}

/// The codes that people meet, in words.
fn meaning(code: CUresult) -> &'static str {
    match code {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => "the GPU has no memory left",
        CUresult::CUDA_ERROR_ILLEGAL_ADDRESS => {
            "a kernel touched memory that is not its own; the device context is lost"
        }
        CUresult::CUDA_ERROR_MISALIGNED_ADDRESS => {
            "a kernel touched a misaligned address; the device context is lost"
        }
        CUresult::CUDA_ERROR_LAUNCH_FAILED => "a kernel failed; the device context is lost",
        CUresult::CUDA_ERROR_LAUNCH_TIMEOUT => "a kernel ran for too long",
        CUresult::CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES => "the launch asks for too many resources",
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU => "no kernel image for this GPU",
        CUresult::CUDA_ERROR_ECC_UNCORRECTABLE => "uncorrectable memory error on the GPU",
        CUresult::CUDA_ERROR_INVALID_VALUE => "invalid argument",
        CUresult::CUDA_ERROR_NOT_FOUND => "not found in the kernel image",
        CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED => "not possible while a graph is captured",
        _ => "the driver refused",
    }
}
