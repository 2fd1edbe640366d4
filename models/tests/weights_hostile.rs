//! Damaged and hostile weight files: refused with an error that says where, never a panic, and
//! never one allocation larger than the file.

use hearth_models::weights::gguf_writer::GgufWriter;
use hearth_models::weights::{DType, Value, Weights};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// Remembers the largest single allocation of each thread.
struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn note(size: usize) {
    // A thread that is being torn down has no counter any more, and runs no test.
    let _ = LARGEST.try_with(|largest| largest.set(largest.get().max(size)));
}

// SAFETY: every call goes to the system allocator unchanged; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note(layout.size());
        // SAFETY: the caller's promise about `layout` is passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: `at` came from `System` with this layout.
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        note(size);
        // SAFETY: `at` came from `System` with this layout; `size` is the caller's promise.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What a file of any size may ask for at once: tree nodes, error texts, paths.
const SMALL_BYTES: usize = 8 * 1024;

struct XorShift(u64);

impl XorShift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Opens the bytes and reads everything that can be read.
fn read_everything(bytes: Vec<u8>) -> Result<(), String> {
    let weights = Weights::from_bytes("fuzz", bytes).map_err(|e| e.to_string())?;
    let mut sum = 0u64;
    for (name, info) in weights.infos() {
        sum += info.elements() as u64 + info.len_bytes() as u64;
        match weights.tensor(name) {
            Ok(view) => {
                assert_eq!(view.shape, info.shape);
                let elements: usize = view.shape.iter().product();
                let blocks = elements / view.dtype.block_len();
                assert_eq!(view.bytes.len(), blocks * view.dtype.block_bytes());
                sum += view.bytes.iter().map(|&b| u64::from(b)).sum::<u64>();
            }
            Err(e) => sum += e.to_string().len() as u64,
        }
    }
    if let Some(metadata) = weights.metadata() {
        for key in metadata.keys() {
            match metadata.value(key) {
                Ok(Some(Value::Array(array))) => {
                    sum += array.iter().filter(Result::is_ok).count() as u64
                }
                Ok(Some(_)) => sum += 1,
                Ok(None) => unreachable!("a listed key has a value"),
                Err(e) => sum += e.to_string().len() as u64,
            }
        }
    }
    std::hint::black_box(sum);
    Ok(())
}

/// The same with both promises checked; says whether the file was accepted.
fn check(bytes: Vec<u8>, case: &str) -> Result<(), String> {
    let limit = bytes.len() + SMALL_BYTES;
    LARGEST.with(|largest| largest.set(0));
    let outcome = catch_unwind(AssertUnwindSafe(|| read_everything(bytes)));
    let largest = LARGEST.with(Cell::get);
    let outcome = outcome.unwrap_or_else(|_| panic!("{case}: panicked"));
    assert!(largest <= limit, "{case}: one allocation of {largest} bytes, the file gives {limit}");
    outcome
}

/// One to four random damages, most of them in the first `header` bytes.
fn damage(bytes: &mut Vec<u8>, header: usize, random: &mut XorShift) {
    for _ in 0..=random.below(4) {
        if bytes.is_empty() {
            return;
        }
        let reach = if random.below(8) == 0 { bytes.len() } else { header.min(bytes.len()) };
        let at = random.below(reach);
        match random.below(8) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => overwrite(bytes, at, &absurd(random).to_le_bytes()),
            4 => overwrite(bytes, at, &(absurd(random) as u32).to_le_bytes()),
            5 => bytes.truncate(at),
            6 => {
                let from = random.below(reach);
                let len = random.below(64).min(bytes.len() - from);
                let copied = bytes[from..from + len].to_vec();
                overwrite(bytes, at, &copied);
            }
            _ => {
                let to = (at + random.below(64)).min(bytes.len());
                bytes.drain(at..to);
            }
        }
    }
}

fn overwrite(bytes: &mut [u8], at: usize, with: &[u8]) {
    let len = with.len().min(bytes.len() - at);
    bytes[at..at + len].copy_from_slice(&with[..len]);
}

fn absurd(random: &mut XorShift) -> u64 {
    let small = random.next() % 300;
    let shift = random.below(64);
    let choices =
        [0, 1, u64::MAX, u64::MAX - 31, i64::MAX as u64, u32::MAX.into(), 1 << shift, small];
    choices[random.below(choices.len())]
}

