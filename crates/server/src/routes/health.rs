//! Probes, version and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde_json::{Value, json};

use crate::app::{App, Readiness};

/// Whether a generation would be taken now.
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let readiness = app.readiness();
    let retry_after = match readiness {
        Readiness::Ready => None,
        Readiness::Loading(_) => Some("1"),
        _ => Some("5"),
    };
    let body = Json(describe(&readiness));
    match retry_after {
        None => body.into_response(),
        Some(seconds) => (
            StatusCode::SERVICE_UNAVAILABLE,
            [(header::RETRY_AFTER, seconds)],
            body,
        )
            .into_response(),
    }
}

/// Whether a restart would not help: loading and draining are signs of life, an engine that makes
/// no progress is not.
pub(super) async fn live(State(app): State<Arc<App>>) -> Response {
    let readiness = app.readiness();
    let status = match readiness {
        Readiness::Ready | Readiness::Loading(_) | Readiness::Draining => StatusCode::OK,
        Readiness::Stalled { .. } | Readiness::Dead(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    (status, Json(describe(&readiness))).into_response()
}

fn describe(readiness: &Readiness) -> Value {
    match readiness {
        Readiness::Ready => json!({"status": "ok"}),
        Readiness::Loading(loading) => json!({
            "status": "loading",
            "stage": loading.stage,
            "percent": loading.percent,
        }),
        Readiness::Draining => json!({"status": "draining"}),
        Readiness::Stalled { seconds } => json!({"status": "stalled", "seconds": seconds}),
        Readiness::Dead(reason) => json!({"status": "dead", "reason": reason}),
    }
}

pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

pub(super) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4")],
        app.metrics.render(),
    )
}
