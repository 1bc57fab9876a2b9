use std::ops::Range;

use super::isa::Isa;
use super::lanes::{Kernel, Lanes};
use crate::pool::Disjoint;

/// Output rows that are computed together: the lanes of [`Lanes`].
pub(super) const PANEL: usize = 16;

/// Tokens that meet all panels of a task before the next tokens do: their activations stay in the
/// second-level cache.
pub(super) const TOKENS: usize = 64;

/// Panels that hold `rows` output rows.
pub(super) fn panels(rows: usize) -> usize {
    rows.div_ceil(PANEL)
}

/// A matrix in panels, with the activations that it is multiplied with.
pub(super) trait Panels {
    /// The sixteen outputs of a panel for each of the `T` tokens from `token` on. A result must not
    /// depend on `T`. Mark it as `#[inline(always)]`.
    fn tile<V: Lanes, const T: usize>(&self, v: V, panel: usize, token: usize) -> [V::F; T];
}

/// One task's share of a product.
pub(super) struct Sweep<'a> {
    /// The panels to compute.
    pub(super) panels: Range<usize>,
    /// Tokens, all of them.
    pub(super) m: usize,
    /// Output rows of the whole matrix.
    pub(super) rows: usize,
    /// `[m, rows]`. No other task may have the same panels.
    pub(super) out: &'a Disjoint<'a, f32>,
}

impl Sweep<'_> {
    pub(super) fn run(self, isa: Isa, weights: impl Panels) {
        isa.run(Sweeping {
            sweep: self,
            weights,
        });
    }

    /// Stores the outputs of one panel for one token.
    #[inline(always)]
    pub(super) fn store(&self, panel: usize, token: usize, values: &[f32; PANEL]) {
        let row = panel * PANEL;
        let count = PANEL.min(self.rows - row);
        let start = token * self.rows + row;
        // SAFETY: the rows of this panel, which no other task writes.
        let out = unsafe { self.out.slice(start..start + count) };
        match <&mut [f32; PANEL]>::try_from(&mut *out) {
            Ok(out) => *out = *values,
            Err(_) => out.copy_from_slice(&values[..count]),
        }
    }

    /// Computes and stores the outputs of one panel for some tokens.
    #[inline(always)]
    pub(super) fn tokens<V: Lanes>(
        &self,
        v: V,
        weights: &impl Panels,
        panel: usize,
        tokens: Range<usize>,
    ) {
        let mut token = tokens.start;
        while token < tokens.end {
            token += match tokens.end - token {
                8.. if V::TOKENS >= 8 => self.tile::<V, 8>(v, weights, panel, token),
                4.. => self.tile::<V, 4>(v, weights, panel, token),
                2.. => self.tile::<V, 2>(v, weights, panel, token),
                _ => self.tile::<V, 1>(v, weights, panel, token),
            };
        }
    }

    /// Computes and stores a tile of `T` tokens; gives `T`.
    #[inline(always)]
    fn tile<V: Lanes, const T: usize>(
        &self,
        v: V,
        weights: &impl Panels,
        panel: usize,
        token: usize,
    ) -> usize {
        let tile = weights.tile::<V, T>(v, panel, token);
        for t in 0..T {
            self.store(panel, token + t, &v.store(tile[t]).0);
        }
        T
    }
}

struct Sweeping<'a, P> {
    sweep: Sweep<'a>,
    weights: P,
}

impl<P: Panels> Kernel for Sweeping<'_, P> {
    #[inline(always)]
    fn run<V: Lanes>(self, v: V) {
        let Self { sweep, weights } = &self;
        for first in (0..sweep.m).step_by(TOKENS) {
            let end = sweep.m.min(first + TOKENS);
            for panel in sweep.panels.clone() {
                sweep.tokens(v, weights, panel, first..end);
            }
        }
    }
}
