//! The binary as an operator meets it: flags, files, exit codes, one request, one signal.
//!
//! Models are the committed goldens: random weights, real files. Everything else is read from the
//! command line, so each run begins with an environment that holds no `HEARTH_*` variable.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

#[cfg(unix)]
#[path = "cli/lora.rs"]
mod lora;
#[cfg(unix)]
#[path = "cli/serve.rs"]
mod serve;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens").join(name)
}

fn hearth(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hearth"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("HEARTH_") {
            command.env_remove(name);
        }
    }
    command.args(args).stdin(Stdio::null()).env_remove("RUST_LOG").env("HEARTH_DATA_DIR", "none");
    command
}

fn run(args: &[&str]) -> Output {
    hearth(args).output().unwrap()
}

/// What a command that must succeed prints.
fn stdout_of(args: &[&str]) -> String {
    let output = run(args);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{args:?}: {text}{}", stderr(&output));
    text
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn assert_mentions(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "`{text}` does not mention `{word}`");
    }
}

/// The command fails as a program should: not by a panic, and its last words are of use.
fn assert_fails(args: &[&str], words: &[&str]) {
    let output = run(args);
    let text = stderr(&output);
    let code = output.status.code();
    assert!(code == Some(1) || code == Some(2), "{args:?}: {code:?} {text}");
    assert!(!text.contains("panicked") && !text.contains("RUST_BACKTRACE"), "{args:?}: {text}");
    let (_, error) = text.rsplit_once("error: ").unwrap_or_else(|| panic!("no error in {text}"));
    assert_mentions(error, words);
}

#[test]
fn help_lists_commands_and_flags() {
    let commands = "serve chat complete models quantize lora keys data bench doctor";
    let commands: Vec<&str> = commands.split(' ').collect();
    assert_mentions(&stdout_of(&["--help"]), &commands);
    assert_mentions(&stdout_of(&["serve", "--help"]), &["--model", "--port", "--ctx-size"]);
    assert_mentions(&stdout_of(&["--version"]), &[env!("CARGO_PKG_VERSION")]);
    for command in commands {
        assert!(!stdout_of(&[command, "--help"]).is_empty());
    }
}

#[test]
fn without_a_command_it_says_what_there_is() {
    assert_eq!(run(&[]).status.code(), Some(2));
}

#[test]
#[cfg(feature = "builtin-model")]
fn without_a_model_the_built_in_one_answers() {
    let said = stdout_of(&["complete", "<|im_start|>user\nHi", "-n", "4", "--temperature", "0"]);
    assert!(!said.trim().is_empty());
    assert_mentions(&stdout_of(&["models", "list"]), &["hearth-tiny"]);
    assert_mentions(&stdout_of(&["doctor"]), &["hearth-tiny", "qwen3"]);
}

#[test]
fn wrong_flags_are_named() {
    assert_fails(&["serve", "--prot", "1"], &["--prot"]);
    assert_fails(&["serve", "--port", "66000"], &["--port", "66000"]);
    assert_fails(&["serve", "--threads", "0"], &["--threads", "0"]);
    assert_fails(&["serve", "--kv-dtype", "f8"], &["--kv-dtype", "f8", "bf16"]);
    assert_fails(
        &["serve", "--device", "plain", "--kv-prefault"],
        &["--kv-prefault", "--device cpu"],
    );
    assert_fails(&["serve", "--host", "nowhere"], &["--host", "nowhere"]);
    assert_fails(&["doctor", "--device", "abacus"], &["abacus"]);
    assert_fails(&["serve", "--tensor-parallel", "0"], &["--tensor-parallel"]);
    let model = golden("llama.gguf");
    let model = model.to_str().unwrap();
    assert_fails(&["bench", "-m", model, "-n", "0"], &["--decode"]);
    assert_fails(&["serve", "-m", model, "--ctx-size", "257"], &["--ctx-size", "257", "256"]);
    assert_fails(&["serve", "-m", model, "-m", model], &["llama", "--alias"]);
    let other = golden("qwen3.gguf").to_str().unwrap().to_owned();
    assert_fails(&["serve", "-m", model, "--draft-model", &other], &["qwen3", "vocabulary"]);
    let three = ["-m", model, "--device", "cpu", "--tensor-parallel", "3"];
    for command in ["serve", "doctor"] {
        let args = [&[command], &three[..]].concat();
        assert_fails(&args, &["llama.gguf", "num_attention_heads", "3 devices"]);
    }
    let kept = [&["serve"], &three[..4], &["--tensor-parallel", "2", "--kv-store", "d"]].concat();
    assert_fails(&kept, &["--kv-store", "--tensor-parallel 1"]);
}

