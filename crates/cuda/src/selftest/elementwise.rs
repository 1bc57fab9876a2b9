use std::time::Duration;

use half::bf16;
use spate_model::{Activation, RopePairing};

use super::kv::{self, Row};
use super::lab::{Lab, Report, distance};
use crate::CudaError;
use crate::kernels::{
    ActMul, AddRmsNorm, CopyBlocks, Embed, KvDtype, KvShape, LAST, NOWHERE, QkNormRopeAppend, Rope,
};

/// Rounding to bfloat16 leaves 2^-9 at most, and about 0.0017 on average.
const LIMIT: f64 = 3e-3;

const CASES: usize = 12;

pub(super) fn embed(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let kernel = Embed::load(lab.device())?;
    let mut errors = Vec::new();
    for case in 0..CASES {
        lab.clear()?;
        let width = [4096, 576, 8, 2048][case % 4] + 8 * lab.below(case + 1);
        let (vocab, slots, n) = (1 + lab.below(1000), 1 + lab.below(64), 1 + lab.below(300));
        let table = lab.bf16s(vocab * width);
        let last: Vec<i32> = (0..slots)
            .map(|_| lab.below(vocab + 1) as i32 - 1)
            .collect();
        let tokens: Vec<u32> = (0..n)
            .map(|_| match lab.below(2) {
                0 => lab.below(vocab) as u32,
                _ => LAST | lab.below(slots) as u32,
            })
            .collect();
        let scale = 0.5 + lab.uniform() as f32;
        let out = lab.output(n * width)?;
        let (on_tokens, on_last) = (lab.upload(&tokens)?, lab.upload(&last)?);
        let on_table = lab.upload(&table)?;
        // SAFETY: tokens and slots are in range; the arena is alive.
        unsafe {
            let out = out.slice;
            kernel.launch(&lab.stream, on_tokens, on_last, on_table, scale, width, out)?;
        }
        let want: Vec<f64> = tokens
            .iter()
            .flat_map(|&token| {
                let token = match token & LAST {
                    0 => token as usize,
                    _ => last[(token & !LAST) as usize].max(0) as usize,
                };
                let row = &table[token * width..][..width];
                row.iter().map(move |x| x.to_f64() * f64::from(scale))
            })
            .collect();
        errors.push(distance(&lab.read(out)?, &want));
    }
    Ok(vec![lab.report("embed", &errors, LIMIT)])
}

pub(super) fn add_rms_norm(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    const EPS: f32 = 1e-5;
    let kernel = AddRmsNorm::load(lab.device())?;
    let mut errors = Vec::new();
    for case in 0..CASES {
        lab.clear()?;
        let width = lab.pick(&[8, 576, 640, 896, 4096, 8192, AddRmsNorm::MAX_WIDTH]);
        let n = 1 + lab.below(40);
        let (residual, delta) = (lab.bf16s(n * width), lab.bf16s(n * width));
        let (norm, delta_norm) = (lab.f32s(width), lab.f32s(width));
        let on_residual = lab.output(n * width)?;
        lab.write(&residual, on_residual.slice)?;
        let with_delta = case % 3 > 0;
        let with_norm = case % 3 == 2;
        let on_delta_norm = with_norm.then(|| lab.upload(&delta_norm)).transpose()?;
        let on_delta = with_delta.then(|| lab.upload(&delta)).transpose()?;
        let on_delta = on_delta.map(|delta| (delta, on_delta_norm));
        let on_norm = lab.upload(&norm)?;
        let out = lab.output(n * width)?;
        // SAFETY: the arena is alive.
        unsafe {
            let (residual, out) = (on_residual.slice, out.slice);
            kernel.launch(&lab.stream, n, on_delta, residual, on_norm, EPS, out)?;
        }
        let mut deltas = Vec::new();
        for row in delta.chunks_exact(width) {
            let row: Vec<f64> = row.iter().map(|x| x.to_f64()).collect();
            let norm = with_norm.then_some(delta_norm.as_slice());
            normalise(&row, norm, f64::from(EPS), &mut deltas);
        }
        let each = residual.iter().zip(&deltas);
        let sums: Vec<f64> = each
            .map(|(r, d)| r.to_f64() + if with_delta { *d } else { 0.0 })
            .collect();
        let mut want = Vec::new();
        for row in sums.chunks_exact(width) {
            normalise(row, Some(&norm), f64::from(EPS), &mut want);
        }
        errors.push(distance(&lab.read(out)?, &want));
        errors.push(distance(&lab.read(on_residual)?, &sums));
    }
    let mut report = lab.report("add_rms_norm", &errors, LIMIT);

    lab.clear()?;
    let (n, width) = (2048, 4096);
    let (x, norm) = (lab.bf16s(n * width), lab.f32s(width));
    let (delta, residual) = (lab.upload(&x)?, lab.upload(&x)?);
    let (norm, out) = (lab.upload(&norm)?, lab.output(n * width)?.slice);
    // SAFETY: the arena is alive.
    let time = lab.time(|stream| unsafe {
        kernel.launch(stream, n, Some((delta, None)), residual, norm, EPS, out)
    })?;
    report.time = Some(time);
    report.bytes = Some(4 * 2 * (n * width) as u64);
    let mut reports = vec![report];
    for n in [16, 64, 256, 512] {
        // SAFETY: as above.
        let time = lab.time(|stream| unsafe {
            kernel.launch(stream, n, Some((delta, None)), residual, norm, EPS, out)
        })?;
        let mut small = lab.report(&format!("add_rms_norm {n} x 4096"), &[], LIMIT);
        small.time = Some(time);
        reports.push(small);
    }
    Ok(reports)
}

