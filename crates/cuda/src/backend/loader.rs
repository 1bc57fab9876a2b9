use std::sync::{Mutex, PoisonError};

use half::bf16;
use spate_model::quant::dequantize;
use spate_model::{
    Checkpoint, GgmlType, LoadError, Loader, MatrixPart, MatrixSource, ModelConfig, Weights,
};

use crate::CudaError;
use crate::driver::{Arena, Device, Event, Pinned, Plain, Priority, Slice, Stream};
use crate::kernels::{Form, Pack, Path};
use crate::linear::{Linear, PackedPart};

/// Bytes of a staging buffer: of page-locked memory, and on the GPU.
const CHUNK: usize = 4 << 20;

/// Threads that read weights, each with two buffers of [`CHUNK`] bytes: one alone does not saturate
/// the page cache.
pub(crate) const LOAD_THREADS: usize = 16;

/// Rows of a bfloat16 matrix are a multiple of it: added rows are zero.
const ROWS: usize = 8;

/// One linear map, or several that read the same input with their outputs one after another. A handle:
/// the memory belongs to the weights' arena.
#[derive(Debug, Clone)]
pub(crate) struct Matrix {
    pub(crate) stored: Stored,
    /// Output width, rounded up to a multiple of 8.
    pub(crate) rows: usize,
    /// Input width.
    pub(crate) cols: usize,
    /// `[rows]`
    pub(crate) bias: Option<Slice<f32>>,
}

/// The form of a matrix.
#[derive(Debug, Clone)]
pub(crate) enum Stored {
    /// `[rows, cols]`
    Bf16(Slice<bf16>),
    /// As wide as in the file, some rows after the others.
    Packed(Vec<PackedPart>),
}

/// How a matrix will be stored: packed if the kernels know the formats of all its parts, and they can
/// follow each other without padding.
fn forms(source: &MatrixSource<'_>) -> Option<Vec<Form>> {
    let (_, before) = source.parts.split_last()?;
    if before
        .iter()
        .any(|part| !part.rows.is_multiple_of(Form::ROWS))
    {
        return None;
    }
    let forms = source.parts.iter().map(|part| Form::of(part.ggml_type));
    forms.collect()
}

/// Bytes of a matrix without its bias.
fn matrix_bytes(source: &MatrixSource<'_>) -> usize {
    match forms(source) {
        Some(forms) => {
            let parts = source.parts.iter().zip(forms);
            parts.map(|(p, form)| form.bytes(p.rows, source.cols)).sum()
        }
        None => padded_rows(source) * source.cols * size_of::<bf16>(),
    }
}

fn padded_rows(source: &MatrixSource<'_>) -> usize {
    let rows: usize = source.parts.iter().map(|part| part.rows).sum();
    rows.next_multiple_of(ROWS)
}

/// Weights of one format of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightFormat {
    /// In the file.
    pub file: GgmlType,
    /// Whether they stay quantised on the GPU; otherwise they are bfloat16 there.
    pub quantized: bool,
    /// Bytes on the GPU.
    pub bytes: u64,
}

/// What a model's weights need on the GPU.
#[derive(Debug, Default)]
pub(crate) struct WeightPlan {
    /// Size of the arena, exactly.
    pub(crate) bytes: u64,
    /// Elements of memory that a product of many tokens needs beside it; see [`Linear::scratch_len`].
    pub(crate) scratch: usize,
    /// Whether there may be matrices whose gates are not applied as their products are computed.
    pub(crate) gate_up: bool,
    /// Matrices by the format of the file.
    pub(crate) formats: Vec<WeightFormat>,
}

impl WeightPlan {
    /// Walks over the model as loading will, without reading its matrices.
    pub(crate) fn new(
        checkpoint: &dyn Checkpoint,
        c: &ModelConfig,
        path: Path,
    ) -> Result<Self, CudaError> {
        let planner = Planner {
            path,
            plan: Mutex::default(),
        };
        Weights::load(checkpoint, c, &planner, 1, &mut |_| {}).map_err(load_error)?;
        let plan = planner.plan.into_inner();
        let mut plan = plan.unwrap_or_else(PoisonError::into_inner);
        plan.gate_up = path == Path::Portable || plan.formats.iter().any(|f| f.quantized);
        Ok(plan)
    }

    fn count(&mut self, file: GgmlType, quantized: bool, bytes: u64) {
        let mut known = self.formats.iter_mut();
        match known.find(|f| f.file == file && f.quantized == quantized) {
            Some(format) => format.bytes += bytes,
            None => self.formats.push(WeightFormat {
                file,
                quantized,
                bytes,
            }),
        }
    }
}

/// Which side is at fault, as an error of ours.
pub(crate) fn load_error(error: LoadError<CudaError>) -> CudaError {
    match error {
        LoadError::Model(e) => CudaError::Model(e),
        LoadError::Backend(e) => e,
    }
}

