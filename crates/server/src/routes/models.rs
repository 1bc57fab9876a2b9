//! `GET /v1/models`.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};

use crate::app::{App, ServedModel};
use crate::errors::ApiError;

/// The model under all its names; nothing while it is loading.
pub(super) async fn list(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<Value> = match app.model() {
        None => Vec::new(),
        Some(model) => std::iter::once(&model.id)
            .chain(&model.aliases)
            .map(|name| describe(model, name))
            .collect(),
    };
    Json(json!({"object": "list", "data": models}))
}

pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let context = app.context()?;
    let name = context.model.resolve_name(Some(id))?;
    Ok(Json(describe(&context.model, &name)))
}

fn describe(model: &ServedModel, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "spate",
        "root": model.id,
        "parent": null,
        "max_model_len": model.max_model_len,
    })
}
