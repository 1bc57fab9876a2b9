use std::f64::consts::TAU;

#[cfg(test)]
mod tests;

/// Rotary position embedding (Su et al. 2021).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which elements of a head form a rotated pair.
    pub pairing: RopePairing,
    /// Rotated leading elements of each head; even, at most `head_dim`.
    pub dims: usize,
    /// Pair `i` turns by `position * base^(-2i/dims)` radians, before scaling.
    pub base: f32,
    /// How the angles were changed to reach positions beyond those of the first training.
    pub scaling: RopeScaling,
}

/// Which elements of a head form a rotated pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RopePairing {
    /// `(2i, 2i + 1)`: GGUF files of `llama` hold query and key rows permuted for it.
    Interleaved,
    /// `(i, i + dims/2)`: the checkpoint layout of Hugging Face models ("NeoX").
    Halves,
}

/// Ways to stretch a rotary embedding over a longer context.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    None,
    /// Every angle is divided by `factor` (Chen et al. 2023).
    Linear {
        /// At least a little more than 0.
        factor: f32,
    },
    /// Each pair's angle is divided by its own number: how GGUF files hold Llama 3's scaling.
    Divisors(
        /// `dims / 2` positive numbers.
        Vec<f32>,
    ),
    /// Llama 3.1: slow pairs are divided by `factor`, fast ones are kept, those between blend.
    Llama3 {
        /// Divisor of the slow pairs.
        factor: f32,
        /// Pairs that turn fewer than this many times within the original context are slow.
        low_freq_factor: f32,
        /// Pairs that turn more often than this are fast.
        high_freq_factor: f32,
        /// Context length of the first training.
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023): as Llama 3's, with a blend that is linear in the pair's index.
    Yarn {
        /// Divisor of the slow pairs.
        factor: f32,
        /// Turns within the original context from which on a pair is kept; 32 for most models.
        beta_fast: f32,
        /// Turns up to which a pair is slow; 1 for most models.
        beta_slow: f32,
        /// Context length of the first training.
        original_context: usize,
        /// Rotated queries and keys are multiplied by it: see [`yarn_magnitude`].
        magnitude: f32,
    },
    /// LongRoPE (Ding et al. 2024), as Phi 3 has it: divisors per pair found by search.
    LongRope {
        /// Divisors for contexts up to the original one.
        short: Vec<f32>,
        /// Divisors for longer ones.
        long: Vec<f32>,
        /// Context length of the first training.
        original_context: usize,
        /// Rotated queries and keys are multiplied by it: see [`long_rope_magnitude`].
        magnitude: f32,
    },
}

/// What a rotary embedding comes to, given the longest sequence that will be served.
#[derive(Debug, Clone, PartialEq)]
pub struct Rotation {
    /// Radians per position of each pair.
    pub rates: Vec<f64>,
    /// Factor of every rotated element.
    pub magnitude: f64,
}

impl Rotation {
    /// Of a vector that is added to all keys before they are rotated (`[heads, head_dim]`), what they keep in
    /// common up to the end of the longest sequence: pairs that turn by less than a radian until then, as
    /// they are at position 0, and what is not rotated; zeros elsewhere. Within a radian, what is left of a
    /// rotated vector without the vector is shorter than it.
    pub fn common_part(
        &self,
        keys: &mut [f32],
        head_dim: usize,
        pairing: RopePairing,
        max_seq_len: usize,
    ) {
        let pairs = self.rates.len();
        for head in keys.chunks_exact_mut(head_dim) {
            for (i, rate) in self.rates.iter().enumerate() {
                let slow = rate * (max_seq_len as f64) < 1.0;
                let factor = if slow { self.magnitude as f32 } else { 0.0 };
                let (a, b) = match pairing {
                    RopePairing::Interleaved => (2 * i, 2 * i + 1),
                    RopePairing::Halves => (i, i + pairs),
                };
                head[a] *= factor;
                head[b] *= factor;
            }
        }
    }
}

/// YaRN's recommended magnitude for a scaling factor: 0.1 ln(factor) + 1.
pub fn yarn_magnitude(factor: f32) -> f32 {
    if factor > 1.0 {
        0.1 * factor.ln() + 1.0
    } else {
        1.0
    }
}

/// LongRoPE's recommended magnitude: sqrt(1 + ln(factor) / ln(original context)), where the factor
/// is how much longer the context is than the original one.
pub fn long_rope_magnitude(context: usize, original_context: usize) -> f32 {
    let (context, original) = (context as f64, original_context as f64);
    if context > original && original > 1.0 {
        (1.0 + (context / original).ln() / original.ln()).sqrt() as f32
    } else {
        1.0
    }
}

