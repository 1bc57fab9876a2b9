//! The OpenAI wire: routes, validation, server-sent events, errors, metrics.
