//! Which device runs the model, and what the settings mean to it.

use anyhow::{Context, Result, bail};
use spate_cpu::{CpuConfig, CpuExecutor, CpuMode, KvDtype};
use spate_cuda::{CudaConfig, CudaError, CudaExecutor, WeightFormat, driver};
use spate_executor::Executor;
use spate_model::{Checkpoint, GgmlType};

use crate::settings::units::format_size;
use crate::settings::{self, Device, KvCacheDtype, Overlap, Settings, Sizes};

/// What runs models on this machine.
pub(crate) enum Backend {
    Cpu,
    /// The GPU of a number, opened.
    Cuda(u32, driver::Device),
}

/// A loaded model.
pub(crate) struct Loaded {
    pub(crate) executor: Box<dyn Executor>,
    /// For programs: `cpu` or `cuda:0`.
    pub(crate) device: String,
    pub(crate) sizes: Sizes,
    /// The backend, the device, what is chosen by its abilities.
    pub(crate) description: String,
    /// The formats of the weights, where the device decides what becomes of them.
    pub(crate) weights: Option<String>,
    /// Part and bytes.
    pub(crate) memory: Vec<(&'static str, u64)>,
    /// Memory of the device, if it has its own.
    pub(crate) device_memory: Option<u64>,
}

impl Backend {
    /// Opens what was asked for. Without a usable GPU `auto` is the CPU, and the log says why.
    pub(crate) fn choose(device: Device) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self::Cpu),
            Device::Cuda(number) => {
                let gpu = driver::Device::open(number);
                let gpu = gpu.with_context(|| format!("device cuda:{number}"))?;
                Ok(Self::Cuda(number, gpu))
            }
            Device::Auto => match driver::Device::open(0) {
                Ok(gpu) => Ok(Self::Cuda(0, gpu)),
                Err(CudaError::Unavailable(why)) => {
                    tracing::info!("serving on the CPU: no usable GPU: {why}");
                    Ok(Self::Cpu)
                }
                // A GPU that is there and broken: slow service would hide it.
                Err(error) => Err(error).context("the GPU; --device cpu serves without it"),
            },
        }
    }

    /// The sizes that the settings give here.
    pub(crate) fn sizes(&self, settings: &Settings) -> Sizes {
        match self {
            Self::Cpu => Sizes::on_cpu(settings),
            Self::Cuda(..) => Sizes::on_gpu(settings),
        }
    }

    /// Loads a model; `progress` hears the share that is done.
    pub(crate) fn load(
        &self,
        checkpoint: &dyn Checkpoint,
        settings: &Settings,
        progress: &mut dyn FnMut(f32),
    ) -> Result<Loaded> {
        match self {
            Self::Cpu => {
                let executor = CpuExecutor::load(checkpoint, &cpu_config(settings)?, progress)?;
                Ok(Loaded {
                    device: "cpu".into(),
                    sizes: self.sizes(settings),
                    description: describe_cpu(settings, &executor),
                    weights: None,
                    memory: executor.memory_budget(),
                    device_memory: None,
                    executor: Box::new(executor),
                })
            }
            Self::Cuda(number, device) => {
                let config = cuda_config(settings, *number)?;
                let executor = CudaExecutor::load(checkpoint, &config, progress)?;
                Ok(Loaded {
                    device: format!("cuda:{number}"),
                    sizes: self.sizes(settings),
                    description: format!(
                        "{}, overlap {}",
                        describe_gpu(*number, device),
                        overlap(settings)
                    ),
                    weights: Some(describe_weights(executor.weight_formats())),
                    memory: executor.memory_budget(),
                    device_memory: Some(device.total_bytes()),
                    executor: Box::new(executor),
                })
            }
        }
    }
}

/// The settings of the CPU backend.
pub(crate) fn cpu_config(settings: &Settings) -> Result<CpuConfig> {
    let sizes = Sizes::on_cpu(settings);
    if let Some(overlap @ (Overlap::Streams | Overlap::DecodeSms(_))) = settings.overlap {
        bail!("overlap is {overlap}, which is for GPUs: the CPU backend has one queue");
    }
    Ok(CpuConfig {
        mode: match settings.cpu_mode {
            settings::CpuMode::Exact => CpuMode::Exact,
            settings::CpuMode::Fast => CpuMode::Fast,
        },
        threads: settings.threads,
        block_size: sizes.block_size,
        kv_cache_bytes: sizes.kv_cache_memory.unwrap_or(u64::MAX),
        kv_dtype: match settings.kv_cache_dtype {
            KvCacheDtype::Auto => None,
            KvCacheDtype::F32 => Some(KvDtype::F32),
            KvCacheDtype::F16 => Some(KvDtype::F16),
            KvCacheDtype::Bf16 => Some(KvDtype::Bf16),
            KvCacheDtype::Int8 => Some(KvDtype::Int8),
            KvCacheDtype::Fp8 => {
                bail!("kv_cache_dtype fp8 is for GPUs; the CPU backend has f32, f16, bf16 and int8")
            }
        },
        max_seq_len: settings.max_model_len.unwrap_or(0),
        slots: sizes.max_num_seqs,
        max_batch_tokens: sizes.max_num_batched_tokens,
    })
}

