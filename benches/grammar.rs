//! What a form costs a step: eight answers of a real model, free and held to a form, in turns.
//! `cargo bench --bench grammar -- MODEL.gguf`, of a model with a large vocabulary.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hearth::config::{PlanOptions, RawConfig};
use hearth::pipeline::{Format, Pipeline, Prompt, TextEvent, TextRequest};
use hearth::registry::{self, Registry};
use hearth::text::Shape;
use hearth::types::SamplingOverrides;
use hearth_kernels::Pool;
use hearth_models::Compute;
use serde_json::{Value, json};

type Failure = Box<dyn Error>;

/// Counted rounds after one that is not.
const ROUNDS: usize = 5;
const ANSWERS: usize = 8;
const TOKENS: usize = 32;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Failure> {
    // Cargo adds `--bench`.
    let Some(path) = std::env::args().skip(1).find(|a| a != "--bench") else {
        println!("no model: cargo bench --bench grammar -- MODEL.gguf");
        return Ok(());
    };
    let config = RawConfig::default().validate()?;
    let compute = Compute::Fused(Arc::new(Pool::new(config.threads)));
    let options = PlanOptions { ctx_size: Some(2048), running_len: ANSWERS, ..config.plan };
    let model = registry::open(hearth_models::open(Path::new(&path))?)?;
    let model = model.load_alone(&compute, &options)?;
    let name = model.id().to_owned();
    println!("{name}: {} tokens, {ANSWERS} answers", model.engine().limits().vocab_len);
    println!("{:<12} {:<12} {:>9} {:>8}  [least, most]", "temperature", "form", "ms/step", "ratio");
    let pipeline = Pipeline::new(Arc::new(Registry::of(vec![model.into()])?));
    for temperature in [0.0, 1.0] {
        let forms = forms();
        let mut steps = vec![Vec::new(); forms.len()];
        for round in 0..=ROUNDS {
            // Whoever is first in a round is another one each time.
            for side in (0..forms.len()).map(|turn| (turn + round) % forms.len()) {
                let (_, shape) = &forms[side];
                let request = request(&name, shape.clone(), temperature);
                let ms = step_ms(&pipeline, request).await?;
                if round > 0 {
                    steps[side].push(ms);
                }
            }
        }
        for ((form, _), own) in forms.iter().zip(&steps) {
            let ratios = own.iter().zip(&steps[0]).map(|(own, free)| own / free).collect();
            let least = own.iter().copied().fold(f64::MAX, f64::min);
            let most = own.iter().copied().fold(0.0, f64::max);
            println!(
                "{temperature:<12} {form:<12} {:>9.2} {:>8.3}  [{least:.2}, {most:.2}]",
                median(own.clone()),
                median(ratios)
            );
        }
    }
    Ok(())
}

/// Forms that no answer of this length comes to the end of.
fn forms() -> [(&'static str, Option<Shape>); 4] {
    let list = |items: Value| Shape::Json {
        schema: json!({"type": "array", "items": items, "minItems": 5000}),
        lenient: false,
    };
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "born": {"type": "string", "format": "date"},
            "likes": {"type": "array", "items": {"enum": ["tea", "rain", "walks"]}, "maxItems": 3},
        },
        "required": ["name", "age", "born", "likes"],
        "additionalProperties": false,
    });
    [
        ("free", None),
        ("schema", Some(list(person))),
        ("any JSON", Some(list(json!({})))),
        ("expression", Some(Shape::Regex("([A-Z][a-z]{2,9} ){5000}".to_owned()))),
    ]
}

fn request(model: &str, shape: Option<Shape>, temperature: f32) -> TextRequest {
    let (param, refusal) = ("form", String::new());
    TextRequest {
        n: ANSWERS,
        max_tokens: Some(TOKENS),
        ignore_eos: true,
        token_ids: true,
        format: shape.map(|shape| Format { shape, param, refusal }),
        sampling: SamplingOverrides {
            temperature: Some(temperature),
            seed: Some(7),
            ..SamplingOverrides::default()
        },
        ..TextRequest::new(model, Prompt::Text("Once upon a time".to_owned()))
    }
}

/// Milliseconds between tokens, over all answers together.
async fn step_ms(pipeline: &Pipeline, request: TextRequest) -> Result<f64, Failure> {
    let mut stream = pipeline.generate(request).await?;
    let (mut first, mut tokens) = (None, 0);
    while let Some(event) = stream.next().await {
        if let TextEvent::Tokens { ids, .. } = event? {
            first.get_or_insert_with(Instant::now);
            tokens += ids.len();
        }
    }
    assert_eq!(tokens, ANSWERS * TOKENS, "an answer came to an end");
    let took = first.ok_or("no token")?.elapsed();
    Ok(took.as_secs_f64() * 1e3 / (TOKENS - 1) as f64)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
