//! What a configuration takes and refuses.

use super::*;

fn raw(toml: &str) -> RawConfig {
    RawConfig::from_toml(toml).unwrap()
}

#[test]
fn flags_win_over_the_file_and_the_file_over_defaults() {
    let config = raw("port = 1").or(raw("port = 9000\nmodel = [\"a.gguf\"]\nthreads = 3"));
    let config = config.validate().unwrap();
    assert_eq!((config.port, config.threads, config.plan.queue_len), (1, 3, 256));
    assert_eq!(config.models, ["a.gguf"]);
}

#[test]
fn ids_of_the_file_do_not_name_models_of_the_flags() {
    let config = raw("model = \"b.gguf\"").or(raw("model = \"a.gguf\"\nalias = \"llama\""));
    let config = config.validate().unwrap();
    assert_eq!((config.models, config.aliases), (vec!["b.gguf".to_owned()], vec![]));
}

#[test]
fn wrong_values_name_their_flag() {
    let cases = [
        ("threads = 0", "--threads"),
        ("tensor-parallel = 0", "--tensor-parallel"),
        ("tensor-parallel = 65", "--tensor-parallel"),
        ("host = \"here\"", "--host"),
        ("kv-dtype = \"f8\"", "--kv-dtype"),
        ("quantize = \"q9\"", "--quantize"),
        ("alias = \"a\"", "--alias"),
        ("api-key = \" \"", "--api-key"),
        ("model = \"\"", "--model"),
        ("model = \"m\"\nalias = \"\"", "--alias"),
        ("ctx-size = 0", "--ctx-size"),
        ("cors-origin = \"app\"", "--cors-origin"),
        ("log-format = \"xml\"", "--log-format"),
        ("model-alias = \"gpt-4o\"", "--model-alias"),
        ("speculate = \"on\"", "--speculate"),
        ("speculate = \"draft\"", "--speculate"),
        ("speculate = \"off\"\ndraft-model = \"d\"", "--draft-model"),
        ("draft-model = \"\"", "--draft-model"),
        ("memory-budget = \"12\"", "--memory-budget"),
        ("lora-memory = \"much\"", "--lora-memory"),
        ("lora = \"path\"", "--lora"),
        ("lora = \"=path\"", "--lora"),
        ("lora = \":id=path\"", "--lora"),
        ("lora = \"id=\"", "--lora"),
        ("memory-budget = \"0G\"", "--memory-budget"),
        ("keep-alive = \"soon\"", "--keep-alive"),
        ("pin = \"\"", "--pin"),
        ("kv-store = \"\"", "--kv-store"),
        ("kv-store = \"d\"\nkv-store-size = \"much\"", "--kv-store-size"),
        ("kv-store-size = \"1G\"", "--kv-store-size"),
        ("store-days = 36501", "--store-days"),
        ("tls-cert = \"c\"", "--tls-cert"),
        ("tls-key = \"k\"", "--tls-key"),
    ];
    for (toml, flag) in cases {
        assert_eq!(raw(toml).validate().unwrap_err().option, flag);
    }
}

#[test]
fn a_draft_model_is_what_guesses_where_one_is_named() {
    let speculate = |toml: &str| raw(toml).validate().unwrap().speculate;
    assert_eq!(speculate(""), Speculate::Off);
    assert_eq!(speculate("speculate = \"ngram\""), Speculate::Ngram);
    assert_eq!(speculate("draft-model = \"d\""), Speculate::Draft("d".to_owned()));
}

#[test]
fn an_address_of_version_6_is_told_from_its_port() {
    let config = raw("host = \"::1\"\nport = 80").validate().unwrap();
    assert!(config.describe().contains("http://[::1]:80"));
    let tls = raw("tls-cert = \"c\"\ntls-key = \"k\"").validate().unwrap();
    assert!(tls.describe().contains("https://127.0.0.1:8080"));
}

#[test]
fn what_is_in_force_is_printed() {
    let text = "model-alias = \"gpt=m\"\ncors-origin = \"*\"\nfiles-quota-gb = 7\npin = \"m\"\n\
        store-days = 7";
    let told = raw(text).validate().unwrap().describe();
    for line in [
        "model-alias     gpt=m",
        "cors-origin     *",
        "files-quota-gb  7",
        "pin             m",
        "store-days      7",
    ] {
        assert!(told.contains(line), "{line}: {told}");
    }
    let days = |toml: &str| raw(toml).validate().unwrap().store_days;
    assert_eq!((days(""), days("store-days = 0")), (Some(30), None));
    assert!(raw("store-days = 0").validate().unwrap().describe().contains("for ever"));
}

#[test]
fn keys_and_values_are_stored_as_the_device_does_best() {
    let stored = |toml: &str| raw(toml).validate().unwrap().plan.kv_dtype;
    assert_eq!(stored("device = \"cpu\""), KvDType::Q16_0);
    for device in ["plain", "cuda:1", "metal"] {
        assert_eq!(stored(&format!("device = \"{device}\"")), KvDType::F16, "{device}");
    }
    assert_eq!(stored("device = \"plain\"\nkv-dtype = \"q16_0\""), KvDType::Q16_0);
    assert_eq!(stored("kv-dtype = \"f16\""), KvDType::F16);
    let alone = cfg!(not(any(feature = "cuda", feature = "metal")));
    assert_eq!(stored(""), if alone { KvDType::Q16_0 } else { KvDType::F16 });
}

#[test]
fn adapters_are_named_with_their_model_or_without() {
    let loras = |toml: &str| raw(toml).validate().unwrap().loras;
    let list = "lora = [\"a=x/y\", \"org/m:Q8_0:b=z=1\"]";
    let named = |id: &str, path: &str| (id.to_owned(), PathBuf::from(path));
    let (a, b) = (named("a", "x/y"), named("b", "z=1"));
    let wanted = vec![(None, a.0, a.1), (Some("org/m:Q8_0".to_owned()), b.0, b.1)];
    assert_eq!(loras(list), wanted);
    assert_eq!(raw("lora-memory = \"2G\"").validate().unwrap().lora_bytes, 2 << 30);
}

#[test]
fn memory_is_said_in_sizes_and_times() {
    let memory = |toml: &str| raw(toml).validate().unwrap().memory;
    let none = memory("");
    assert_eq!((none.budget_bytes, none.keep_alive), (None, KeepAlive::Forever));
    for (text, bytes) in [("800M", 800 << 20), ("1.5GiB", 3 << 29), ("2 gb", 2 << 30)] {
        assert_eq!(memory(&format!("memory-budget = \"{text}\"")).budget_bytes, Some(bytes));
    }
    let minutes = KeepAlive::For(Duration::from_secs(300));
    assert_eq!(memory("keep-alive = 300").keep_alive, minutes);
    assert_eq!(memory("keep-alive = \"5m\"").keep_alive, minutes);
}

#[test]
fn keys_are_not_printed() {
    assert!(!raw("api-key = \"sk-secret\"").validate().unwrap().describe().contains("secret"));
}