#[test]
fn wrong_config_files_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hearth.toml");
    let path = file.to_str().unwrap();
    assert_fails(&["doctor", "--config", path], &[path]);
    fs::write(&file, "prot = 1\n").unwrap();
    assert_fails(&["doctor", "--config", path], &[path, "prot", "port"]);
    fs::write(&file, "port = \n").unwrap();
    assert_fails(&["doctor", "--config", path], &[path, "line 1"]);
    fs::write(&file, "threads = 0\n").unwrap();
    assert_fails(&["doctor", "--config", path], &["--threads"]);
    // A flag wins over the file, and the file over the default.
    fs::write(&file, "threads = 2\ndevice = \"abacus\"\n").unwrap();
    let text = stdout_of(&["doctor", "--config", path, "--device", "plain"]);
    assert_mentions(&text, &["threads     2", "candle"]);
}

#[test]
fn environment_is_read_and_flags_win() {
    let doctor = |args: &[&str]| {
        let output = hearth(args).env("HEARTH_THREADS", "3").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_mentions(&doctor(&["doctor"]), &["threads     3"]);
    assert_mentions(&doctor(&["doctor", "--threads", "1"]), &["threads     1"]);
}

#[test]
fn keys_and_values_are_planned_as_the_device_keeps_them() {
    let room = |device: &str, dtype: &str| {
        let text = stdout_of(&["doctor", "--device", device, "--kv-dtype", dtype]);
        let line = text.lines().find(|line| line.starts_with("keys+values"));
        line.unwrap_or_else(|| panic!("{text}")).to_owned()
    };
    assert_ne!(room("cpu", "q8_0"), room("cpu", "f32"));
    for integers in ["q16_0", "q8_0", "fp8"] {
        assert_eq!(room("plain", integers), room("plain", "f32"), "candle has no room for these");
    }
}

/// A flag that a command would ignore is one that it does not have.
#[test]
fn commands_have_the_flags_that_mean_something_to_them() {
    let shared = [
        ("--model", "serve chat complete bench doctor"),
        ("--device", "serve chat complete bench doctor"),
        ("--tensor-parallel", "serve chat complete bench doctor"),
        ("--threads", "serve chat complete bench doctor"),
        ("--kv-dtype", "serve chat complete bench doctor"),
        ("--quantize", "serve chat complete bench doctor"),
        ("--ctx-size", "serve chat complete doctor"),
        ("--batch-tokens", "serve chat complete bench doctor"),
        ("--speculate", "serve chat complete doctor"),
        ("--draft-model", "serve chat complete doctor"),
        ("--max-running", "serve doctor"),
        ("--max-queue", "serve doctor"),
        ("--target-itl-ms", "serve doctor"),
        ("--queue-timeout-s", "serve doctor"),
        ("--memory-budget", "serve doctor"),
        ("--models-dir", "serve doctor"),
        ("--keep-alive", "serve doctor"),
        ("--pin", "serve doctor"),
        ("--lora", "serve chat complete"),
    ];
    let servers = "--alias --host --port --data-dir --api-key --body-limit-mb --lenient-fields \
        --log-format --tls-cert --tls-key --model-alias --lora-dir --lora-memory --insecure \
        --cors-origin --files-quota-gb --kv-store --kv-store-size --kv-prefault --send-timeout-s \
        --store-days";
    let servers = servers.split_whitespace().map(|flag| (flag, "serve"));
    let flags: Vec<(&str, &str)> = shared.into_iter().chain(servers).collect();
    for command in ["serve", "chat", "complete", "bench", "doctor"] {
        let help = stdout_of(&[command, "--help"]);
        for (flag, owners) in &flags {
            let owns = owners.split(' ').any(|owner| owner == command);
            let lists = |word: &str| word.split("[=").next() == Some(*flag);
            assert_eq!(help.split_whitespace().any(lists), owns, "{command} {flag}: {help}");
        }
    }
    // A flag that is new to the server has its row here too.
    let help = stdout_of(&["serve", "--help"]);
    let lines = help.lines().map(str::trim_start).filter(|line| line.starts_with('-'));
    for word in lines.filter_map(|line| line.split_whitespace().find(|w| w.starts_with("--"))) {
        let flag = word.split("[=").next().unwrap();
        let is_known = flags.iter().any(|(known, _)| *known == flag);
        assert!(is_known || ["--config", "--help"].contains(&flag), "{flag}");
    }
    assert_fails(&["chat", "--port", "1"], &["--port"]);
}

/// What `hearth doctor` says with these variables.
fn doctor_with(variables: &[(&str, &str)], args: &[&str]) -> String {
    let mut command = hearth(&["doctor"]);
    let output = command.args(args).envs(variables.iter().copied()).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_empty_variable_is_not_set() {
    let names = ["MODEL", "THREADS", "DEVICE", "MAX_RUNNING", "KV_DTYPE", "CONFIG", "CTX_SIZE"];
    let names: Vec<String> = names.iter().map(|name| format!("HEARTH_{name}")).collect();
    let empty: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), "")).collect();
    assert_mentions(&doctor_with(&empty, &["--threads", "2"]), &["threads     2"]);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("hearth.toml");
    fs::write(&file, "threads = 2\n").unwrap();
    let text = doctor_with(&empty[..6], &["--config", file.to_str().unwrap()]);
    assert_mentions(&text, &["threads     2"]);
}

