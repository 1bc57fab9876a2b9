use super::{Bench, Case, Chunk, DTYPES, How, LIMIT, distance, paths};
use crate::CudaError;
use crate::kernels::{ALL_BLOCKS, KvShape};
use crate::selftest::lab::{Lab, Report};

/// Sequences of one tile of positions: with three key/value heads more work than there are SMs.
const SHORT: usize = 50;

/// The last tokens of the long sequences, which see two splits on Hopper and five elsewhere: two tiles of query rows.
const LAST: u32 = 70;

/// What the sanitizer, which runs a thousand times slower, gets through: each kernel for heads of `HEAD_DIM`
/// elements once.
pub(in crate::selftest) fn small<const HEAD_DIM: u32>(
    lab: &mut Lab,
) -> Result<Vec<Report>, CudaError> {
    let mut reports = Vec::new();
    for (dtype, dtype_name) in DTYPES {
        // Two that share a split on Hopper.
        let mut lengths = vec![1100, 1100];
        lengths.extend((0..SHORT).map(|_| 1 + lab.below(30) as u32));
        let mut prefixes = vec![(0, 0); lengths.len()];
        prefixes[1] = (0, 1024);
        let shape = KvShape::new(dtype, 0, 3, 16, HEAD_DIM);
        let case = Case::new(lab, shape, 2, lengths, prefixes);
        let expected = case.expected();
        for (path, name) in paths(lab.device()) {
            lab.clear()?;
            let bench = Bench::new(lab, path, &case)?;
            let (last, single) = (last_tokens(&case, LAST), last_tokens(&case, 1));
            for (what, prompts, singles, how) in [
                ("prefill", &last[..], &[][..], How::InTurn),
                ("decode", &[], &single, How::InTurn),
                ("both", &last[..2], &single[2..], How::Beside(ALL_BLOCKS)),
            ] {
                let chunks = [prompts, singles].concat();
                let outs = bench.run(lab, prompts, singles, how)?;
                let pairs = chunks.iter().zip(outs).zip(&expected);
                let errors = pairs.map(|((chunk, out), expected)| {
                    let want = expected.last().expect("the last position is compared");
                    let row = (chunk.tokens as usize - 1) * case.width();
                    distance(&out[row..], want)
                });
                let errors: Vec<f64> = errors.collect();
                let name = format!("small attention {HEAD_DIM}{dtype_name} ({name}), {what}");
                reports.push(lab.report(&name, &errors, LIMIT));
            }
        }
    }
    Ok(reports)
}

/// Of each sequence its last tokens, at most so many.
fn last_tokens(case: &Case, most: u32) -> Vec<Chunk> {
    let lengths = case.lengths.iter().enumerate();
    let chunks = lengths.map(|(sequence, &length)| {
        let tokens = length.min(most);
        Chunk {
            sequence,
            position: length - tokens,
            tokens,
        }
    });
    chunks.collect()
}
