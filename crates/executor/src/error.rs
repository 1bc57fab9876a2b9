/// Why an executor refused or failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExecutorError {
    /// The batch breaks the contract; nothing of it ran. A bug in the caller.
    #[error("batch rejected: {0}")]
    Rejected(String),
    /// The device is lost. The process must restart.
    #[error("executor failed: {0}")]
    Fatal(String),
}
