//! Model configuration, weight files and the forward pass, written once over a dozen fused operations.

pub mod quant;