struct Planner {
    path: Path,
    plan: Mutex<WeightPlan>,
}

impl Loader for Planner {
    type Matrix = ();
    type Vector = ();
    type Error = CudaError;

    fn matrix(&self, source: MatrixSource<'_>) -> Result<(), CudaError> {
        let (rows, cols) = (padded_rows(&source), source.cols);
        let forms = forms(&source);
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        plan.bytes += Arena::room_for::<u8>(matrix_bytes(&source));
        if source.bias.is_some() {
            plan.bytes += Arena::room_for::<f32>(rows);
        }
        if forms.is_some() {
            plan.scratch = plan.scratch.max(Linear::scratch_len(self.path, rows, cols));
        }
        for (i, part) in source.parts.iter().enumerate() {
            let bytes = match &forms {
                Some(forms) => forms[i].bytes(part.rows, cols),
                None => part.rows * cols * size_of::<bf16>(),
            };
            plan.count(part.ggml_type, forms.is_some(), bytes as u64);
        }
        Ok(())
    }

    fn vector(&self, source: &[f32]) -> Result<(), CudaError> {
        let mut plan = self.plan.lock().unwrap_or_else(PoisonError::into_inner);
        plan.bytes += Arena::room_for::<f32>(source.len());
        Ok(())
    }
}

/// Brings weights to the GPU: the model's loading threads read pieces of the file into page-locked
/// memory, which the GPU copies while the next piece is read. Quantised weights are packed there.
pub(crate) struct CudaLoader {
    device: Device,
    pack: Pack,
    arena: Mutex<Arena>,
    idle: Mutex<Vec<Staging>>,
}

impl CudaLoader {
    /// `arena`: as large as [`WeightPlan`] says.
    pub(crate) fn new(arena: Arena) -> Result<Self, CudaError> {
        Ok(Self {
            device: arena.device().clone(),
            pack: Pack::load(arena.device())?,
            arena: Mutex::new(arena),
            idle: Mutex::new(Vec::new()),
        })
    }

    /// The weights' memory, when all copies have run. Staging memory is given back.
    pub(crate) fn finish(self) -> Result<Arena, CudaError> {
        self.device.synchronize()?;
        let arena = self.arena.into_inner();
        let arena = arena.unwrap_or_else(PoisonError::into_inner);
        debug_assert_eq!(arena.used(), arena.size(), "the plan is exact");
        Ok(arena)
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

    fn bf16(&self, source: &MatrixSource<'_>) -> Result<Stored, CudaError> {
        let (cols, padded) = (source.cols, padded_rows(source));
        let weights = self.take::<bf16>(padded * cols)?;
        self.staged(|staging| {
            let mut first = 0;
            for part in &source.parts {
                let to = weights.range(first * cols..(first + part.rows) * cols);
                staging.bf16(&self.pack, part, cols, to)?;
                first += part.rows;
            }
            // SAFETY: the arena outlives the loader.
            unsafe {
                let rest = weights.range(first * cols..padded * cols);
                staging.stream.fill(rest, 0)
            }
        })?;
        Ok(Stored::Bf16(weights))
    }

    fn packed(&self, source: &MatrixSource<'_>, forms: &[Form]) -> Result<Stored, CudaError> {
        let all = self.take::<u8>(matrix_bytes(source))?;
        let mut parts: Vec<PackedPart> = Vec::new();
        self.staged(|staging| {
            let mut start = 0;
            for (part, &form) in source.parts.iter().zip(forms) {
                let end = start + form.bytes(part.rows, source.cols);
                let data = all.range(start..end);
                staging.packed(&self.pack, part, source.cols, data)?;
                match parts.last_mut() {
                    Some(last) if last.form == form => {
                        last.rows += part.rows;
                        last.data = all.range(end - form.bytes(last.rows, source.cols)..end);
                    }
                    _ => parts.push(PackedPart {
                        form,
                        rows: part.rows,
                        data,
                    }),
                }
                start = end;
            }
            Ok(())
        })?;
        Ok(Stored::Packed(parts))
    }
}

impl Loader for CudaLoader {
    type Matrix = Matrix;
    type Vector = Slice<f32>;
    type Error = CudaError;

    fn matrix(&self, mut source: MatrixSource<'_>) -> Result<Matrix, CudaError> {
        let stored = match forms(&source) {
            Some(forms) => self.packed(&source, &forms)?,
            None => self.bf16(&source)?,
        };
        let (rows, cols) = (padded_rows(&source), source.cols);
        let bias = source.bias.take().map(|mut bias| {
            bias.resize(rows, 0.0);
            self.vector(&bias)
        });
        Ok(Matrix {
            stored,
            rows,
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
    buffers: [(Pinned<u8>, Event); 2],
    next: usize,
    /// On the GPU, what is not stored as it is in the file. Copies and kernels of a stream take turns.
    raw: Arena,
    bytes: Vec<u8>,
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
            raw: Arena::new(device, "loading weights", CHUNK as u64)?,
            bytes: Vec::new(),
            floats: Vec::new(),
        })
    }

