//! How long an H100 takes for a step of Llama-3.1-8B's shape in bfloat16, as far as it depends on the plan.

use spate_executor::Batch;

/// Input tokens of a step, and the milliseconds of all but attention and sampling: matrix products,
/// norms, the head. From figures of a server under load, 2026-11-24, whose kernels have become faster since.
/// Up to 256 tokens it is about the time in which the weights are read, beyond that tiles have room for
/// multiples of [`TILE`].
const TOKENS: [(f64, f64); 9] = [
    (1.0, 5.7),
    (64.0, 5.75),
    (128.0, 6.3),
    (256.0, 7.4),
    (512.0, 12.2),
    (768.0, 16.9),
    (1024.0, 22.5),
    (2048.0, 47.0),
    (8192.0, 188.0),
];
const TILE: u32 = 256;

/// A decode reads 128 KiB of keys and values for each position, at 2.8 TB/s.
const READ: f64 = 131_072.0 / 2.8e9;

/// A prompt's position meets another in two products of 4096 numbers in each of 32 layers, at
/// 500 TFLOP/s.
const MEET: f64 = 4.0 * 4096.0 * 32.0 / 500e9;

/// What a step with prompts takes longer, as it is launched kernel by kernel.
const LAUNCHES: f64 = 0.3;

/// What a step with both prompts and decodes takes longer: two kinds of attention one after the other.
const MIXED: f64 = 1.5;

/// Choosing a token.
const SAMPLE: f64 = 0.0025;

/// Milliseconds for a step.
pub(crate) fn step_ms(batch: &Batch) -> f64 {
    let tokens: u32 = batch.rows.iter().map(|row| row.end() - row.start).sum();
    let tokens = match tokens {
        ..TILE => tokens,
        _ => tokens.next_multiple_of(TILE),
    };
    let mut ms = interpolate(&TOKENS, f64::from(tokens));
    let (mut prompts, mut decodes) = (false, false);
    for row in &batch.rows {
        let (start, end) = (f64::from(row.start), f64::from(row.end()));
        if row.end() - row.start == 1 {
            ms += end * READ;
            decodes = true;
        } else {
            ms += (end * end - start * start) / 2.0 * MEET;
            prompts = true;
        }
        ms += if row.sample { SAMPLE } else { 0.0 };
    }
    match (prompts, decodes) {
        (true, true) => ms + LAUNCHES + MIXED,
        (true, false) => ms + LAUNCHES,
        (false, _) => ms,
    }
}

/// Between points in the order of their first coordinates, and beyond the last as before it.
fn interpolate(points: &[(f64, f64)], x: f64) -> f64 {
    let above = points.iter().position(|&(at, _)| x <= at);
    let above = above.unwrap_or(points.len() - 1).max(1);
    let ((x0, y0), (x1, y1)) = (points[above - 1], points[above]);
    y0 + (x - x0) * (y1 - y0) / (x1 - x0)
}