/// Appends x / rms(x) * norm.
fn normalise(x: &[f64], norm: Option<&[f32]>, eps: f64, out: &mut Vec<f64>) {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = (mean + eps).sqrt().recip();
    out.extend(x.iter().enumerate().map(|(i, x)| match norm {
        Some(norm) => x * scale * f64::from(norm[i]),
        None => *x,
    }));
}

pub(super) fn act_mul(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let kernel = ActMul::load(lab.device())?;
    let mut reports = Vec::new();
    for activation in [Activation::Silu, Activation::GeluTanh] {
        let mut errors = Vec::new();
        for _ in 0..CASES {
            lab.clear()?;
            let (n, width) = (1 + lab.below(200), 8 * (1 + lab.below(1000)));
            let gate_up: Vec<bf16> = (0..2 * n * width)
                .map(|_| bf16::from_f64(4.0 * lab.normal()))
                .collect();
            let on_gate_up = lab.upload(&gate_up)?;
            let out = lab.output(n * width)?;
            // SAFETY: the arena is alive.
            unsafe {
                kernel.launch(&lab.stream, activation, n, width, on_gate_up, out.slice)?;
            }
            let rows = gate_up.chunks_exact(2 * width);
            let want: Vec<f64> = rows
                .flat_map(|row| {
                    let (gate, up) = row.split_at(width);
                    let each = gate.iter().zip(up);
                    each.map(|(g, u)| activate(activation, g.to_f64()) * u.to_f64())
                })
                .collect();
            errors.push(distance(&lab.read(out)?, &want));
        }
        let name = format!("act_mul {activation:?}");
        reports.push(lab.report(&name, &errors, LIMIT));
    }
    lab.clear()?;
    let (n, width) = (2048, 14336);
    let gate_up = lab.bf16s(2 * n * width);
    let (gate_up, out) = (lab.upload(&gate_up)?, lab.output(n * width)?.slice);
    // SAFETY: the arena is alive.
    let time = lab.time(|stream| unsafe {
        kernel.launch(stream, Activation::Silu, n, width, gate_up, out)
    })?;
    reports[0].time = Some(time);
    reports[0].bytes = Some(3 * 2 * (n * width) as u64);
    Ok(reports)
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::GeluTanh => {
            let u = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + u.tanh())
        }
    }
}

/// A random model's heads, and what the cache must hold after an append.
struct RopeCase {
    model: QkNormRopeAppend,
    layers: usize,
    tokens: usize,
}