/// Damages `original` `times` times. Many must be refused, or the damage does not matter.
fn fuzz(name: &str, original: &[u8], header: usize, times: usize) {
    check(original.to_vec(), name)
        .unwrap_or_else(|e| panic!("{name}: the original is refused: {e}"));
    let mut random = XorShift(0x9E37_79B9_7F4A_7C15);
    let mut refused = 0;
    for i in 0..times {
        let mut bytes = original.to_vec();
        damage(&mut bytes, header, &mut random);
        refused += usize::from(check(bytes, &format!("{name}, damage {i}")).is_err());
    }
    assert!(refused > times / 3, "{name}: only {refused} of {times} damaged files were refused");
    println!("{name}: {refused} of {times} damaged files refused");
}

fn small_gguf() -> Vec<u8> {
    let mut writer = GgufWriter::new();
    writer.put("general.architecture", Value::Str("llama")).unwrap();
    writer.put("llama.block_count", Value::U32(2)).unwrap();
    writer.put("llama.rope.freq_base", Value::F32(1e4)).unwrap();
    writer.put("flag", Value::Bool(true)).unwrap();
    writer.put_strings("tokenizer.ggml.tokens", &["<s>", "a", "ab", ""]).unwrap();
    writer.put_f32s("tokenizer.ggml.scores", &[0.0, -1.0, -2.0, -3.0]).unwrap();
    writer.put_i32s("tokenizer.ggml.token_type", &[3, 1, 1, 1]).unwrap();
    let tensors = [
        ("a", vec![3, 4], DType::F32, 48),
        ("b", vec![2, 64], DType::Q4_0, 72),
        ("c", vec![256], DType::Q6K, 210),
        ("d", vec![5, 3, 2], DType::F16, 60),
    ];
    for (name, shape, dtype, _) in &tensors {
        writer.tensor(name, shape, *dtype).unwrap();
    }
    let mut body = writer.write_header(Vec::new()).unwrap();
    for (_, _, _, len) in tensors {
        body.write_tensor(&vec![7; len]).unwrap();
    }
    body.finish().unwrap()
}

fn safetensors(header: &str, data_len: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_len, 5);
    bytes
}

fn small_safetensors() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt"},
        "model.embed.weight":{"dtype":"F32","shape":[3,4],"data_offsets":[0,48]},
        "model.norm.weight":{"dtype":"BF16","shape":[4],"data_offsets":[48,56]},
        "position_ids":{"dtype":"I64","shape":[1,2],"data_offsets":[56,72]},
        "scale":{"dtype":"F16","shape":[],"data_offsets":[72,74]},
        "empty":{"dtype":"F32","shape":[0,4],"data_offsets":[74,74]}}  "#;
    safetensors(header, 74)
}

fn shared(path: &str) -> Option<PathBuf> {
    let found = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data").join(path);
    if !found.exists() {
        println!("SKIPPED: {} is not here", found.display());
    }
    found.exists().then_some(found)
}

/// Without this, the promise about allocations could be kept by a counter that does not count.
#[test]
fn the_allocator_counts() {
    LARGEST.with(|largest| largest.set(0));
    drop(std::hint::black_box(vec![1u8; 123_456]));
    assert_eq!(LARGEST.with(Cell::get), 123_456);
}

#[test]
fn damaged_gguf_headers() {
    let file = small_gguf();
    fuzz("small GGUF", &file, file.len(), 20_000);
}

#[test]
fn damaged_safetensors_headers() {
    let file = small_safetensors();
    fuzz("small SafeTensors", &file, file.len(), 20_000);
}

#[test]
fn damaged_real_files() {
    for (path, header, times) in [
        ("models/stories260K-gguf/stories260K-Q4_0.gguf", 20_000, 4_000),
        ("models/stories260K-gguf/stories260K-F16.gguf", 20_000, 3_000),
        ("models/quant-goldens/quant-goldens.gguf", 2_000, 4_000),
        ("models/quant-goldens/quant-goldens-iq.gguf", 400, 4_000),
        ("models/stories260K-hf/model.safetensors", 5_000, 3_000),
    ] {
        if let Some(found) = shared(path) {
            fuzz(path, &std::fs::read(found).unwrap(), header, times);
        }
    }
}

/// A GGUF header written byte by byte, so that it can lie.
#[derive(Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn header(version: u32, n_tensors: u64, n_entries: u64) -> Self {
        Self(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_entries)
    }
    fn u32(mut self, x: u32) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }
    fn u64(mut self, x: u64) -> Self {
        self.0.extend(x.to_le_bytes());
        self
    }
    fn text(self, text: &str) -> Self {
        let mut raw = self.u64(text.len() as u64);
        raw.0.extend_from_slice(text.as_bytes());
        raw
    }
    /// Dimensions fastest first, as in the file.
    fn tensor(self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Self {
        let raw = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, &dim| raw.u64(dim)).u32(ty).u64(offset)
    }
    /// Pads to the data section and adds `len` bytes of data.
    fn data(mut self, len: usize) -> Vec<u8> {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + len, 1);
        self.0
    }
}

