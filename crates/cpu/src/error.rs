use spate_model::ModelError;

/// Why the CPU backend can't start.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The model file is at fault.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A weight's bytes are at fault.
    #[error("a weight can't be converted: {0}")]
    Quant(#[from] spate_model::quant::QuantError),
    /// The settings can't work with this model.
    #[error("{0}")]
    Config(String),
    /// The system has no memory left.
    #[error("no memory for {what} ({bytes} bytes)")]
    OutOfMemory {
        /// What it was for.
        what: &'static str,
        /// How much was asked for.
        bytes: usize,
    },
    /// The executor was dropped while a step waited for its masks.
    #[error("the executor is gone")]
    Ended,
    /// The system refused a thread.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