#[test]
fn a_comma_belongs_to_a_path_and_separates_in_the_variable() {
    let folder = tempfile::tempdir().unwrap();
    let odd = folder.path().join("a,b.gguf");
    fs::copy(golden("llama.gguf"), &odd).unwrap();
    let text = stdout_of(&["doctor", "-m", odd.to_str().unwrap()]);
    assert_mentions(&text, &["a,b.gguf", "family      llama"]);
    let (llama, qwen) = (golden("llama.gguf"), golden("qwen3.gguf"));
    let both = format!("{},{}", llama.display(), qwen.display());
    let text = doctor_with(&[("HEARTH_MODEL", &both)], &[]);
    assert_mentions(&text, &["family      llama", "family      qwen3"]);
    // The flag replaces what the variable says.
    let text = doctor_with(&[("HEARTH_MODEL", &both)], &["-m", odd.to_str().unwrap()]);
    assert_eq!(text.matches("family").count(), 1, "{text}");
}

#[test]
fn devices_are_listed_and_absent_ones_say_how_to_get_them() {
    assert_fails(
        &["doctor", "--device", "gpu"],
        &["--device", "`gpu`", "auto, cpu, cuda", "metal"],
    );
    for (device, built) in [("cuda", cfg!(feature = "cuda")), ("metal", cfg!(feature = "metal"))] {
        if !built {
            assert_fails(&["doctor", "--device", device], &["--device", "--features", device]);
        }
    }
    let error = stderr(&run(&["doctor", "--device", "cuda:1"]));
    assert!(!error.contains("the candle crate"), "{error}");
}