#[test]
fn hostile_gguf_headers_are_refused_by_name() {
    let one = |name: &str, dims: &[u64], ty, offset| {
        Raw::header(3, 1, 0).tensor(name, dims, ty, offset).data(64)
    };
    let entry = |key: &str, ty: u32| Raw::header(3, 0, 1).text(key).u32(ty);
    let two = |first: &str, second: &str, offset: u64| {
        let raw = Raw::header(3, 2, 0).tensor(first, &[8], 0, 0);
        raw.tensor(second, &[8], 0, offset).data(64)
    };
    let aligned = |alignment| entry("general.alignment", 4).u32(alignment).data(0);
    let mut nested = entry("nested", 9);
    for _ in 0..100 {
        nested = nested.u32(9).u64(1);
    }
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("magic alone", b"GGUF".to_vec(), "(at byte 4)"),
        ("version 1", Raw::header(1, 0, 0).0, "version 1"),
        ("version 99", Raw::header(99, 0, 0).0, "version 99"),
        ("big endian", Raw::header(3u32.swap_bytes(), 0, 0).0, "big-endian"),
        ("tensor count", Raw::header(3, u64::MAX, 0).data(64), "tensors cannot fit"),
        ("entry count", Raw::header(3, 0, u64::MAX).data(64), "metadata entries cannot fit"),
        ("key length", Raw::header(3, 0, 1).u64(u64::MAX).data(64), "(at byte 24)"),
        ("empty key", Raw::header(3, 0, 1).u64(0).u32(4).u64(0).data(64), "metadata key of 0"),
        ("value type", entry("k", 13).u64(0).data(64), "13 is not a metadata value type"),
        ("text length", entry("k", 8).u64(1 << 40).data(64), "bytes of text cannot fit"),
        ("array length", entry("k", 9).u32(4).u64(1 << 62).data(64), "elements cannot fit"),
        ("text array length", entry("k", 9).u32(8).u64(100).data(64), "elements cannot fit"),
        ("nesting", nested.data(64), "nested more than"),
        (
            "duplicate key",
            Raw::header(3, 0, 2).text("k").u32(4).u32(1).text("k").u32(4).u32(1).data(0),
            "`k` appears twice",
        ),
        ("alignment 0", aligned(0), "general.alignment"),
        ("alignment 24", aligned(24), "24 is not a power of two"),
        ("alignment type", entry("general.alignment", 8).text("x").data(0), "general.alignment"),
        ("no dimensions", one("t", &[], 0, 0), "`t`: 0 dimensions"),
        ("five dimensions", one("t", &[1; 5], 0, 0), "`t`: 5 dimensions"),
        ("zero dimension", one("t", &[8, 0], 0, 0), "`t`: a dimension"),
        ("overflow", one("t", &[1 << 33, 1 << 33], 0, 0), "`t`: its dimensions"),
        ("byte overflow", one("t", &[1 << 62, 1], 0, 0), "`t`: its dimensions"),
        ("beyond the file", one("t", &[17], 0, 0), "it has 128 bytes, and 132 are needed"),
        ("offset beyond the file", one("t", &[1], 0, 96), "it has 128 bytes, and 164 are needed"),
        ("no bytes there", one("t", &[1], 99, 96), "it has 128 bytes, and 160 are needed"),
        ("offset overflow", one("t", &[1], 0, u64::MAX - 31), "`t`: its bytes at offset"),
        ("misaligned", one("t", &[4], 0, 4), "`t`: offset 4 is not a multiple of 32"),
        ("broken blocks", one("t", &[31], 2, 0), "`t`: rows of 31 are not whole Q4_0"),
        ("overlap", two("t", "u", 0), "overlap"),
        ("duplicate tensor", two("t", "t", 32), "`t`: the name appears twice"),
    ];
    for (what, bytes, expected) in cases {
        let message = check(bytes, what).expect_err(what);
        assert!(message.contains(expected), "{what}: {message}");
    }
}