impl RopeCase {
    fn new(lab: &mut Lab, dtype: KvDtype, dim: u32) -> Self {
        let kv_heads = 1 + lab.below(4) as u32;
        let rotated = match lab.below(3) {
            0 if dim > 32 => dim / 2 / 16 * 16,
            _ => dim,
        };
        let pairing = lab.pick(&[RopePairing::Interleaved, RopePairing::Halves]);
        Self {
            model: QkNormRopeAppend {
                heads: kv_heads * (1 + lab.below(8) as u32),
                shape: KvShape::new(
                    dtype,
                    4 + lab.below(12) as u32,
                    kv_heads,
                    lab.pick(&[16, 32, 64]),
                    dim,
                ),
                pairing,
                pairs: rotated / 2,
                eps: 1e-6,
            },
            layers: 1 + lab.below(3),
            tokens: 1 + lab.below(100),
        }
    }
}

pub(super) fn rope(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let kernel = Rope::load(lab.device())?;
    let mut reports = Vec::new();
    for dim in [64, 80, 96, 128, 256] {
        for dtype in [KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8] {
            let (mut queries, mut caches) = (Vec::new(), Vec::new());
            for _ in 0..CASES {
                lab.clear()?;
                let case = RopeCase::new(lab, dtype, dim);
                let with_norms = lab.below(2) == 0;
                let [query, cache] = rope_case(lab, &kernel, &case, with_norms)?;
                queries.push(query);
                caches.push(cache);
            }
            let name = |what| format!("rope, {what} of {dim}, {dtype:?}");
            // Of codes: what half a step allows.
            let limit = if dtype == KvDtype::Bf16 { LIMIT } else { 1.0 };
            reports.push(lab.report(&name("queries"), &queries, LIMIT));
            reports.push(lab.report(&name("keys, values"), &caches, limit));
        }
    }
    for tokens in [64, 256, 512] {
        lab.clear()?;
        let time = time_append(lab, &kernel, tokens)?;
        let name = format!("rope, append {tokens} x 32/8 x 128");
        let mut report = lab.report(&name, &[], LIMIT);
        report.time = Some(time);
        reports.push(report);
    }
    Ok(reports)
}

fn time_append(lab: &mut Lab, kernel: &Rope, tokens: usize) -> Result<Duration, CudaError> {
    let (heads, kv_heads, dim) = (32, 8, 128);
    let shape = KvShape::new(KvDtype::Bf16, 64, kv_heads, 16, dim);
    let model = QkNormRopeAppend {
        heads,
        shape,
        pairing: RopePairing::Halves,
        pairs: dim / 2,
        eps: 1e-6,
    };
    let places: Vec<u32> = (0..tokens as u32).collect();
    let places = lab.upload(&places)?;
    let qkv = lab.bf16s(tokens * ((heads + 2 * kv_heads) * dim) as usize);
    let qkv = lab.upload(&qkv)?;
    let rotations = lab.f32s(tokens * dim as usize);
    let rotations = lab.upload(&rotations)?;
    let cache = lab.output::<u8>(shape.layer_bytes())?.slice;
    // SAFETY: places are inside the cache and differ; the arena is alive.
    lab.time(|stream| unsafe {
        kernel.append(stream, &model, 0, None, rotations, None, places, qkv, cache)
    })
}

