use std::sync::{Mutex, PoisonError};

use half::bf16;
use spate_model::quant::dequantize;
use spate_model::{Checkpoint, GgmlType, Loader, MatrixPart, MatrixSource, ModelConfig};

use crate::CudaError;
use crate::driver::{Arena, Device, Event, Pinned, Plain, Priority, Slice, Stream};

/// Elements of a staging buffer.
const CHUNK: usize = 4 << 20;

/// Rows of a matrix are a multiple of it: added rows are zero.
const ROWS: usize = 8;

/// One linear map, or several that read the same input with their outputs one after another, in
/// bfloat16. A handle: the memory belongs to the weights' arena.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Matrix {
    /// `[rows, cols]`
    pub(crate) weights: Slice<bf16>,
    /// Output width, a multiple of 8.
    pub(crate) rows: usize,
    /// Input width.
    pub(crate) cols: usize,
    /// `[rows]`
    pub(crate) bias: Option<Slice<f32>>,
}

/// Brings weights to the GPU: read by the model's loading threads, converted to bfloat16 in
/// page-locked memory, copied while the next piece is converted.
pub(crate) struct CudaLoader {
    device: Device,
    arena: Mutex<Arena>,
    idle: Mutex<Vec<Staging>>,
}

impl CudaLoader {
    /// `arena`: as large as [`weight_bytes`] says.
    pub(crate) fn new(arena: Arena) -> Self {
        Self {
            device: arena.device().clone(),
            arena: Mutex::new(arena),
            idle: Mutex::new(Vec::new()),
        }
    }

    /// The weights' memory, when all copies have run.
    pub(crate) fn finish(self) -> Result<Arena, CudaError> {
        self.device.synchronize()?;
        Ok(self
            .arena
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner))
    }

    fn take<T: Plain>(&self, len: usize) -> Result<Slice<T>, CudaError> {
        let mut arena = self.arena.lock().unwrap_or_else(PoisonError::into_inner);
        arena.take(len)
    }

    /// Runs `work` with staging buffers that no other thread uses.
    fn staged<R>(
        &self,
        work: impl FnOnce(&mut Staging) -> Result<R, CudaError>,
    ) -> Result<R, CudaError> {
        self.device.bind()?;
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let reused = idle().pop();
        let mut staging = match reused {
            Some(staging) => staging,
            None => Staging::new(&self.device)?,
        };
        let result = work(&mut staging)?;
        idle().push(staging);
        Ok(result)
    }
}

impl Loader for CudaLoader {
    type Matrix = Matrix;
    type Vector = Slice<f32>;
    type Error = CudaError;

    fn matrix(&self, source: MatrixSource<'_>) -> Result<Matrix, CudaError> {
        let cols = source.cols;
        let rows: usize = source.parts.iter().map(|part| part.rows).sum();
        let padded = rows.next_multiple_of(ROWS);
        let weights = self.take(padded * cols)?;
        self.staged(|staging| {
            let mut first = 0;
            for part in &source.parts {
                let to = weights.range(first * cols..(first + part.rows) * cols);
                staging.matrix(part, cols, to)?;
                first += part.rows;
            }
            // SAFETY: the arena outlives the loader.
            unsafe {
                staging
                    .stream
                    .fill(weights.range(rows * cols..padded * cols), 0)
            }
        })?;
        let bias = source.bias.map(|mut bias| {
            bias.resize(padded, 0.0);
            self.vector(&bias)
        });
        Ok(Matrix {
            weights,
            rows: padded,
            cols,
            bias: bias.transpose()?,
        })
    }

    fn vector(&self, source: &[f32]) -> Result<Slice<f32>, CudaError> {
        let vector = self.take(source.len())?;
        self.staged(|staging| {
            // SAFETY: the copy has run when `synchronize` returns; the arena outlives the loader.
            unsafe { staging.stream.upload(source, vector)? };
            staging.stream.synchronize()
        })?;
        Ok(vector)
    }
}

/// Two buffers: one is filled while the other is copied.
struct Staging {
    stream: Stream,
    buffers: [(Pinned<bf16>, Event); 2],
    next: usize,
    floats: Vec<f32>,
}

impl Staging {
    fn new(device: &Device) -> Result<Self, CudaError> {
        let stream = Stream::new(device, Priority::Low)?;
        let buffer = || {
            let event = Event::new(device)?;
            stream.record(&event)?;
            Ok::<_, CudaError>((Pinned::new(device, CHUNK)?, event))
        };
        Ok(Self {
            buffers: [buffer()?, buffer()?],
            stream,
            next: 0,
            floats: Vec::new(),
        })
    }

    /// Converts and copies one part of a matrix.
    fn matrix(
        &mut self,
        part: &MatrixPart<'_>,
        cols: usize,
        to: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let row_bytes = part.bytes.len() / part.rows;
        let rows = (CHUNK / cols).max(1);
        if cols > CHUNK {
            return Err(CudaError::Config(format!("a matrix of width {cols}")));
        }
        for (i, bytes) in part.bytes.chunks(rows * row_bytes).enumerate() {
            let (buffer, copied) = &mut self.buffers[self.next];
            copied.synchronize()?;
            let start = i * rows * cols;
            let len = bytes.len() / row_bytes * cols;
            convert(part.ggml_type, bytes, &mut self.floats, &mut buffer[..len])?;
            // SAFETY: the buffer is written again only after `copied`; the arena outlives the loader.
            unsafe {
                self.stream
                    .upload(&buffer[..len], to.range(start..start + len))?
            };
            self.stream.record(copied)?;
            self.next = 1 - self.next;
        }
        Ok(())
    }
}

/// Rounds whole rows of any format to bfloat16.
fn convert(
    ty: GgmlType,
    bytes: &[u8],
    floats: &mut Vec<f32>,
    out: &mut [bf16],
) -> Result<(), CudaError> {
    if ty == GgmlType::BF16 {
        for (out, pair) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
            *out = bf16::from_le_bytes(*pair);
        }
        return Ok(());
    }
    floats.resize(out.len(), 0.0);
    dequantize(ty, bytes, floats)
        .map_err(|e| CudaError::Config(format!("a weight can't be converted: {e}")))?;
    for (out, x) in out.iter_mut().zip(floats) {
        *out = bf16::from_f32(*x);
    }
    Ok(())
}

/// Bytes that a model's weights take on the GPU.
pub(crate) fn weight_bytes(checkpoint: &dyn Checkpoint, c: &ModelConfig) -> u64 {
    let matrix = |rows: usize, cols: usize| {
        let rows = rows.next_multiple_of(ROWS);
        Arena::room_for::<bf16>(rows * cols) + Arena::room_for::<f32>(rows) // with a bias
    };
    let vector = Arena::room_for::<f32>;
    let (q, kv) = (c.q_width(), c.kv_width());
    let layer = matrix(q + 2 * kv, c.hidden)
        + matrix(c.hidden, q)
        + matrix(2 * c.ffn, c.hidden)
        + matrix(c.hidden, c.ffn)
        + 4 * vector(c.hidden)
        + 2 * vector(c.head_dim);
    let tables = match checkpoint.tensor("output.weight") {
        Some(_) => 2,
        None => 1,
    };
    layer * c.layers as u64 + tables * matrix(c.vocab_size, c.hidden) + vector(c.hidden)
}
