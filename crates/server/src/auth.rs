//! API keys. Every route asks for one but the health probes.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::app::App;
use crate::errors::ApiError;

/// The keys' digests. Digests are of one length, so comparing them tells nothing about the keys'.
pub(crate) struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    pub(crate) fn new(keys: &[String]) -> Self {
        Self(keys.iter().map(|key| digest(key.as_bytes())).collect())
    }

    /// Takes the same time whichever key matches, or none.
    fn contains(&self, key: &[u8]) -> bool {
        let key = digest(key);
        let found = self
            .0
            .iter()
            .fold(Choice::from(0), |found, known| found | known.ct_eq(&key));
        found.into()
    }

    fn admits(&self, headers: &HeaderMap) -> bool {
        self.0.is_empty() || bearer(headers).is_some_and(|key| self.contains(key))
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, key) = value.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| key.trim_ascii())
}

/// Deny by default: the exceptions are these exact paths. A path that is spelled another way
/// (`//health`, `%68ealth`) needs a key, and then finds no route.
pub(crate) const OPEN_PATHS: [&str; 6] = [
    "/health",
    "/health/live",
    "/health/ready",
    "/livez",
    "/readyz",
    "/ping",
];

/// Middleware around everything, unknown routes included.
pub(crate) async fn require_key(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    if OPEN_PATHS.contains(&request.uri().path()) || app.keys.admits(request.headers()) {
        return next.run(request).await;
    }
    ApiError::new(
        StatusCode::UNAUTHORIZED,
        "a valid API key is needed: send the header 'Authorization: Bearer KEY'",
    )
    .with_code("invalid_api_key")
    .into_response()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, authorization.parse().unwrap());
        headers
    }

    #[test]
    fn o6_any_of_the_keys_opens_and_nothing_else() {
        let keys = ApiKeys::new(&["first".into(), "second key".into()]);
        for good in ["Bearer first", "bearer  first", "BEARER second key"] {
            assert!(keys.admits(&headers(good)), "{good}");
        }
        for bad in [
            "",
            "first",
            "Bearer",
            "Bearer ",
            "Bearer firs",
            "Bearer firstt",
            "Basic first",
        ] {
            assert!(!keys.admits(&headers(bad)), "{bad}");
        }
        assert!(!keys.admits(&HeaderMap::new()));
    }

    #[test]
    fn without_keys_everyone_may_come() {
        assert!(ApiKeys::new(&[]).admits(&HeaderMap::new()));
    }
}
