//! Which parts run for which models.

mod decode;
mod embed;
mod limits;
mod serve;
mod shapes;
mod table;
mod weights;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use hearth_kernels::cuda::Gpu;

use decode::Subject;
use limits::Ceiling;
use shapes::Shape;
use table::Row;

/// Anything that ends a part.
pub type Failure = Box<dyn std::error::Error>;

const PARTS: [&str; 10] =
    ["limits", "prefill", "decode", "host", "kv", "mask", "lora", "serve", "embed", "profile"];

/// The words of the command line.
struct Words(Vec<String>);

impl Words {
    /// Whether a part was named, or none was.
    fn part(&self, part: &str) -> bool {
        let mut parts = self.0.iter().filter(|word| PARTS.contains(&word.as_str())).peekable();
        parts.peek().is_none() || parts.any(|word| word == part)
    }

    /// Whether a part that is of no model was named, or nothing was.
    fn apart(&self, part: &str) -> bool {
        self.0.is_empty() || self.named(part)
    }

    fn named(&self, part: &str) -> bool {
        self.0.iter().any(|word| word == part)
    }

    /// The same of a model.
    fn model(&self, name: &str) -> bool {
        let mut models = self.0.iter().filter(|word| !PARTS.contains(&word.as_str())).peekable();
        models.peek().is_none() || models.any(|word| names(name, word))
    }
}

/// Whether a word means a model.
fn names(name: &str, word: &str) -> bool {
    name == word || name.split('-').any(|half| half == word)
}

/// Measures what the command line asks for.
pub fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let words = Words(std::env::args().skip(1).filter(|word| word != "--bench").collect());
    let shapes = shapes::all();
    let known = |word: &String| {
        PARTS.contains(&word.as_str()) || shapes.iter().any(|shape| names(shape.name, word))
    };
    if let Some(stranger) = words.0.iter().find(|word| !known(word)) {
        eprintln!("`{stranger}` is neither a part nor a model; see benches/gpu.rs");
        return ExitCode::from(2);
    }
    Row::head();
    let ceiling = match limits::measure() {
        Ok(ceiling) => ceiling,
        Err(error) => {
            Row::new("", "limits").failed(&*error);
            return ExitCode::FAILURE;
        }
    };
    let mut sound = true;
    let of_models = ["prefill", "decode", "host", "kv", "mask", "lora", "serve", "profile"];
    if of_models.iter().any(|part| words.part(part)) {
        for shape in shapes.into_iter().filter(|shape| words.model(shape.name)) {
            let name = shape.name;
            if let Err(error) = model(shape, &words, &ceiling) {
                Row::new(name, "load").failed(&*error);
                sound = false;
            }
        }
    }
    if words.apart("embed") {
        sound &= told("encoders", "embed", embed::run(&ceiling));
    }
    ExitCode::from(u8::from(!sound))
}

/// All parts of one model, on one copy of its weights.
fn model(shape: Shape, words: &Words, ceiling: &Ceiling) -> Result<(), Failure> {
    let name = shape.name;
    let gpu = Arc::new(Gpu::new(0)?);
    let start = Instant::now();
    let made = weights::of_model(&shape.config, shape.mix)?;
    let (making, bytes) = (start.elapsed(), made.tensor_bytes() as f64);
    let loading = Instant::now();
    let decoder = weights::load(&shape.config, &made, &gpu)?;
    gpu.synchronize()?;
    let loading = loading.elapsed();
    drop(made);
    Row::new(name, "load")
        .ms(loading.as_secs_f64() * 1e3)
        .rate(format!("{:.1} GB/s", bytes / loading.as_secs_f64() / 1e9))
        .part(format!("{:.1} GB, made in {:.1} s", bytes / 1e9, making.as_secs_f64()))
        .print();
    let mut subject = Subject::new(gpu, decoder, shape, ceiling)?;
    let mut sound = true;
    if words.part("prefill") {
        sound &= told(name, "prefill", subject.prefill());
    }
    if words.part("decode") {
        sound &= told(name, "decode", subject.decode());
    }
    if words.part("host") {
        sound &= told(name, "host", subject.host());
    }
    if words.part("kv") && name.ends_with("bf16") {
        sound &= told(name, "kv", subject.kinds());
    }
    if words.part("mask") {
        sound &= told(name, "mask", subject.masks());
    }
    if words.part("lora") {
        sound &= told(name, "lora", subject.lora());
    }
    if words.named("profile") {
        sound &= told(name, "profile", subject.profile());
    }
    if words.part("serve") {
        sound &= told(name, "serve", serve::run(subject));
    }
    match sound {
        true => Ok(()),
        false => Err("a part failed".into()),
    }
}

/// Whether a part came to its end; prints why not.
fn told(model: &str, part: &str, outcome: Result<(), Failure>) -> bool {
    if let Err(error) = &outcome {
        Row::new(model, part).failed(&**error);
    }
    outcome.is_ok()
}
