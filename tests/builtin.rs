//! The built-in model: that its corpus keeps its two splits apart, and that the model which the
//! binary carries means what it says. The floors are below the measured scores of the model card
//! by what a sample of this size may miss.

#![cfg(feature = "builtin-model")]

#[path = "../examples/builtin/mod.rs"]
mod builtin;

use std::collections::BTreeSet;
use std::sync::Arc;

use builtin::corpus::world::{Kind, Split, Words, World, is_held_out};
use builtin::corpus::{Conversation, Lang, Task, vary};
use builtin::score::{self, Score};
use builtin::{Encoder, NAME};
use hearth::config::RawConfig;
use hearth::pipeline::Pipeline;
use hearth::registry::{self, Registry, gguf_vocab};
use hearth::text::Tokenizer;
use hearth_kernels::Pool;
use hearth_models::Compute;
use hearth_models::train::Rng;
use serde_json::json;

fn pipeline() -> Pipeline {
    let file = registry::builtin::open().expect("the feature is on").expect("a model");
    let config = RawConfig::default().validate().expect("defaults");
    let compute = Compute::Fused(Arc::new(Pool::new(config.threads)));
    let model = registry::open(file).expect("understood");
    let model = model.load_alone(&compute, &config.plan).expect("it loads");
    assert_eq!(model.id(), NAME);
    Pipeline::new(Arc::new(Registry::of(vec![model.into()]).expect("a thread")))
}

/// Every pair of lists of a language.
fn pairs(lang: Lang) -> Vec<Words> {
    let words = lang.lexicon();
    let mut all = lang.phrasings();
    all.extend([words.jobs, words.foods, words.animals, words.things]);
    all.extend([words.spots, words.subjects, words.musics]);
    all
}

#[test]
fn words_and_phrasings_of_the_evaluation_are_not_for_training() {
    for lang in Lang::ALL {
        let all = pairs(lang);
        let train: BTreeSet<&str> = all.iter().flat_map(|(train, _)| *train).copied().collect();
        for text in all.iter().flat_map(|(_, eval)| *eval) {
            assert!(!train.contains(text), "{text:?} is in both");
        }
    }
}

#[test]
fn no_variation_of_a_phrasing_is_one_of_the_evaluation() {
    let mut rng = Rng::new(3);
    for lang in Lang::ALL {
        let all = lang.phrasings();
        let eval: BTreeSet<&str> = all.iter().flat_map(|(_, eval)| *eval).copied().collect();
        let (mut varied, mut count) = (0, 0);
        for template in all.iter().flat_map(|(train, _)| *train) {
            for _ in 0..200 {
                let text = vary::varied(&mut rng, lang, template);
                assert!(!eval.contains(text.as_str()), "{text:?}");
                (varied, count) = (varied + usize::from(text != *template), count + 1);
            }
        }
        assert!(varied * 4 > count, "{lang:?}: {varied} of {count}");
    }
}

#[test]
fn made_up_names_and_numbers_stand_on_their_side_of_the_wall() {
    let mut rng = Rng::new(1);
    let kinds = [Kind::Person, Kind::Place, Kind::Year, Kind::Price, Kind::Age, Kind::Code];
    for lang in Lang::ALL {
        for split in [Split::Train, Split::Eval] {
            let mut world = World { rng: &mut rng, lang, split };
            for kind in kinds {
                for _ in 0..200 {
                    let word = world.draw(kind);
                    assert_eq!(is_held_out(&word), split == Split::Eval, "{word}");
                }
            }
        }
    }
}

