use std::path::PathBuf;

/// Why a model file can't be used. Messages name the file and, where there is one, the byte offset.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The operating system refused a read.
    #[error("{}: cannot read: {source}", file.display())]
    Io {
        /// The model file.
        file: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not a valid GGUF file.
    #[error("{}: at byte {offset}: {problem}", file.display())]
    Format {
        /// The model file.
        file: PathBuf,
        /// Where the offending field starts.
        offset: u64,
        /// What is wrong with it.
        problem: String,
    },
    /// The file is well-formed, but it's not a model that this build can run.
    #[error("{}: {problem}", file.display())]
    Model {
        /// The model file.
        file: PathBuf,
        /// What is missing, unknown or inconsistent.
        problem: String,
    },
}
