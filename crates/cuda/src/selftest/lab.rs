use std::fmt;
use std::time::Duration;

use half::bf16;

use crate::CudaError;
use crate::driver::{Arena, Device, Event, Graph, Plain, Priority, Slice, Stream};

/// Memory for one check.
const ROOM: u64 = 2 << 30;

/// Bytes behind each output that must stay as they are.
const GUARD: usize = 256;

/// What outputs hold beforehand: not a number, in every float format.
const POISON: u8 = 0xff;

/// What a check found.
#[derive(Debug, Clone)]
pub struct Report {
    /// The kernel and the kind of case.
    pub name: String,
    /// Cases that were compared.
    pub cases: usize,
    /// The largest error: ‖out − reference‖ / ‖reference‖ of a case, or the share of wrong choices.
    pub error: f64,
    /// The largest that passes.
    pub limit: f64,
    /// Of one run of a typical case, if it was timed.
    pub time: Option<Duration>,
    /// Bytes that this case must move, if it is bound by memory.
    pub bytes: Option<u64>,
    /// Multiplications and additions that it must do, if it is bound by arithmetic.
    pub operations: Option<u64>,
}

impl Report {
    /// Whether the kernel computes right. An error that is not a number fails.
    pub fn passed(&self) -> bool {
        self.error <= self.limit
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = if self.passed() { "ok  " } else { "FAIL" };
        let Self { name, cases, .. } = self;
        write!(
            f,
            "{verdict} {name:<34} {cases:>4} cases  error {:.1e}",
            self.error
        )?;
        if let Some(time) = self.time {
            write!(f, "  {:>8.2} us", time.as_secs_f64() * 1e6)?;
            if let Some(bytes) = self.bytes {
                let rate = bytes as f64 / time.as_secs_f64() / 1e9;
                write!(f, "  {rate:>6.0} GB/s")?;
            }
            if let Some(operations) = self.operations {
                let rate = operations as f64 / time.as_secs_f64() / 1e12;
                write!(f, "  {rate:>6.1} TFLOP/s")?;
            }
        }
        Ok(())
    }
}

/// A GPU with some memory and random numbers.
pub(super) struct Lab {
    pub(super) stream: Stream,
    arena: Arena,
    random: u64,
    /// Whether something was written behind an output.
    pub(super) damaged: bool,
}

/// Memory that a kernel writes.
#[derive(Clone, Copy)]
pub(super) struct Output<T> {
    pub(super) slice: Slice<T>,
    guard: Slice<u8>,
}

impl Lab {
    pub(super) fn new(device: &Device, seed: u64) -> Result<Self, CudaError> {
        Ok(Self {
            stream: Stream::new(device, Priority::High)?,
            arena: Arena::new(device, "the self-test", ROOM)?,
            random: seed,
            damaged: false,
        })
    }

    pub(super) fn device(&self) -> &Device {
        self.arena.device()
    }

