//! The CUDA kernels on the processor, without a GPU, CUDA or the feature `cuda`.
//!
//! Each test compiles one of `cuda/tests/*.cpp`, which includes the kernels of `cuda/*.cu` and runs
//! them through `cuda/emulate.h`, and lets it run. The compiler (gcc or clang) reports every access
//! to `cuda/watch.h`, which finds races, so one order of the threads will do. `CXX` names the
//! compiler, else it is `c++`; without any, tests say so and pass.
//!
//! Only where the emulator is at home: it changes stacks in ways that other systems forbid.
#![cfg(target_os = "linux")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Products are rounded as they are written. Kernels say more to `nvcc` than others understand.
const FLAGS: &[&str] = &[
    "-std=c++17",
    "-O2",
    "-ffp-contract=off",
    "-DHEARTH_EMULATE",
    "-Wall",
    "-Wno-unknown-pragmas",
    // What the compiler calls then is in `watch.h`, and so no library is linked.
    "-fsanitize=thread,alignment",
    "-fno-threadsafe-statics",
];

#[test]
fn attention_any() {
    check("attention_any");
}

#[test]
fn attention_decode() {
    check("attention_decode");
}

#[test]
fn attention_prefill() {
    check("attention_prefill");
}

#[test]
fn dequantize() {
    check("dequantize");
}

#[test]
fn elementwise() {
    check("elementwise");
}

#[test]
fn emulate() {
    check("emulate");
}

#[test]
fn experts() {
    check("experts");
}

#[test]
fn experts_linear() {
    check("experts_linear");
}

#[test]
fn experts_quantized() {
    check("experts_quantized");
}

#[test]
fn linear() {
    check("linear");
}

#[test]
fn lora() {
    check("lora");
}

#[test]
fn quantized() {
    check("quantized");
}

#[test]
fn quantized_tall() {
    check("quantized_tall");
}

#[test]
fn quantized_wide() {
    check("quantized_wide");
}

#[test]
fn sampling() {
    check("sampling");
}

#[test]
fn every_kernel_has_a_test() {
    let tests = stems(&cuda().join("tests"), "cpp");
    let untested: Vec<String> = stems(&cuda(), "cu").difference(&tests).cloned().collect();
    assert!(untested.is_empty(), "no cuda/tests/*.cpp for {untested:?}");
    let here = include_str!("emulated.rs");
    let forgotten: Vec<&String> =
        tests.iter().filter(|test| !here.contains(&format!("check(\"{test}\")"))).collect();
    assert!(forgotten.is_empty(), "no test here compiles {forgotten:?}");
}

fn cuda() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// Names of the files of a folder with an ending, without it.
fn stems(folder: &Path, ending: &str) -> BTreeSet<String> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let wanted = files.filter(|path| path.extension().is_some_and(|e| e == ending));
    wanted.map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

/// Compiles `cuda/tests/NAME.cpp` and runs it.
fn check(name: &str) {
    let Some(compiler) = compiler() else {
        println!("{name}: there is no C++ compiler; set CXX");
        return;
    };
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulated");
    std::fs::create_dir_all(&folder).unwrap();
    let program = folder.join(name);
    compile(&compiler, name, &program);
    let ran = Command::new(&program).output().unwrap();
    println!("{name}:\n{}", text(&ran));
    assert!(ran.status.success(), "{name}: {}", ran.status);
}

fn compile(compiler: &[String], name: &str, program: &Path) {
    let mut command = command(compiler);
    command.args(FLAGS);
    // Other compilers, and those to come, have warnings that we do not know.
    if std::env::var_os("CI").is_some() {
        command.arg("-Werror");
    }
    command.arg("-I").arg(cuda()).arg(cuda().join("tests").join(format!("{name}.cpp")));
    let object = program.with_extension("o");
    command.arg("-c").arg("-o").arg(&object);
    let linked = || self::command(compiler).arg(&object).arg("-o").arg(program).output();
    for made in [command.output(), linked()] {
        let made = made.unwrap();
        print!("{}", text(&made));
        assert!(made.status.success(), "{compiler:?} could not compile cuda/tests/{name}.cpp");
    }
}

/// The compiler and its first arguments. One that is asked for must be there.
fn compiler() -> Option<Vec<String>> {
    let asked = std::env::var("CXX").ok().filter(|name| !name.trim().is_empty());
    let name = asked.as_deref().unwrap_or("c++");
    let words: Vec<String> = name.split_whitespace().map(str::to_owned).collect();
    let answer = command(&words).arg("--version").output();
    let works = answer.is_ok_and(|output| output.status.success());
    assert!(works || asked.is_none(), "CXX is {name:?}, which does not run");
    works.then_some(words)
}

fn command(words: &[String]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// What a program said.
fn text(output: &Output) -> String {
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    said.concat()
}
