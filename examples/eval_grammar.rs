//! How much of the world's JSON schemas is enforced, and what a mask costs.
//!
//! ```text
//! cargo run --release --example eval_grammar -- [DATA [OUTPUTS]]
//! ```
//!
//! DATA (`../shared/data`) has `eval/jsonschemabench-maskbench/*.jsonl` and
//! `eval/json-schema-test-suite/*.json`: schemas with instances that are valid and some that are
//! not, `eval/llguidance/*.json`: what the compiler's makers say it accepts, and
//! `tokenizers/llama3/tokenizer.json`, a vocabulary of 128 k tokens. For every set it prints how
//! many schemas are accepted, how many of them that list refuses and how many it accepts that are
//! refused here, how many instances are judged right, how many answers of a random model come to an
//! end, and how long a mask takes. With OUTPUTS the answers are written there, one JSON object a
//! line with its schema, so that any validator can judge them.

use std::error::Error;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hearth::text::{
    Follower, Grammar, Next, Opening, Rules, Shape, Special, Tokenizer, Vocabulary,
};
use hearth_models::train::Rng;
use serde_json::{Value, json};

type Failure = Box<dyn Error>;

/// A random answer that is longer is given up.
const ANSWER_TOKENS_MAX: usize = 1500;

#[derive(Default)]
struct Tally {
    schemas: usize,
    accepted: usize,
    /// Otherwise than in the list: accepted here, refused here.
    other: [usize; 2],
    valid: [usize; 2],
    invalid: [usize; 2],
    ended: usize,
    masks: Vec<Duration>,
    compiled: Duration,
}

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let data = PathBuf::from(arguments.next().unwrap_or_else(|| "../shared/data".to_owned()));
    let mut outputs = arguments.next().map(File::create).transpose()?.map(BufWriter::new);
    let tokenizer = Tokenizer::from_file(&data.join("tokenizers/llama3/tokenizer.json"))?;
    let end = tokenizer.id_of("<|eot_id|>").ok_or("no <|eot_id|>")?;
    let began = Instant::now();
    let vocabulary = Vocabulary::new(&tokenizer, tokenizer.vocab_len(), &[end])?;
    println!("{} tokens, prepared in {:.2?}", tokenizer.vocab_len(), began.elapsed());
    println!(
        "{:<14} {:>7} {:>8} {:>5} {:>5} {:>6} {:>7} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "set",
        "schemas",
        "accepted",
        "more",
        "less",
        "valid",
        "invalid",
        "ended",
        "compile",
        "mask mean",
        "p50",
        "p99",
        "max",
    );
    let mut rng = Rng::new(7);
    for (set, cases) in sets(&data)? {
        let mut tally = Tally::default();
        for Case { schema, tests, listed } in cases {
            tally.schemas += 1;
            let began = Instant::now();
            let shape = Shape::Json { schema: schema.clone(), lenient: false };
            let compiled = vocabulary.compile(Rules::of(shape));
            match (listed, &compiled) {
                (Some(false), Ok(_)) => tally.other[0] += 1,
                (Some(true), Err(why)) => {
                    eprintln!("{set}: {why}: {schema}");
                    tally.other[1] += 1;
                }
                _ => {}
            }
            let Ok(grammar) = compiled else { continue };
            tally.compiled += began.elapsed();
            tally.accepted += 1;
            let grammar = Arc::new(grammar);
            for test in tests.as_array().into_iter().flatten() {
                let passed = passes(&grammar, &tokenizer, end, &test["data"].to_string())?;
                let valid = test["valid"] == true;
                let counts = if valid { &mut tally.valid } else { &mut tally.invalid };
                counts[0] += usize::from(passed == valid);
                counts[1] += 1;
            }
            if let Some(answer) = answer(&grammar, &tokenizer, end, &mut rng, &mut tally.masks) {
                tally.ended += 1;
                if let Some(out) = &mut outputs {
                    writeln!(out, "{}", json!({"set": set, "schema": schema, "text": answer}))?;
                }
            }
        }
        tally.print(&set);
    }
    Ok(())
}

/// A schema with instances that are valid or not.
struct Case {
    schema: Value,
    tests: Value,
    /// Whether the compiler's makers say that it accepts the schema, where they do.
    listed: Option<bool>,
}

