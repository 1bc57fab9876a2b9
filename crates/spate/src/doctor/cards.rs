//! What GPUs should do, from their makers' data sheets.

/// A GPU's ceilings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Card {
    /// Part of the name that the driver gives.
    name: &'static str,
    /// Memory bandwidth in bytes per second.
    pub(super) bandwidth: f64,
    /// Dense products of bfloat16 with float32 sums: operations per second.
    pub(super) matrix: f64,
}

const fn card(name: &'static str, gigabytes: u32, teraflops: u32) -> Card {
    Card {
        name,
        bandwidth: gigabytes as f64 * 1e9,
        matrix: teraflops as f64 * 1e12,
    }
}

/// The first whose name is part of a GPU's is that GPU.
const CARDS: &[Card] = &[
    card("B200", 8000, 2250),
    card("H200", 4800, 989),
    card("H100 80GB HBM3", 3352, 989),
    card("H100 NVL", 3938, 835),
    card("H100 PCIe", 2039, 756),
    card("A100-SXM4-80GB", 2039, 312),
    card("A100 80GB PCIe", 1935, 312),
    card("A100", 1555, 312),
    card("L40S", 864, 362),
    card("L4", 300, 121),
    card("RTX 4090", 1008, 165),
];

/// The card with this name, if it is a known one.
pub(super) fn find(name: &str) -> Option<Card> {
    // Whole words: an L40 is no L4.
    let words = format!(" {name} ");
    let mut cards = CARDS.iter();
    cards
        .find(|card| words.contains(&format!(" {} ", card.name)))
        .or_else(|| CARDS.iter().find(|card| starts_a_word(&words, card.name)))
        .copied()
}

/// Whether `what` begins a word that goes on with a hyphen, as in `A100-PCIE-40GB`.
fn starts_a_word(words: &str, what: &str) -> bool {
    words.contains(&format!(" {what}-"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn names_as_drivers_give_them() {
        for (name, expected) in [
            ("NVIDIA H100 80GB HBM3", Some("H100 80GB HBM3")),
            ("NVIDIA H100 PCIe", Some("H100 PCIe")),
            ("NVIDIA H200", Some("H200")),
            ("NVIDIA B200", Some("B200")),
            ("NVIDIA A100-SXM4-80GB", Some("A100-SXM4-80GB")),
            ("NVIDIA A100-SXM4-40GB", Some("A100")),
            ("NVIDIA A100-PCIE-40GB", Some("A100")),
            ("NVIDIA L4", Some("L4")),
            ("NVIDIA L40", None),
            ("NVIDIA L40S", Some("L40S")),
            ("NVIDIA GeForce RTX 4090", Some("RTX 4090")),
            ("NVIDIA GeForce RTX 4090 Laptop GPU", Some("RTX 4090")),
            ("NVIDIA T4", None),
        ] {
            assert_eq!(find(name).map(|card| card.name), expected, "{name}");
        }
    }
}
