//! Compiles `cuda/*.cu` to fat binaries when the feature `cuda` is on; does nothing else.
//!
//! Each file becomes machine code for the Ampere, Ada and Hopper generations and PTX for what comes
//! after. `CUDA_HOME` says where the toolkit is; without it `nvcc` is looked up as any program.
//! `HEARTH_CUDA_ARCHS` (such as `90a`) makes machine code for those generations only, which is what
//! a developer's build wants.

use std::env;
use std::path::PathBuf;
use std::process::{Child, Command};

/// Machine code for these; PTX for the last that has no suffix.
const ARCHS: &str = "80,89,90a";

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    for variable in ["CUDA_HOME", "HEARTH_CUDA_ARCHS", "NVCC_APPEND_FLAGS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    let archs = env::var("HEARTH_CUDA_ARCHS").unwrap_or_else(|_| ARCHS.to_owned());
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut running: Vec<(String, Child)> = Vec::new();
    let mut list = String::from("&[\n");
    for name in sources() {
        let fatbin = out.join(format!("{name}.fatbin"));
        list += &format!("    ({name:?}, include_bytes!({:?})),\n", fatbin.display().to_string());
        running.push((name.clone(), compile(&name, &archs, &fatbin)));
    }
    list += "]\n";
    for (name, mut child) in running {
        let status = child.wait().expect("a started nvcc can be waited for");
        assert!(status.success(), "nvcc could not compile cuda/{name}.cu: {status}");
    }
    std::fs::write(out.join("fatbins.rs"), list).expect("OUT_DIR can be written");
}

/// Names of `cuda/*.cu`, without the ending.
fn sources() -> Vec<String> {
    let folder = std::fs::read_dir("cuda").expect("the kernels are beside this file");
    let paths = folder.map(|entry| entry.expect("a readable folder").path());
    let kernels = paths.filter(|path| path.extension().is_some_and(|e| e == "cu"));
    let stem = |path: PathBuf| path.file_stem().and_then(|s| s.to_str()).map(str::to_owned);
    let mut names: Vec<String> = kernels.filter_map(stem).collect();
    names.sort();
    names
}

fn compile(name: &str, archs: &str, fatbin: &std::path::Path) -> Child {
    let nvcc = match env::var_os("CUDA_HOME") {
        Some(home) => PathBuf::from(home).join("bin/nvcc"),
        None => PathBuf::from("nvcc"),
    };
    let mut command = Command::new(&nvcc);
    command.args(["-O3", "-std=c++17", "-fatbin"]).arg(format!("cuda/{name}.cu"));
    for arch in archs.split(',') {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
    }
    // What is newer than any of them compiles this at its first start.
    let plain = archs.split(',').rfind(|arch| arch.chars().all(|c| c.is_ascii_digit()));
    if let Some(arch) = plain {
        command.arg(format!("-gencode=arch=compute_{arch},code=compute_{arch}"));
    }
    command.arg("-o").arg(fatbin);
    command.spawn().unwrap_or_else(|e| {
        panic!(
            "cannot run {}: {e}. The feature `cuda` needs a CUDA toolkit: CUDA_HOME, its `bin` in \
             PATH, and CUDA_COMPUTE_CAP where there is no GPU; ops/cuda-env.sh brings one from \
             PyPI and sets all three",
            nvcc.display()
        )
    })
}
