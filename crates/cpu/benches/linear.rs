//! Matrix products at the shapes of real models, beside the machine's own limits:
//! `cargo bench -p spate-cpu --bench linear [threads]`.
//!
//! At m = 1 a product reads all its weights once, so the limit is memory bandwidth; the read loop
//! beside it goes over as many bytes, in pages of the usual size. With many tokens the limit is
//! arithmetic.

use std::hint::black_box;
use std::time::{Duration, Instant};

use spate_cpu::ThreadPool;
use spate_cpu::linear::{Isa, LinearWeight, Scratch, linear};
use spate_model::quant::GgmlType;

/// Output and input features, type, and where the shape comes from.
const SHAPES: &[(usize, usize, GgmlType, &str)] = &[
    (576, 576, GgmlType::Q4_1, "135M query"),
    (1536, 576, GgmlType::Q4_1, "135M gate"),
    (576, 1536, GgmlType::Q4_1, "135M down"),
    (49152, 576, GgmlType::Q8_0, "135M head"),
    (896, 896, GgmlType::Q4_0, "0.5B query"),
    (4864, 896, GgmlType::Q4_0, "0.5B gate"),
    (896, 4864, GgmlType::Q4K, "0.5B down"),
    (151_936, 896, GgmlType::Q8_0, "0.5B head"),
    (1536, 576, GgmlType::F32, "135M gate"),
];

/// Copies of a matrix that take turns at m = 1, so that its weights do not stay in the caches of the
/// cores: as many as make up this much.
const TURNS_BYTES: usize = 64 << 20;

/// Each figure is the best of as many: others on the machine only ever add time.
const SAMPLES: usize = 41;

fn main() {
    let threads = std::env::args()
        .skip(1)
        .find_map(|arg| arg.parse().ok())
        .unwrap_or(0);
    let pool = ThreadPool::new(threads).expect("threads");
    println!("{}, {} threads", Isa::best().name(), pool.threads());
    println!(
        "{:<12} {:<5} {:>14} {:>9} {:>8} {:>10} {:>10} {:>10} {:>11} {:>11}",
        "",
        "type",
        "shape",
        "m=1 us",
        "GB/s",
        "read GB/s",
        "m=8 GOP/s",
        "and cached",
        "m=64 GOP/s",
        "m=512 GOP/s"
    );
    for &(rows, cols, ty, name) in SHAPES {
        let bytes = weights(ty, rows * cols);
        let build = || LinearWeight::fast(ty, (rows, cols), &bytes, &pool).expect("shape");
        let first = build();
        let turns = (TURNS_BYTES / first.bytes()).clamp(1, 64);
        let mut matrices = vec![first];
        matrices.resize_with(turns, build);

        let decode = time(&pool, &matrices, 1);
        let gigabytes = matrices[0].bytes() as f64 / decode.as_secs_f64() / 1e9;
        let limit = read_bandwidth(&pool, matrices[0].bytes() * turns);
        let giga_ops = |matrices: &[LinearWeight], m: usize| {
            let took = time(&pool, matrices, m);
            (2 * rows * cols * m) as f64 / took.as_secs_f64() / 1e9
        };
        let (m8, cached) = (giga_ops(&matrices, 8), giga_ops(&matrices[..1], 8));
        let m64 = giga_ops(&matrices[..1], 64);
        // Nobody wants the logits of 512 tokens at once.
        let m512 = if rows < 10_000 {
            giga_ops(&matrices[..1], 512)
        } else {
            f64::NAN
        };
        println!(
            "{name:<12} {:<5} {:>14} {:>9.1} {gigabytes:>8.1} {limit:>10.1} {m8:>10.0} {cached:>10.0} {m64:>11.0} {m512:>11.0}",
            ty.name(),
            format!("{rows}x{cols}"),
            decode.as_secs_f64() * 1e6,
        );
    }
}

/// Time of one product of `m` tokens, the matrices taking turns.
fn time(pool: &ThreadPool, matrices: &[LinearWeight], m: usize) -> Duration {
    let (rows, cols) = (matrices[0].rows(), matrices[0].cols());
    let x: Vec<f32> = (0..m * cols).map(|i| (i % 61) as f32 - 30.0).collect();
    let mut out = vec![0.0; m * rows];
    let mut scratch = Scratch::new(m, cols);
    best(|| {
        let start = Instant::now();
        for matrix in matrices {
            linear(pool, &[matrix], &x, m, &mut [&mut out], &mut scratch);
        }
        black_box(&mut out);
        start.elapsed() / matrices.len() as u32
    })
}

/// GB/s at which all threads together read that many bytes, which they read before.
fn read_bandwidth(pool: &ThreadPool, bytes: usize) -> f64 {
    let data = vec![[1u64; 32]; bytes / 256];
    let parts: Vec<&[[u64; 32]]> = data.chunks(1 << 9).collect();
    let took = best(|| {
        let start = Instant::now();
        pool.run(parts.len(), |i| {
            let mut sums = [0; 32]; // enough independent sums that the loads are the limit
            for values in parts[i] {
                for (sum, value) in sums.iter_mut().zip(values) {
                    *sum ^= value;
                }
            }
            black_box(sums);
        });
        start.elapsed()
    });
    bytes as f64 / took.as_secs_f64() / 1e9
}

fn best(mut sample: impl FnMut() -> Duration) -> Duration {
    let samples = (0..SAMPLES).map(|_| sample());
    samples.min().expect("there are samples")
}

/// Blocks of zeros are as fast as any others.
fn weights(ty: GgmlType, count: usize) -> Vec<u8> {
    vec![0; ty.row_bytes(count).expect("whole blocks")]
}