#[test]
fn the_template_writes_a_tool_call_as_the_corpus_does() {
    let file = registry::builtin::open().expect("the feature is on").expect("a model");
    let meta = file.weights().metadata().expect("GGUF");
    let tokenizer = Tokenizer::from_gguf(&gguf_vocab(meta).expect("vocabulary")).expect("BPE");
    let encoder = Encoder::new(tokenizer).expect("the template compiles");
    let mut spoken = Conversation::new(Task::Tool, Lang::English);
    spoken.exchange(
        "How is the weather in Rio?",
        concat!(
            "<tool_call>\n{\"name\": \"get_weather\", ",
            "\"arguments\": {\"city\": \"Rio\"}}\n</tool_call>"
        ),
    );
    for arguments in [json!({"city": "Rio"}), json!("{\"city\": \"Rio\"}")] {
        let mut structured = spoken.clone();
        structured.messages[1] = json!({"role": "assistant", "content": null, "tool_calls": [
            {"type": "function", "function": {"name": "get_weather", "arguments": arguments}},
        ]});
        assert_eq!(
            encoder.text(&structured).expect("rendered"),
            encoder.text(&spoken).expect("rendered")
        );
    }
}

#[test]
fn only_what_the_assistant_says_is_learned() {
    let file = registry::builtin::open().expect("the feature is on").expect("a model");
    let meta = file.weights().metadata().expect("GGUF");
    let tokenizer = Tokenizer::from_gguf(&gguf_vocab(meta).expect("vocabulary")).expect("BPE");
    let encoder = Encoder::new(tokenizer).expect("the template compiles");
    let tokenizer = Tokenizer::from_gguf(&gguf_vocab(meta).expect("vocabulary")).expect("BPE");
    let mut conversation = Conversation::new(Task::Talk, Lang::English);
    conversation.exchange("Hi", "Hello!");
    conversation.exchange("謝謝", "不客氣！");
    let example = encoder.example(&conversation, 0.0).expect("encoded");
    let learned: Vec<u32> = (example.tokens.iter().zip(&example.weights))
        .filter(|(_, weight)| **weight > 0.0)
        .map(|(token, _)| *token)
        .collect();
    assert_eq!(tokenizer.decode(&learned, false), "Hello!<|im_end|>不客氣！<|im_end|>");
}

#[test]
fn the_file_is_small_and_carries_its_template() {
    let bytes = registry::builtin::bytes().expect("the feature is on");
    assert!(bytes.len() <= 16 << 20, "{} bytes", bytes.len());
    let file = registry::builtin::open().expect("the feature is on").expect("a model");
    let template: &str =
        file.weights().metadata().expect("GGUF").get("tokenizer.chat_template").expect("text");
    assert_eq!(template, builtin::TEMPLATE);
}

/// Task, language, and the share of right answers below which something is broken.
const FLOORS: [(Task, Lang, f64); 14] = [
    (Task::Extract, Lang::English, 80.0),
    (Task::Extract, Lang::Chinese, 77.0),
    (Task::Choose, Lang::English, 87.0),
    (Task::Choose, Lang::Chinese, 87.0),
    (Task::Missing, Lang::English, 74.0),
    (Task::Missing, Lang::Chinese, 77.0),
    (Task::Json, Lang::English, 90.0),
    (Task::Json, Lang::Chinese, 87.0),
    (Task::Tool, Lang::English, 90.0),
    (Task::Tool, Lang::Chinese, 90.0),
    (Task::ToolResult, Lang::English, 90.0),
    (Task::Quiz, Lang::Chinese, 65.0),
    (Task::Classify, Lang::Chinese, 90.0),
    (Task::Repeat, Lang::Chinese, 82.0),
];

/// Right answers of a task in a language, in percent. 40 questions miss the score of the card by
/// 15 points once in a long while.
async fn percent(pipeline: &Pipeline, task: Task, lang: Lang) -> f64 {
    let answers = score::ask(pipeline, NAME, (task, lang, Split::Eval), 40).await.expect("answers");
    Score::of(&answers).right_percent()
}

#[tokio::test]
async fn it_means_what_it_says() {
    let pipeline = pipeline();
    for (task, lang, floor) in FLOORS {
        let right = percent(&pipeline, task, lang).await;
        assert!(right >= floor, "{task:?} in {lang:?}: {right:.0} %, not {floor} %");
    }
}