impl Rope {
    /// The angles for sequences of up to `max_seq_len` positions.
    ///
    /// LongRoPE's choice between its two sets is made here, once: keys in the cache were rotated for
    /// good, so a sequence that outgrows the original context can't change over.
    pub fn rotation(&self, max_seq_len: usize) -> Rotation {
        let plain = (0..self.dims / 2).map(|i| {
            let exponent = -2.0 * i as f64 / self.dims as f64;
            f64::from(self.base).powf(exponent)
        });
        let mut magnitude = 1.0;
        let divided = |by: &[f32]| {
            plain
                .clone()
                .zip(by)
                .map(|(r, &d)| r / f64::from(d))
                .collect()
        };
        let rates = match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|r| r / f64::from(*factor)).collect(),
            RopeScaling::Divisors(divisors) => divided(divisors),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                let (low, high) = (f64::from(*low_freq_factor), f64::from(*high_freq_factor));
                let blend = |rate: f64| {
                    let turns = *original_context as f64 * rate / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    mix(rate, f64::from(*factor), kept)
                };
                plain.map(blend).collect()
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_context,
                magnitude: m,
            } => {
                magnitude = f64::from(*m);
                let first = self.pair_that_turns(*beta_fast, *original_context).floor();
                let last = self.pair_that_turns(*beta_slow, *original_context).ceil();
                let (first, last) = (first.max(0.0), last.min(self.dims as f64 - 1.0));
                // The reference's guard against a ramp of no length.
                let length = if last == first { 0.001 } else { last - first };
                let blend = |(i, rate): (usize, f64)| {
                    let slow = ((i as f64 - first) / length).clamp(0.0, 1.0);
                    mix(rate, f64::from(*factor), 1.0 - slow)
                };
                plain.enumerate().map(blend).collect()
            }
            RopeScaling::LongRope {
                short,
                long,
                original_context,
                magnitude: m,
            } => {
                magnitude = f64::from(*m);
                let beyond = max_seq_len > *original_context;
                divided(if beyond { long } else { short })
            }
        };
        Rotation { rates, magnitude }
    }

    /// The longest context, given what a configuration says: those with YaRN may mean the original
    /// one and leave it to the reader to stretch that.
    pub(crate) fn reach(&self, context: usize) -> usize {
        match self.scaling {
            RopeScaling::Yarn {
                factor,
                original_context,
                ..
            } => context.max((original_context as f32 * factor) as u32 as usize),
            _ => context,
        }
    }

    /// Index (with a fraction) of the pair that turns `turns` times within `context` positions.
    fn pair_that_turns(&self, turns: f32, context: usize) -> f64 {
        let rate = TAU * f64::from(turns) / context as f64;
        -rate.ln() / f64::from(self.base).ln() * self.dims as f64 / 2.0
    }

    /// What is wrong with the values, if anything.
    pub(crate) fn check(&self, head_dim: usize) -> Result<(), String> {
        if self.dims == 0 || !self.dims.is_multiple_of(2) || self.dims > head_dim {
            return Err(format!(
                "{} rotated elements are none, odd or wider than a head ({head_dim})",
                self.dims
            ));
        }
        let pairs = self.dims / 2;
        let mut numbers = vec![("rope base", self.base)];
        match &self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => numbers.push(("rope scaling factor", *factor)),
            RopeScaling::Divisors(divisors) => check_divisors(divisors, pairs)?,
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                ..
            } => {
                numbers.extend([("rope scaling factor", *factor), ("low_freq_factor", *low)]);
                numbers.push(("high_freq_factor - low_freq_factor", high - low));
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                magnitude,
                ..
            } => numbers.extend([
                ("rope scaling factor", *factor),
                ("beta_fast", *beta_fast),
                ("beta_slow", *beta_slow),
                ("rope magnitude", *magnitude),
            ]),
            RopeScaling::LongRope {
                short,
                long,
                magnitude,
                ..
            } => {
                check_divisors(short, pairs)?;
                check_divisors(long, pairs)?;
                numbers.push(("rope magnitude", *magnitude));
            }
        }
        for (name, value) in numbers {
            if !(value > 0.0 && value.is_finite()) {
                return Err(format!("{name} {value} is not a positive number"));
            }
        }
        match self.scaling {
            RopeScaling::Yarn { .. } if self.base <= 1.0 => {
                Err(format!("YaRN needs a rope base above 1, not {}", self.base))
            }
            RopeScaling::Llama3 {
                original_context: 0,
                ..
            }
            | RopeScaling::Yarn {
                original_context: 0,
                ..
            } => Err("the original context of rope scaling is 0".into()),
            _ => Ok(()),
        }
    }
}

/// `kept` of the rate itself and the rest of it divided by `factor`.
fn mix(rate: f64, factor: f64, kept: f64) -> f64 {
    rate * kept + rate / factor * (1.0 - kept)
}

fn check_divisors(divisors: &[f32], pairs: usize) -> Result<(), String> {
    if divisors.len() != pairs {
        return Err(format!(
            "there are {} rope factors for {pairs} rotated pairs",
            divisors.len()
        ));
    }
    match divisors.iter().find(|d| !(**d > 0.0 && d.is_finite())) {
        Some(bad) => Err(format!("the rope factor {bad} is not a positive number")),
        None => Ok(()),
    }
}