/// What is left of a download says how much is missing, wherever it was cut off.
#[test]
fn files_that_were_cut_short_say_so() {
    // Behind the last tensor of a GGUF nothing is missed.
    for (name, whole, padding) in
        [("GGUF", small_gguf(), 4), ("SafeTensors", small_safetensors(), 0)]
    {
        let needed = whole.len() - padding;
        check(whole[..needed].to_vec(), name).expect("all that is needed");
        for found in 9..needed {
            let message = check(whole[..found].to_vec(), name).expect_err(name);
            let says = |words: &str| assert!(message.contains(words), "{name}, {found}: {message}");
            says("fetch it again");
            says(&format!("{found} bytes"));
            if found > needed - 30 {
                says("shorter than its header promises");
                says(&format!("it has {found} bytes, and {needed} are needed"));
            }
        }
    }
}

/// A file that is named `.gguf` is held to it.
#[test]
fn files_without_the_magic_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.gguf");
    for (bytes, expected) in [
        (&b""[..], "the file is empty"),
        (b"GGU", "it has 3 bytes, and 4 or more are needed; fetch it again (at byte 0)"),
        (b"GGML\x03\0\0\0", "not a GGUF file: it starts with `GGML` (at byte 0)"),
    ] {
        std::fs::write(&path, bytes).unwrap();
        let message = Weights::open(&path).unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn hostile_safetensors_headers_are_refused_by_name() {
    let t = |shape: &str, offsets: &str| {
        let header =
            format!(r#"{{"t":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
        safetensors(&header, 32)
    };
    let pair = |second: &str, offsets: &str| {
        let header = format!(
            r#"{{"t":{{"dtype":"F32","shape":[4],"data_offsets":[0,16]}},
            "{second}":{{"dtype":"F32","shape":[4],"data_offsets":{offsets}}}}}"#
        );
        safetensors(&header, 32)
    };
    let many_dims = format!("[{}1]", "1,".repeat(100_000));
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("short", vec![1, 2, 3], "8 bytes are expected"),
        ("header length", u64::MAX.to_le_bytes().to_vec(), "bytes of header cannot fit"),
        ("not JSON", safetensors("{nope", 0), "the header is not readable"),
        ("not an object", safetensors("[]", 0), "does not start with `{`"),
        ("deep JSON", safetensors(&format!("{{\"t\":{}", "[".repeat(9_999)), 0), "`t`"),
        ("unknown field", safetensors(r#"{"t":{"dtype":"F32","x":1}}"#, 0), "`t`: unknown field"),
        ("missing field", safetensors(r#"{"t":{"dtype":"F32"}}"#, 0), "missing field"),
        ("negative", t("[-8]", "[0,32]"), "tensor `t`"),
        ("overflow", t("[4294967296,4294967296,4294967296]", "[0,32]"), "`t`: its shape"),
        ("too many dimensions", t(&many_dims, "[0,32]"), "more than 8 dimensions"),
        ("beyond the file", t("[9]", "[0,36]"), "it has 95 bytes, and 99 are needed"),
        ("offset overflow", t("[8]", "[18446744073709551615,0]"), "`t`: its bytes"),
        ("backwards", t("[8]", "[32,0]"), "`t`: its bytes end before they start"),
        ("wrong size", t("[7]", "[0,32]"), "`t`: shape [7] of F32 does not fill 32 bytes"),
        ("tail", t("[7]", "[0,28]"), "4 of the 32 bytes of data belong to no tensor"),
        ("hole", t("[7]", "[4,32]"), "belong to no tensor"),
        ("overlap", pair("u", "[8,24]"), "overlap tensor `u`"),
        ("duplicate", pair("t", "[16,32]"), "tensor `t` appears twice"),
    ];
    for (what, bytes, expected) in cases {
        let message = check(bytes, what).expect_err(what);
        assert!(message.contains(expected), "{what}: {message}");
    }
}

#[test]
fn a_hundred_thousand_tiny_tensors_and_keys_stay_within_the_file() {
    const N: u64 = 100_000;
    let mut raw = Raw::header(3, N, N);
    for i in 0..N {
        raw = raw.text(&format!("{i:x}")).u32(0);
        raw.0.push(1);
    }
    for i in 0..N {
        raw = raw.tensor(&format!("{i:x}"), &[1], 0, i * 32);
    }
    check(raw.data(32 * N as usize), "tiny tensors").unwrap();

    let entry = |i| format!(r#""{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1);
    let entries: Vec<String> = (0..N).map(entry).collect();
    let bytes = safetensors(&format!("{{{}}}", entries.join(",")), N as usize);
    check(bytes, "tiny SafeTensors").unwrap();
}