    /// SplitMix64 (Steele, Lea & Flood 2014).
    pub(super) fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.random() % n.max(1) as u64) as usize
    }

    pub(super) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// In [0, 1).
    pub(super) fn uniform(&mut self) -> f64 {
        (self.random() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// About normally distributed: a sum of four uniform numbers.
    pub(super) fn normal(&mut self) -> f64 {
        let sum: f64 = (0..4).map(|_| self.uniform() - 0.5).sum();
        sum * 3f64.sqrt()
    }

    pub(super) fn bf16s(&mut self, len: usize) -> Vec<bf16> {
        (0..len).map(|_| bf16::from_f64(self.normal())).collect()
    }

    pub(super) fn f32s(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal() as f32).collect()
    }

    /// Memory with these contents.
    pub(super) fn upload<T: Plain>(&mut self, data: &[T]) -> Result<Slice<T>, CudaError> {
        let slice = self.arena.take(data.len())?;
        self.write(data, slice)?;
        Ok(slice)
    }

    pub(super) fn write<T: Plain>(&self, data: &[T], to: Slice<T>) -> Result<(), CudaError> {
        // SAFETY: the copy has run when `synchronize` returns; the arena is alive.
        unsafe { self.stream.upload(data, to)? };
        self.stream.synchronize()
    }

    /// Memory that a kernel's type carves for itself.
    pub(super) fn take<T>(
        &mut self,
        take: impl FnOnce(&mut Arena) -> Result<T, CudaError>,
    ) -> Result<T, CudaError> {
        take(&mut self.arena)
    }

    /// Random numbers that repeat after some megabytes.
    pub(super) fn random_bf16s(&mut self, len: usize) -> Result<Slice<bf16>, CudaError> {
        const PIECE: usize = 1 << 22;
        let piece = self.bf16s(PIECE.min(len));
        let all = self.output::<bf16>(len)?.slice;
        for start in (0..len).step_by(PIECE) {
            let part = all.range(start..(start + PIECE).min(len));
            self.write(&piece[..part.len()], part)?;
        }
        Ok(all)
    }

    /// Poisoned memory with a guard behind it.
    pub(super) fn output<T: Plain>(&mut self, len: usize) -> Result<Output<T>, CudaError> {
        let bytes = len * size_of::<T>();
        let all: Slice<u8> = self.arena.take(bytes + GUARD)?;
        // SAFETY: the arena is alive.
        unsafe { self.stream.fill(all, POISON)? };
        Ok(Output {
            slice: all.range(0..bytes).cast(),
            guard: all.range(bytes..bytes + GUARD),
        })
    }

    pub(super) fn read<T: Plain>(&mut self, output: Output<T>) -> Result<Vec<T>, CudaError> {
        let guard: Vec<u8> = self.download(output.guard)?;
        self.damaged |= guard.iter().any(|&byte| byte != POISON);
        self.download(output.slice)
    }

    pub(super) fn download<T: Plain>(&self, from: Slice<T>) -> Result<Vec<T>, CudaError> {
        // SAFETY: any bits are a value of a plain type.
        let mut data = vec![unsafe { std::mem::zeroed() }; from.len()];
        // SAFETY: the copy has run when `synchronize` returns; the arena is alive.
        unsafe { self.stream.download(from, &mut data)? };
        self.stream.synchronize()?;
        Ok(data)
    }

    /// Time of one run of `work`: the median of replays of a graph that holds several.
    pub(super) fn time(
        &self,
        work: impl Fn(&Stream) -> Result<(), CudaError>,
    ) -> Result<Duration, CudaError> {
        const RUNS: u32 = 20;
        let graph = Graph::capture(&self.stream, || {
            (0..RUNS).try_for_each(|_| work(&self.stream))
        })?;
        let (start, end) = (Event::new(self.device())?, Event::new(self.device())?);
        let mut times = Vec::new();
        for _ in 0..9 {
            self.stream.record(&start)?;
            // SAFETY: the arena is alive.
            unsafe { graph.launch(&self.stream)? };
            self.stream.record(&end)?;
            self.stream.synchronize()?;
            times.push(end.since(&start)? / RUNS);
        }
        times.sort();
        Ok(times[times.len() / 2])
    }

    /// Gives all memory back; slices from before are dead.
    pub(super) fn clear(&mut self) -> Result<(), CudaError> {
        self.stream.synchronize()?;
        self.arena.reset();
        Ok(())
    }

    /// Collects cases into a report. Damage behind an output fails it.
    pub(super) fn report(&mut self, name: &str, errors: &[f64], limit: f64) -> Report {
        let damaged = std::mem::take(&mut self.damaged);
        let worst = errors.iter().fold(
            0.0,
            |worst: f64, &e| {
                if e.is_nan() { f64::NAN } else { worst.max(e) }
            },
        );
        Report {
            name: name.to_owned(),
            cases: errors.len(),
            error: if damaged { f64::INFINITY } else { worst },
            limit,
            time: None,
            bytes: None,
            operations: None,
        }
    }
}

/// ‖got − want‖ / ‖want‖.
pub(super) fn distance(got: &[bf16], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let pairs = got.iter().zip(want);
    let (apart, size) = pairs.fold((0.0, 0.0), |(apart, size), (got, want)| {
        (apart + (got.to_f64() - want).powi(2), size + want * want)
    });
    (apart / size.max(f64::MIN_POSITIVE)).sqrt()
}
