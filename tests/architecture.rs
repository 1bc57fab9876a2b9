//! The house keeps its walls: internal dependencies are those of ARCHITECTURE.md, and no others.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// Which crates of this workspace each may use.
const ALLOWED: &[(&str, &[&str])] = &[
    ("spate-types", &[]),
    ("spate-text", &["spate-types"]),
    ("spate-kvcache", &["spate-types"]),
    ("spate-executor", &["spate-types"]),
    (
        "spate-scheduler",
        &["spate-types", "spate-kvcache", "spate-executor"],
    ),
    ("spate-model", &["spate-types"]),
    (
        "spate-cpu",
        &["spate-types", "spate-executor", "spate-model"],
    ),
    (
        "spate-cuda",
        &["spate-types", "spate-executor", "spate-model"],
    ),
    ("xtask", &[]),
    (
        "spate-engine",
        &["spate-types", "spate-scheduler", "spate-executor"],
    ),
    (
        "spate-server",
        &["spate-types", "spate-text", "spate-engine"],
    ),
];

/// May use everything.
const BINARY: &str = "spate";

#[test]
fn internal_dependencies_follow_the_table() {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
        .output()
        .unwrap();
    assert!(output.status.success(), "cargo metadata failed");
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();

    let mut seen = Vec::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        seen.push(name);
        if name == BINARY {
            continue;
        }
        let allowed = ALLOWED
            .iter()
            .find(|(crate_name, _)| *crate_name == name)
            .unwrap_or_else(|| panic!("{name} is not in the table"))
            .1;
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            // Tests may look further than the code does.
            let in_code = dependency["kind"].as_str() != Some("dev");
            assert!(
                !in_code || !on.starts_with("spate") || allowed.contains(&on),
                "{name} must not depend on {on}"
            );
        }
    }
    for (name, _) in ALLOWED {
        assert!(seen.contains(name), "{name} is in the table only");
    }
}