    /// Has `fill` write the next buffer's first `len` bytes, and copies them.
    fn upload(
        &mut self,
        len: usize,
        to: Slice<u8>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let (buffer, copied) = &mut self.buffers[self.next];
        copied.synchronize()?;
        fill(&mut buffer[..len])?;
        // SAFETY: the buffer is written again only after `copied`; the target outlives the loader, or is
        // `raw`, whose stream is waited for first.
        unsafe { self.stream.upload(&buffer[..len], to)? };
        self.stream.record(copied)?;
        self.next = 1 - self.next;
        Ok(())
    }

    /// One part of a matrix, to be stored as bfloat16.
    fn bf16(
        &mut self,
        pack: &Pack,
        part: &MatrixPart<'_>,
        cols: usize,
        to: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let ty = part.ggml_type;
        match ty {
            GgmlType::BF16 => {
                for start in (0..part.bytes).step_by(CHUNK) {
                    let end = part.bytes.min(start + CHUNK);
                    let to = to.cast().range(start..end);
                    self.upload(end - start, to, |buffer| Ok(part.read_at(start, buffer)?))?;
                }
                Ok(())
            }
            GgmlType::F16 | GgmlType::F32 => {
                let raw = self.raw.whole();
                for start in (0..part.bytes).step_by(CHUNK) {
                    let end = part.bytes.min(start + CHUNK);
                    let raw = raw.range(0..end - start);
                    self.upload(end - start, raw, |buffer| Ok(part.read_at(start, buffer)?))?;
                    let width = ty.block_bytes();
                    let to = to.range(start / width..end / width);
                    // SAFETY: the arena outlives the loader.
                    unsafe { pack.round(&self.stream, ty, raw, to)? };
                }
                Ok(())
            }
            _ => self.dequantized(part, cols, to),
        }
    }

    /// One part of a matrix in a format that no kernel knows.
    fn dequantized(
        &mut self,
        part: &MatrixPart<'_>,
        cols: usize,
        to: Slice<bf16>,
    ) -> Result<(), CudaError> {
        let row_bytes = part.bytes / part.rows;
        let step = rows_of(CHUNK, cols * size_of::<bf16>(), 1)?;
        let (mut bytes, mut floats) = (
            std::mem::take(&mut self.bytes),
            std::mem::take(&mut self.floats),
        );
        for first in (0..part.rows).step_by(step) {
            let rows = step.min(part.rows - first);
            bytes.resize(rows * row_bytes, 0);
            part.read_at(first * row_bytes, &mut bytes)?;
            floats.resize(rows * cols, 0.0);
            dequantize(part.ggml_type, &bytes, &mut floats)
                .map_err(|e| CudaError::Config(format!("a weight can't be converted: {e}")))?;
            let to = to.range(first * cols..(first + rows) * cols).cast();
            self.upload(to.len(), to, |buffer| {
                for (out, x) in buffer.as_chunks_mut::<2>().0.iter_mut().zip(&floats) {
                    *out = bf16::from_f32(*x).to_le_bytes();
                }
                Ok(())
            })?;
        }
        (self.bytes, self.floats) = (bytes, floats);
        Ok(())
    }

    /// One part of a matrix, to be stored quantised.
    fn packed(
        &mut self,
        pack: &Pack,
        part: &MatrixPart<'_>,
        cols: usize,
        to: Slice<u8>,
    ) -> Result<(), CudaError> {
        let (ty, row_bytes) = (part.ggml_type, part.bytes / part.rows);
        let form = Form::of(ty).expect("parts were asked for their forms");
        let step = rows_of(CHUNK, row_bytes, Form::ROWS)?;
        for first in (0..part.rows).step_by(step) {
            let rows = step.min(part.rows - first);
            let raw = self.raw.whole().range(0..rows * row_bytes);
            self.upload(raw.len(), raw, |buffer| {
                Ok(part.read_at(first * row_bytes, buffer)?)
            })?;
            let start = form.bytes(first, cols);
            let to = to.range(start..start + form.bytes(rows, cols));
            // SAFETY: the arena outlives the loader.
            unsafe { pack.pack(&self.stream, ty, raw, [rows, cols], to)? };
        }
        Ok(())
    }
}

/// How many rows fit, in multiples of `multiple`.
fn rows_of(bytes: usize, row_bytes: usize, multiple: usize) -> Result<usize, CudaError> {
    match bytes / row_bytes / multiple * multiple {
        0 => Err(CudaError::Config(format!(
            "a weight's rows of {row_bytes} bytes are too long to be loaded to the GPU"
        ))),
        rows => Ok(rows),
    }
}