/// Every set by its name.
fn sets(data: &Path) -> Result<Vec<(String, Vec<Case>)>, Failure> {
    let eval = data.join("eval");
    let json = |path: PathBuf| -> Result<Value, Failure> {
        Ok(serde_json::from_str(&fs::read_to_string(path)?)?)
    };
    let files = |folder: &str, ending: &str| -> Result<Vec<(String, PathBuf)>, Failure> {
        let paths = fs::read_dir(eval.join(folder))?.filter_map(|entry| Some(entry.ok()?.path()));
        let mut paths: Vec<_> =
            paths.filter(|path| path.extension().is_some_and(|e| e == ending)).collect();
        paths.sort();
        let name = |path: &PathBuf| path.file_stem().unwrap_or_default().to_string_lossy().into();
        Ok(paths.into_iter().map(|path| (name(&path), path)).collect())
    };
    let mut sets = Vec::new();
    let listed = json(eval.join("llguidance/expected_maskbench.json"))?;
    for (name, path) in files("jsonschemabench-maskbench", "jsonl")? {
        let mut cases = Vec::new();
        for line in fs::read_to_string(&path)?.lines() {
            let mut case: Value = serde_json::from_str(line)?;
            let known = listed[case["file"].as_str().unwrap_or_default()].as_object();
            let listed = known.map(|known| !known.contains_key("json_error"));
            cases.push(Case { schema: case["schema"].take(), tests: case["tests"].take(), listed });
        }
        sets.push((name, cases));
    }
    let listed = json(eval.join("llguidance/expected_json_schema_test_suite.json"))?;
    let mut cases = Vec::new();
    for (name, path) in files("json-schema-test-suite", "json")? {
        for case in json(path)?.as_array_mut().into_iter().flatten() {
            let about = case["description"].as_str().unwrap_or_default();
            let known = listed["draft2020-12"][&name][about].as_object();
            let refused = |said: &Value| said.as_str().is_some_and(|said| said.contains("compile"));
            let listed = known.map(|known| !known.values().any(refused));
            cases.push(Case { schema: case["schema"].take(), tests: case["tests"].take(), listed });
        }
    }
    sets.push(("Test suite".to_owned(), cases));
    Ok(sets)
}

impl Tally {
    fn print(mut self, name: &str) {
        let share = |[right, all]: [usize; 2]| 100.0 * right as f64 / all.max(1) as f64;
        self.masks.sort_unstable();
        let at = |share: f64| {
            let place = (self.masks.len().max(1) - 1) as f64 * share;
            self.masks.get(place as usize).copied().unwrap_or_default()
        };
        let mean = self.masks.iter().sum::<Duration>() / self.masks.len().max(1) as u32;
        println!(
            "{name:<14} {:>7} {:>7.1}% {:>5} {:>5} {:>5.1}% {:>6.1}% {:>5.1}% {:>9.1?} \
             {mean:>9.1?} {:>9.1?} {:>9.1?} {:>9.1?}",
            self.schemas,
            share([self.accepted, self.schemas]),
            self.other[0],
            self.other[1],
            share(self.valid),
            share(self.invalid),
            share([self.ended, self.accepted]),
            self.compiled / self.accepted.max(1) as u32,
            at(0.5),
            at(0.99),
            at(1.0),
        );
    }
}

fn allows(next: &Next, id: u32) -> bool {
    match next {
        Next::Any => true,
        Next::Only(words) => words[id as usize / 32] >> (id % 32) & 1 == 1,
        Next::End | Next::Failed(_) => false,
    }
}

/// The grammar lets a text pass as a whole answer.
fn passes(
    grammar: &Arc<Grammar>,
    tokenizer: &Tokenizer,
    end: u32,
    text: &str,
) -> Result<bool, Failure> {
    let mut follower = Follower::new(Arc::clone(grammar), Arc::new(Opening::default()));
    for id in tokenizer.encode(text, Special::NONE)? {
        if !allows(&follower.allowed(), id) {
            return Ok(false);
        }
        follower.push(id);
    }
    let next = follower.allowed();
    Ok(next == Next::End || allows(&next, end))
}

/// What a model says that knows nothing but likes to come to an end.
fn answer(
    grammar: &Arc<Grammar>,
    tokenizer: &Tokenizer,
    end: u32,
    rng: &mut Rng,
    masks: &mut Vec<Duration>,
) -> Option<String> {
    let mut follower = Follower::new(Arc::clone(grammar), Arc::new(Opening::default()));
    let closing: Vec<u32> = ["\"", "}", "]", "\"}", "\",", "]}", ":", "\":"]
        .iter()
        .filter_map(|text| tokenizer.id_of(text))
        .collect();
    let mut ids = Vec::new();
    while ids.len() < ANSWER_TOKENS_MAX {
        let began = Instant::now();
        let next = follower.allowed();
        masks.push(began.elapsed());
        let Next::Only(words) = &next else {
            return (next == Next::End).then(|| tokenizer.decode(&ids, true));
        };
        if allows(&next, end) {
            return Some(tokenizer.decode(&ids, true));
        }
        let liked: Vec<u32> = closing.iter().copied().filter(|&id| allows(&next, id)).collect();
        let id = match liked.is_empty() || rng.chance(0.3) {
            false => liked[rng.below(liked.len())],
            true => {
                let all: Vec<u32> = (0..32 * words.len() as u32)
                    .filter(|&id| words[id as usize / 32] >> (id % 32) & 1 == 1)
                    .collect();
                all[rng.below(all.len())]
            }
        };
        follower.push(id);
        ids.push(id);
    }
    None
}
