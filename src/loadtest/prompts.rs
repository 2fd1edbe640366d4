//! What is asked: lines of a file, or made-up text of a given length.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Value, json};

use super::LoadTestError;
use super::arrivals::Dice;

/// Words of made-up prompts: common, so that most tokenizers have a token for each.
const WORDS: &str = "time year people way day man thing woman life child world school state family \
    student group country problem hand part place case week company system program question work \
    number night point home water room mother area money story fact month lot right study book eye \
    job word business issue side kind head house service friend father power hour game line end";

/// One request's question.
#[derive(Clone, Debug, PartialEq)]
pub struct Prompt {
    /// An array of messages, or a string.
    pub content: Content,
    /// Tokens of the answer, where the file says it.
    pub max_tokens: Option<usize>,
}

/// In which form a prompt is given.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text; a message of the user for a chat.
    Text(String),
    /// Messages, as the API has them.
    Messages(Value),
}

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompts {
    /// Made up: every one another, of as many words.
    Synthetic {
        /// Words of each.
        words: usize,
        /// Same seed, same prompts.
        seed: u64,
    },
    /// Of a file, in turn.
    Listed(Vec<Prompt>),
}

impl Prompts {
    /// Reads a file with one JSON object a line: `{"prompt": "..."}` or `{"messages": [...]}`, and
    /// `"max_tokens"` where it is to differ. Other keys are not looked at.
    pub fn read(path: &Path) -> Result<Self, LoadTestError> {
        let name = path.display().to_string();
        let wrong = |path: String, why: String| LoadTestError::Prompts { path, why };
        let text = std::fs::read_to_string(path).map_err(|e| wrong(name.clone(), e.to_string()))?;
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let read =
            |(no, line)| prompt(line).map_err(|why| wrong(format!("{name}, line {no}"), why));
        let prompts = lines.map(read).collect::<Result<Vec<_>, _>>()?;
        match prompts.is_empty() {
            true => Err(wrong(name, "it holds no prompt".to_owned())),
            false => Ok(Self::Listed(prompts)),
        }
    }

    /// Number `index`, of as many as anybody asks for.
    pub fn get(&self, index: usize) -> Prompt {
        match self {
            Self::Listed(prompts) => prompts[index % prompts.len()].clone(),
            Self::Synthetic { words, seed } => {
                let mut dice = Dice::new(seed.wrapping_mul(0x1_0000_0001) ^ index as u64);
                // Two neighbouring seeds would else begin alike.
                dice.number();
                let all: Vec<&str> = WORDS.split_whitespace().collect();
                let text: Vec<&str> = (0..*words).map(|_| all[dice.below(all.len())]).collect();
                Prompt { content: Content::Text(text.join(" ")), max_tokens: None }
            }
        }
    }
}

fn prompt(line: &str) -> Result<Prompt, String> {
    #[derive(Deserialize)]
    struct Line {
        prompt: Option<String>,
        messages: Option<Value>,
        max_tokens: Option<usize>,
    }
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    let content = match (line.prompt, line.messages) {
        (Some(text), None) => Content::Text(text),
        (None, Some(messages @ Value::Array(_))) => Content::Messages(messages),
        _ => return Err("expected either `prompt`, a string, or `messages`, an array".to_owned()),
    };
    Ok(Prompt { content, max_tokens: line.max_tokens })
}

impl Content {
    /// As messages of a chat.
    pub(super) fn messages(&self) -> Value {
        match self {
            Self::Text(text) => json!([{"role": "user", "content": text}]),
            Self::Messages(messages) => messages.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Prompts, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, text).unwrap();
        Prompts::read(&path).map_err(|e| e.to_string())
    }

    #[test]
    fn a_file_is_read_line_by_line_and_goes_round() {
        let prompts =
            read("{\"prompt\": \"a\", \"id\": 1}\n\n{\"messages\": [], \"max_tokens\": 3}");
        let prompts = prompts.unwrap();
        let first = Prompt { content: Content::Text("a".into()), max_tokens: None };
        let second = Prompt { content: Content::Messages(json!([])), max_tokens: Some(3) };
        assert_eq!(
            [prompts.get(0), prompts.get(1), prompts.get(2)],
            [first.clone(), second, first]
        );
        for (text, words) in [
            ("{\"prompt\": \"a\"}\n{\"prompt\"", "line 2"),
            ("{\"prompt\": \"a\", \"messages\": []}", "either"),
            ("{\"messages\": \"a\"}", "array"),
            ("{\"text\": \"a\"}", "line 1"),
            ("\n", "no prompt"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(words) && error.contains("prompts.jsonl"), "{error}");
        }
    }

    #[test]
    fn made_up_prompts_differ_and_repeat_with_their_seed() {
        let text = |seed, index| match (Prompts::Synthetic { words: 40, seed }).get(index).content {
            Content::Text(text) => text,
            other => panic!("{other:?}"),
        };
        assert_eq!(text(1, 5).split(' ').count(), 40);
        assert_eq!(text(1, 5), text(1, 5));
        let different: std::collections::BTreeSet<String> =
            (0..100).map(|i| text(1, i)).chain((0..100).map(|i| text(2, i))).collect();
        assert_eq!(different.len(), 200);
    }
}