/// Errors of queries and of the cache; infinite if the cache changed where it must not.
fn rope_case(
    lab: &mut Lab,
    kernel: &Rope,
    case: &RopeCase,
    with_norms: bool,
) -> Result<[f64; 2], CudaError> {
    let RopeCase {
        model,
        layers,
        tokens,
    } = *case;
    let (shape, dim) = (model.shape, model.shape.head_dim as usize);
    let (heads, kv_heads) = (model.heads as usize, shape.kv_heads as usize);
    let (all_heads, pairs) = (heads + 2 * kv_heads, model.pairs as usize);
    let rates: Vec<f64> = (0..pairs)
        .map(|i| 500_000f64.powf(-(i as f64) / pairs as f64))
        .collect();
    let positions: Vec<u32> = (0..tokens).map(|_| lab.below(200_000) as u32).collect();
    let mut free: Vec<u32> = (0..shape.blocks * shape.block_size).collect();
    let places: Vec<u32> = (0..tokens)
        .map(|_| match lab.below(8) {
            0 => NOWHERE,
            _ if free.is_empty() => NOWHERE,
            _ => free.swap_remove(lab.below(free.len())),
        })
        .collect();
    let magnitude = 1.0 + lab.below(2) as f32 * 0.25;
    let qkv = lab.bf16s(tokens * all_heads * dim);
    let norms = [lab.f32s(dim), lab.f32s(dim)];
    let layer = lab.below(layers);

    let rotations = lab.output(2 * tokens * pairs)?;
    let (on_positions, on_rates) = (lab.upload(&positions)?, lab.upload(&rates)?);
    let on_places = lab.upload(&places)?;
    let on_qkv = lab.output(qkv.len())?;
    lab.write(&qkv, on_qkv.slice)?;
    let on_norms = match with_norms {
        true => Some((lab.upload(&norms[0])?, lab.upload(&norms[1])?)),
        false => None,
    };
    let common = (lab.below(2) == 0).then(|| lab.f32s(kv_heads * dim));
    let on_common = match &common {
        Some(common) => Some(lab.upload(common)?),
        None => None,
    };
    let cache = lab.output::<u8>(layers * shape.layer_bytes())?;
    // SAFETY: places are inside the cache and differ; the arena is alive.
    unsafe {
        let stream = &lab.stream;
        kernel.rotations(stream, on_positions, on_rates, magnitude, rotations.slice)?;
        kernel.append(
            stream,
            &model,
            layer,
            on_norms,
            rotations.slice,
            on_common,
            on_places,
            on_qkv.slice,
            cache.slice,
        )?;
    }
    let (got, mut cache) = (lab.read(on_qkv)?, lab.read(cache)?);
    lab.read(rotations)?;

    let (mut got_queries, mut want_queries) = (Vec::new(), Vec::new());
    let mut worst = 0f64;
    for t in 0..tokens {
        for head in 0..all_heads {
            let at = (t * all_heads + head) * dim;
            let x: Vec<f64> = qkv[at..at + dim].iter().map(|x| x.to_f64()).collect();
            let is_value = head >= heads + kv_heads;
            let mut want = Vec::new();
            let norm = &norms[usize::from(head >= heads)];
            let norm = (with_norms && !is_value).then_some(norm.as_slice());
            normalise(&x, norm, f64::from(model.eps), &mut want);
            if !is_value {
                let angle = |i: usize| f64::from(positions[t]) * rates[i];
                rotate(&mut want, model.pairing, pairs, magnitude.into(), angle);
                if let Some(common) = common.as_ref().filter(|_| head >= heads) {
                    let common = &common[(head - heads) * dim..][..dim];
                    want.iter_mut()
                        .zip(common)
                        .for_each(|(x, c)| *x -= f64::from(*c));
                }
                if shape.is_packed() {
                    want = in_pieces(&model, &want);
                }
            }
            if head < heads {
                got_queries.extend_from_slice(&got[at..at + dim]);
                want_queries.extend(want);
            } else if places[t] != NOWHERE {
                let (block, offset) = (places[t] / shape.block_size, places[t] % shape.block_size);
                let at = layer * shape.layer_bytes()
                    + block as usize * shape.block_bytes()
                    + (head - heads) * shape.tile_bytes(); // keys of all heads, then values of all heads
                let tile = &mut cache[at..at + shape.tile_bytes()];
                let error = row_error(&shape, tile, offset as usize, &want);
                worst = if error <= worst { worst } else { error };
            }
        }
    }
    // What was compared is poison again now.
    if cache.iter().any(|&byte| byte != 0xff) {
        worst = f64::INFINITY;
    }
    Ok([distance(&got_queries, &want_queries), worst])
}

/// A query or key as it is beside a cache of codes: in the order of threads, and of integers rotated.
fn in_pieces(model: &QkNormRopeAppend, x: &[f64]) -> Vec<f64> {
    let (dim, pairs) = (x.len(), model.pairs as usize);
    let mut out = Vec::with_capacity(dim);
    for piece in 0..dim / 16 {
        let apart = model.pairing == RopePairing::Halves && piece < 2 * pairs / 16;
        let [a, b] = match apart {
            true => [8 * piece, 8 * piece + pairs],
            false => [16 * piece, 16 * piece + 8],
        };
        let piece: Vec<f64> = [&x[a..a + 8], &x[b..b + 8]].concat();
        match model.shape.dtype() {
            KvDtype::Int8 => out.extend((0..16usize).map(|i| {
                // An entry of the Walsh-Hadamard matrix is -1 to the number of ones in both indices.
                let signed = |(j, x): (usize, &f64)| match (i & j).count_ones() % 2 {
                    0 => *x,
                    _ => -x,
                };
                piece.iter().enumerate().map(signed).sum::<f64>() / 4.0
            })),
            _ => out.extend(piece),
        }
    }
    out
}