#[test]
fn one_file_describes_every_command_and_its_paths_begin_beside_it() {
    let folder = tempfile::tempdir().unwrap();
    fs::create_dir(folder.path().join("models")).unwrap();
    for name in ["llama", "qwen3"] {
        let name = format!("{name}.gguf");
        fs::copy(golden(&name), folder.path().join("models").join(&name)).unwrap();
    }
    let file = folder.path().join("hearth.toml");
    let lines = "model = [\"models/llama.gguf\", \"./models/qwen3.gguf\"]\nalias = \"first\"\n\
        port = 9\nmax-running = 3\nthreads = 1\n";
    fs::write(&file, lines).unwrap();
    let path = file.to_str().unwrap();
    let text = stdout_of(&["doctor", "--config", path]);
    assert_mentions(&text, &["family      llama", "family      qwen3", "3 at once"]);
    // One that talks to one model takes the first, and says so.
    let output = run(&["complete", "--config", path, "-n", "2", "Once"]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert_mentions(&stderr(&output), &["of 2 models", "llama.gguf"]);
    fs::write(&file, "model = \"models/none.gguf\"\n").unwrap();
    assert_fails(&["doctor", "--config", path], &[folder.path().to_str().unwrap(), "none.gguf"]);
}

#[test]
fn doctor_describes_machine_and_model() {
    let text = stdout_of(&["doctor", "-m", golden("llama.gguf").to_str().unwrap()]);
    assert_mentions(&text, &["processor", "threads", "device", "free memory"]);
    assert_mentions(&text, &["family      llama, 2 layers", "context     256 tokens of 256"]);
}

#[test]
fn inspect_shows_what_is_inside() {
    let path = golden("llama.gguf");
    let path = path.to_str().unwrap();
    let brief = stdout_of(&["models", "inspect", path]);
    assert_mentions(&brief, &["general.architecture", "llama.block_count", "tensors of F32"]);
    assert_mentions(&brief, &["hidden_len: 48"]);
    let tensor = "blk.1.ffn_down.weight [48, 36] F32";
    assert!(!brief.contains(tensor));
    assert_mentions(&stdout_of(&["models", "inspect", path, "--tensors"]), &[tensor]);

    let folder = stdout_of(&["models", "inspect", golden("qwen3").to_str().unwrap()]);
    assert_mentions(&folder, &["SafeTensors", "qk_norm: true"]);
}

#[test]
fn greedy_completion_is_deterministic() {
    let model = golden("llama.gguf");
    let model = model.to_str().unwrap();
    let complete = |extra: &[&str], more: &[&str]| {
        let args = ["complete", "-m", model, "-n", "24", "Once upon a time"];
        stdout_of(&[&args, extra, more].concat())
    };
    let (cold, hot) = (["--temperature", "0"], ["--temperature", "2", "--seed", "5"]);
    let (greedy, seeded) = (complete(&cold, &[]), complete(&hot, &[]));
    assert!(greedy.len() > 8, "{greedy:?}");
    let draft = ["--draft-model", model];
    let ranks = ["--device", "cpu", "--tensor-parallel", "2"];
    let both = [ranks, ["--draft-model", model, "--kv-dtype", "f32"]].concat();
    let ngram = ["--speculate", "ngram"];
    for same in [&[][..], &["--threads", "1"], &ngram, &draft, &ranks, &both] {
        assert_eq!(complete(&cold, same), greedy);
        assert_eq!(complete(&hot, same), seeded);
    }
    assert_ne!(complete(&["--temperature", "2", "--seed", "6"], &[]), seeded);
}

#[test]
fn bench_writes_json_lines() {
    let model = golden("llama-q8_0.gguf");
    let flags = "bench --json -p 8,16 -b 1,2 -d 0,5 --rows 1,4 -n 3 -r 2 -m".split(' ');
    let text = stdout_of(&flags.chain(model.to_str()).collect::<Vec<_>>());
    let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let of = |test: &str| rows.iter().filter(|r| r["test"] == test).count();
    assert_eq!((of("prefill"), of("decode"), rows.len()), (2, 8, 10));
    for row in &rows {
        let speed = |key: &str| row[key].as_f64().unwrap();
        let (low, mid) = (speed("tokens_per_s_min"), speed("tokens_per_s"));
        assert!(0.0 < low && low <= mid && mid <= speed("tokens_per_s_max"), "{row}");
    }
}

#[test]
fn files_that_are_not_models_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let whole = fs::read(golden("llama.gguf")).unwrap();
    fs::write(path("half.gguf"), &whole[..whole.len() / 2]).unwrap();
    fs::write(path("head.gguf"), &whole[..100]).unwrap();
    fs::write(path("text.gguf"), "not a model").unwrap();
    fs::write(path("empty.gguf"), "").unwrap();
    fs::create_dir(path("folder")).unwrap();
    for command in ["serve", "complete", "bench", "doctor"] {
        let fails = |name: &str, words: &[&str]| {
            let path = path(name);
            let mut args = vec![command, "-m", &path];
            args.extend((command == "complete").then_some("text"));
            assert_fails(&args, &[&[path.as_str()], words].concat());
            let text = stderr(&run(&args));
            let (_, error) = text.rsplit_once("error: ").unwrap();
            assert_eq!(error.matches(&path).count(), 1, "{error}");
        };
        fails(
            "half.gguf",
            &["shorter than its header promises", "207136 are needed", "fetch it again", "bytes"],
        );
        fails("head.gguf", &["byte"]);
        fails("text.gguf", &[]);
        fails("empty.gguf", &[]);
        fails("missing.gguf", &[]);
        fails("folder", &[".safetensors"]);
    }
    assert_fails(&["models", "inspect", &path("half.gguf")], &["half.gguf", "bytes"]);
    assert_fails(&["models", "inspect", &path("missing.gguf")], &["missing.gguf"]);
    // Weights without a tokenizer are a model that nobody can talk to.
    let folder = golden("llama");
    assert_fails(&["complete", "-m", folder.to_str().unwrap(), "text"], &["tokenizer.json"]);
}
