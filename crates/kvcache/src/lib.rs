//! Paged, reference-counted, prefix-shared KV-cache block bookkeeping. Owns no device memory.
