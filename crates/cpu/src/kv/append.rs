use super::line::{GROUP, KvLine, int8_scale, rotate};
use super::{HeadTiles, KvPools, Pages, TILE};
use crate::ThreadPool;
use crate::linear::{Column, F16x16};
use crate::pool::Disjoint;

/// Tokens that one thread stores: fewer are not worth waking another.
const TASK_TOKENS: usize = 8;

/// The tile that a position is stored in.
struct TileMut<'a, C> {
    lines: &'a mut [C],
    scales: &'a mut [F16x16],
}

impl<C: KvLine> KvPools<C> {
    /// Stores the keys and values of some tokens, `[tokens, kv_heads * head_dim]` each, in one layer;
    /// heads in parallel. `place` gives a token's position and the blocks of its sequence.
    pub(crate) fn append<'a>(
        &mut self,
        pool: &ThreadPool,
        layer: usize,
        place: impl Fn(usize) -> (Pages<'a>, usize) + Sync,
        keys: &[f32],
        values: &[f32],
    ) {
        let (local, layer) = self.layers[layer];
        let kv = &mut self.pools[usize::from(local)];
        let shape = kv.shape;
        let heads: Vec<HeadTiles> = (0..shape.kv_heads)
            .map(|h| kv.head_tiles(layer, h))
            .collect();
        let (lines, scales) = (Disjoint::new(&mut kv.lines), Disjoint::new(&mut kv.scales));
        let (dim, width) = (shape.head_dim, shape.kv_heads * shape.head_dim);
        let tokens = keys.len() / width;
        let per_task = if tokens < TASK_TOKENS { heads.len() } else { 1 };
        pool.run(heads.len().div_ceil(per_task), |task| {
            for (h, head) in heads
                .iter()
                .enumerate()
                .skip(task * per_task)
                .take(per_task)
            {
                for token in 0..tokens {
                    let (pages, position) = place(token);
                    let tile = head.at(pages, position);
                    // SAFETY: tiles of this head, which no other task has; within the slice the
                    // one before is gone.
                    let mut tile = unsafe {
                        TileMut {
                            lines: lines.slice(head.lines(tile)),
                            scales: match C::SCALED {
                                true => scales.slice(head.scales(tile)),
                                false => &mut [],
                            },
                        }
                    };
                    let at = token * width + h * dim;
                    tile.set(position % TILE, &keys[at..at + dim], &values[at..at + dim]);
                }
            }
        });
    }
}

impl<C: KvLine> TileMut<'_, C> {
    /// Stores the key and the value of one position.
    fn set(&mut self, lane: usize, key: &[f32], value: &[f32]) {
        let groups = key.len() / GROUP;
        for (g, key) in key.as_chunks::<GROUP>().0.iter().enumerate() {
            let mut key = *key;
            if C::SCALED {
                rotate(&mut key);
            }
            let line = self.line(g, lane, key);
            for (element, own) in self.lines[g * GROUP..][..GROUP].iter_mut().enumerate() {
                own.set_from(lane, &line, element);
            }
        }
        for (g, value) in value.as_chunks::<GROUP>().0.iter().enumerate() {
            let line = self.line(groups + g, lane, *value);
            self.lines[key.len() + lane * groups + g] = line;
        }
    }

    /// One group's numbers `x` as a line; its scale, if there is one, is stored.
    fn line(&mut self, group: usize, lane: usize, mut x: [f32; GROUP]) -> C {
        if C::SCALED {
            let (scale, inverse) = int8_scale(&x);
            self.scales[group].set(lane, scale);
            x.iter_mut().for_each(|x| *x *= inverse);
        }
        C::from_floats(&x)
    }
}
