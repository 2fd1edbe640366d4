//! The CUDA backend on random weights of known shapes, beside what the same device copies and
//! multiplies: one row of a table for each measurement.
//!
//! `cargo bench --features cuda --bench gpu -- [WORD]...`; a word is a part (`limits`, `prefill`,
//! `decode`, `host`, `kv`, `mask`, `lora`, `serve`, `embed`), a model (`8b-bf16`, `8b-q4_k_m`,
//! `0.6b-bf16`, `0.6b-q4_k_m`) or one half of its name. Without words everything runs, else what is
//! named: parts of all models, all parts of models, or these parts of these models. `profile` runs
//! when it is named: one pass each of some shapes, for `ncu --profile-from-start off`.
//! `benches/gpu.sh` runs it beside its peers.

#[cfg(feature = "cuda")]
#[path = "gpu/run.rs"]
mod run;

#[cfg(feature = "cuda")]
fn main() -> std::process::ExitCode {
    run::main()
}

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("this build has no CUDA: cargo bench --features cuda --bench gpu");
}