/// How far a row of a tile is from what it should be; of codes, as a share of what is allowed. Poisons it.
fn row_error(shape: &KvShape, tile: &mut [u8], offset: usize, want: &[f64]) -> f64 {
    if !shape.is_packed() {
        let row = &mut tile[offset * shape.row_bytes()..][..shape.row_bytes()];
        let (pairs, _) = row.as_chunks::<2>();
        let got: Vec<bf16> = pairs
            .iter()
            .map(|pair| bf16::from_le_bytes(*pair))
            .collect();
        row.fill(0xff);
        return distance(&got, want);
    }
    let dtype = shape.dtype();
    let row = Row::read(shape, tile, offset);
    let poison = Row {
        codes: vec![0xff; want.len()],
        scales: vec![bf16::from_bits(0xffff); shape.scales()],
    };
    poison.write(shape, tile, offset);
    let mut worst = 0f64;
    let group = want.len() / shape.scales();
    for (i, (got, want_here)) in row.values(dtype).iter().zip(want).enumerate() {
        let largest = want[i / group * group..][..group].iter();
        let largest = largest.fold(0f64, |largest, x| largest.max(x.abs()));
        // The scale is the smallest possible, rounded up to bfloat16.
        let (scale, least) = (row.scale(i), largest / kv::limit(dtype));
        if !(0.9999 * least..=1.0079 * least).contains(&scale) {
            return f64::INFINITY;
        }
        let half_a_step = match dtype {
            KvDtype::Fp8 => (want_here.abs() / 16.0).max(scale / 1024.0),
            _ => scale / 2.0,
        };
        let error = (got - want_here).abs() / (1.001 * half_a_step + 1e-5 * largest);
        worst = if error <= worst { worst } else { error };
    }
    worst
}

fn rotate(
    head: &mut [f64],
    pairing: RopePairing,
    pairs: usize,
    magnitude: f64,
    angle: impl Fn(usize) -> f64,
) {
    for i in 0..pairs {
        let (a, b) = match pairing {
            RopePairing::Interleaved => (2 * i, 2 * i + 1),
            RopePairing::Halves => (i, i + pairs),
        };
        let (sine, cosine) = angle(i).sin_cos();
        let (x, y) = (head[a] * magnitude, head[b] * magnitude);
        (head[a], head[b]) = (x * cosine - y * sine, x * sine + y * cosine);
    }
}

pub(super) fn copy_blocks(lab: &mut Lab) -> Result<Vec<Report>, CudaError> {
    let kernel = CopyBlocks::load(lab.device())?;
    let mut errors = Vec::new();
    for _ in 0..CASES {
        lab.clear()?;
        let shape = KvShape::new(
            lab.pick(&[KvDtype::Bf16, KvDtype::Int8, KvDtype::Fp8]),
            2 + lab.below(30) as u32,
            1 + lab.below(8) as u32,
            16,
            lab.pick(&[64, 80, 128]),
        );
        let layers = 1 + lab.below(4);
        let len = layers * shape.layer_bytes();
        let mut want: Vec<u8> = (0..len).map(|_| lab.random() as u8).collect();
        let cache = lab.output(want.len())?;
        lab.write(&want, cache.slice)?;
        let half = shape.blocks / 2;
        let copies = 1 + lab.below(half as usize) as u32;
        // From the lower half into the upper one.
        let pairs: Vec<[u32; 2]> = (0..copies)
            .map(|i| [lab.below(half as usize) as u32, half + i])
            .collect();
        let on_pairs = lab.upload(&pairs.concat())?;
        // SAFETY: the blocks are inside the cache, none is read and written; the arena is alive.
        unsafe { kernel.launch(&lab.stream, &shape, on_pairs, cache.slice)? };
        let len = shape.block_bytes();
        for layer in want.chunks_exact_mut(shape.layer_bytes()) {
            for &[from, to] in &pairs {
                let from = from as usize * len;
                layer.copy_within(from..from + len, to as usize * len);
            }
        }
        let same = lab.read(cache)? == want;
        errors.push(if same { 0.0 } else { f64::INFINITY });
    }
    Ok(vec![lab.report("copy_blocks", &errors, 0.0)])
}
