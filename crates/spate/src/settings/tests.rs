#![allow(clippy::unwrap_used)]

use super::*;

fn load(
    file: Option<&str>,
    env: &[(&str, &str)],
    flags: &[(&'static str, &str)],
) -> Result<Loaded> {
    let path = file.map(|text| {
        use std::sync::atomic::{AtomicU32, Ordering};
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("spate-settings-{}-{n}.toml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        path
    });
    let env = env.iter().map(|(k, v)| (k.to_string(), v.to_string()));
    let flags: Vec<_> = flags.iter().map(|(k, v)| (*k, v.to_string())).collect();
    let loaded = Loaded::from_sources(path.as_deref(), env, &flags);
    if let Some(path) = path {
        std::fs::remove_file(path).unwrap();
    }
    loaded
}

fn error(file: Option<&str>, env: &[(&str, &str)], flags: &[(&'static str, &str)]) -> String {
    format!("{:#}", load(file, env, flags).unwrap_err())
}

#[test]
fn the_table_covers_the_struct_and_stays_small() {
    assert!(SETTINGS.len() <= 28);
    // Each row reads back what it shows, so a row that names the wrong field can't hide.
    for (i, setting) in SETTINGS.iter().enumerate() {
        assert_eq!(
            SETTINGS.iter().position(|s| s.flag == setting.flag),
            Some(i)
        );
        let shown = (setting.show)(&Settings::default());
        if !shown.is_empty() {
            let mut settings = Settings::default();
            (setting.set)(&mut settings, &shown).unwrap();
            assert_eq!(settings, Settings::default(), "{}", setting.flag);
        }
    }
}

#[test]
fn flags_come_before_the_environment_before_the_file() {
    let file = Some("port = 1\nhost = \"a\"\nmax_queue = 7\nenable_prefix_caching = false");
    let env = [("SPATE_PORT", "2"), ("SPATE_HOST", "b"), ("HOME", "/x")];
    let loaded = load(file, &env, &[("port", "3")]).unwrap();
    assert_eq!(loaded.settings.port, 3);
    assert_eq!(loaded.settings.host, "b");
    assert_eq!(loaded.settings.max_queue, 7);
    assert!(!loaded.settings.enable_prefix_caching);
    assert_eq!(loaded.origins["port"], Origin::Flag("port"));
    assert_eq!(
        loaded.origins["host"],
        Origin::Variable("SPATE_HOST".into())
    );
    assert!(matches!(loaded.origins["max_queue"], Origin::File(_)));
    assert!(!loaded.origins.contains_key("block_size"));
}

#[test]
fn a_mistyped_name_is_refused_with_the_right_one() {
    assert!(
        error(Some("max_model_length = 5"), &[], &[]).contains("did you mean 'max_model_len'?")
    );
    assert!(
        error(Some("zzz = 5"), &[], &[])
            .contains("unknown setting 'zzz'; `spate serve --print-config`")
    );
    assert!(
        error(None, &[("SPATE_MAX_NUM_SEQ", "5")], &[]).contains("did you mean 'max_num_seqs'?")
    );
    assert!(error(Some("[server]\nport = 1"), &[], &[]).contains("unknown setting 'server'"));
}

#[test]
fn a_bad_value_names_the_setting_and_where_it_was_set() {
    assert_eq!(
        error(None, &[], &[("port", "65536")]),
        "port (--port): '65536' is not a whole number from 0 to 65535"
    );
    assert!(
        error(None, &[("SPATE_CPU_MODE", "quick")], &[]).starts_with(
            "cpu_mode (environment SPATE_CPU_MODE): 'quick' is not one of exact, fast"
        )
    );
    assert!(error(Some("port = [1]"), &[], &[]).contains("'port' has a value of the wrong type"));
    assert!(error(None, &[], &[("block-size", "24")]).contains("not 16, 32, 64"));
    let seqs_and_tokens = [("max-num-seqs", "600"), ("max-num-batched-tokens", "512")];
    assert!(error(None, &[], &seqs_and_tokens).contains("max_num_batched_tokens (512)"));
    for share in ["0", "1.1", "NaN", "-1", "90%"] {
        let refused = error(None, &[], &[("gpu-memory-utilization", share)]);
        assert!(refused.contains("above 0 and up to 1"), "{refused}");
    }
    assert!(error(None, &[], &[("device", "gpu")]).contains("'gpu' is not auto, cpu, cuda"));
    assert!(error(None, &[], &[("overlap", "decode_sms=")]).contains("not a whole number"));
}

#[test]
fn sizes_depend_on_the_device() {
    let sizes = |flags: &[(&'static str, &str)]| {
        let settings = load(None, &[], flags).unwrap().settings;
        (Sizes::on_cpu(&settings), Sizes::on_gpu(&settings))
    };
    let (cpu, gpu) = sizes(&[]);
    assert_eq!((cpu.max_num_seqs, cpu.max_num_batched_tokens), (64, 512));
    assert_eq!((gpu.max_num_seqs, gpu.max_num_batched_tokens), (256, 8192));
    assert_eq!(
        (cpu.kv_cache_memory, gpu.kv_cache_memory),
        (Some(1 << 30), None)
    );
    // What was set holds everywhere, and what was not makes room for it.
    let (cpu, gpu) = sizes(&[("max-num-seqs", "600"), ("kv-cache-memory", "2GiB")]);
    assert_eq!((cpu.max_num_seqs, cpu.max_num_batched_tokens), (600, 600));
    assert_eq!((gpu.max_num_seqs, gpu.max_num_batched_tokens), (600, 8192));
    assert_eq!(gpu.kv_cache_memory, Some(2 << 30));
    let (cpu, gpu) = sizes(&[("max-num-batched-tokens", "32")]);
    assert_eq!((cpu.max_num_seqs, gpu.max_num_seqs), (32, 32));
}

#[test]
fn overlap_is_a_name_or_a_table() {
    let from_file = load(Some("overlap = { decode_sms = 24 }"), &[], &[]).unwrap();
    let from_flag = load(None, &[], &[("overlap", "decode_sms=24")]).unwrap();
    assert_eq!(from_file.settings, from_flag.settings);
    assert_eq!(from_flag.settings.overlap, Some(Overlap::DecodeSms(24)));
    let off = load(None, &[], &[("overlap", "off")]).unwrap();
    assert_eq!(off.settings.overlap, Some(Overlap::Off));
}

#[test]
fn other_peoples_variables_are_left_alone() {
    let env = [
        ("SPATE_SERVICE_HOST", "10.0.0.1"),
        ("SPATE_PORT", "tcp://10.0.0.1:8000"),
    ];
    assert_eq!(load(None, &env, &[]).unwrap(), Loaded::default());
}

#[test]
fn lists_come_from_arrays_and_commas() {
    let from_file = load(Some("served_model_name = ['a', 'b']"), &[], &[]).unwrap();
    let from_env = load(None, &[("SPATE_SERVED_MODEL_NAME", "a,b")], &[]).unwrap();
    assert_eq!(from_file.settings, from_env.settings);
    assert!(error(None, &[], &[("api-key", "a,,b")]).contains("it is empty"));
}

#[test]
fn the_printed_configuration_is_a_configuration_file_without_secrets() {
    let flags = [
        ("api-key", "sk-secret"),
        ("kv-cache-memory", "3MiB"),
        ("drain-timeout", "1500ms"),
        ("max-model-len", "4096"),
    ];
    let loaded = load(None, &[], &flags).unwrap();
    let text = loaded.settings.to_toml(&loaded.origins);
    assert!(!text.contains("sk-secret"), "{text}");
    assert!(text.contains("# --kv-cache-memory"), "{text}");
    let again = load(Some(&text), &[], &[("api-key", "sk-secret")]).unwrap();
    assert_eq!(again.settings, loaded.settings);
}

#[test]
fn the_example_file_states_every_setting_and_its_default() {
    let text = include_str!("../../../../configs/spate.toml");
    let loaded = load(Some(text), &[], &[]).unwrap();
    assert_eq!(loaded.settings, Settings::default());
    for setting in SETTINGS {
        let (key, shown) = (setting.key(), (setting.show)(&Settings::default()));
        let is_set = loaded.origins.contains_key(&key);
        // What has no value by default is there as a comment.
        assert_eq!(is_set, !shown.is_empty(), "{key}");
        assert!(text.contains(&format!("{key} = ")), "{key}");
    }
}