/// The settings of the CUDA backend.
pub(crate) fn cuda_config(settings: &Settings, number: u32) -> Result<CudaConfig> {
    let sizes = Sizes::on_gpu(settings);
    let kv_dtype = match settings.kv_cache_dtype {
        KvCacheDtype::Auto | KvCacheDtype::Bf16 => spate_cuda::KvDtype::Bf16,
        KvCacheDtype::Int8 => spate_cuda::KvDtype::Int8,
        KvCacheDtype::Fp8 => spate_cuda::KvDtype::Fp8,
        other => bail!(
            "kv_cache_dtype {} is not for GPUs: they have bf16, fp8 and int8",
            other.name()
        ),
    };
    let overlap = match overlap(settings) {
        Overlap::Off => spate_cuda::Overlap::Off,
        Overlap::Streams => spate_cuda::Overlap::Streams,
        Overlap::DecodeSms(sms) => spate_cuda::Overlap::DecodeSms(sms),
    };
    Ok(CudaConfig {
        device: number,
        block_size: sizes.block_size,
        kv_cache_bytes: sizes.kv_cache_memory,
        kv_dtype,
        memory_utilization: settings.gpu_memory_utilization,
        max_seq_len: settings.max_model_len.unwrap_or(0),
        slots: sizes.max_num_seqs,
        max_batch_tokens: sizes.max_num_batched_tokens,
        overlap,
        graphs: true,
    })
}

/// What was set. `auto`: prompts that ride along in small steps need no queue of their own
/// (`benches/RESULTS.md`).
fn overlap(settings: &Settings) -> Overlap {
    settings.overlap.unwrap_or(Overlap::Off)
}

fn describe_cpu(settings: &Settings, executor: &CpuExecutor) -> String {
    let threads = match settings.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let mode = settings.cpu_mode.name();
    format!("CPU, {mode}, {}, {threads} threads", executor.simd())
}

/// `Q4_1 84.4 MiB, Q8_0 28.7 MiB; as bfloat16: F16 1.00 MiB`
fn describe_weights(formats: &[WeightFormat]) -> String {
    let list = |stay: bool| {
        let these = formats
            .iter()
            .filter(|format| stays_as_it_is(format) == stay);
        let words = these.map(|f| format!("{} {}", f.file.name(), format_size(f.bytes)));
        words.collect::<Vec<_>>().join(", ")
    };
    match (list(true), list(false)) {
        (stay, other) if other.is_empty() => stay,
        (stay, other) if stay.is_empty() => format!("as bfloat16: {other}"),
        (stay, other) => format!("{stay}; as bfloat16: {other}"),
    }
}

fn stays_as_it_is(format: &WeightFormat) -> bool {
    format.quantized || format.file == GgmlType::BF16
}

fn describe_gpu(number: u32, device: &driver::Device) -> String {
    let (major, minor) = device.capability();
    let driver = device.driver_version();
    format!(
        "cuda:{number}, {}, compute capability {major}.{minor}, {} SMs, driver for CUDA {}.{}",
        device.name(),
        device.sms(),
        driver / 1000,
        driver % 1000 / 10
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_of_weights() {
        let format = |file, quantized| WeightFormat {
            file,
            quantized,
            bytes: 1 << 20,
        };
        let [q4, f16, bf16] = [
            format(GgmlType::Q4_1, true),
            format(GgmlType::F16, false),
            format(GgmlType::BF16, false),
        ];
        assert_eq!(
            describe_weights(&[q4, f16]),
            "Q4_1 1.00 MiB; as bfloat16: F16 1.00 MiB"
        );
        assert_eq!(
            describe_weights(&[q4, bf16]),
            "Q4_1 1.00 MiB, BF16 1.00 MiB"
        );
        assert_eq!(describe_weights(&[f16]), "as bfloat16: F16 1.00 MiB");
    }
}
