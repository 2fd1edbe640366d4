//! The corpus of `hearth-tiny`: conversations put together from the grammars and word lists of
//! this folder, in two languages and two splits that share no name, number, object or phrasing.
//!
//! Deliberately absent: any text from elsewhere.

// Word lists are laid out by hand: one word to a line would hide them.
#[rustfmt::skip]
pub mod chinese;
#[rustfmt::skip]
pub mod english;
pub mod facts;
pub mod skills;
pub mod talk;
pub mod tasks;
pub mod vary;
pub mod world;

use hearth_models::train::Rng;
use serde_json::{Value, json};

use facts::Relation;
use talk::Talk;
use tasks::Phrases;
use world::{Lexicon, Split, Words, World};

/// A language.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Lang {
    English,
    Chinese,
}

impl Lang {
    pub const ALL: [Self; 2] = [Self::English, Self::Chinese];

    pub fn lexicon(self) -> &'static Lexicon {
        if self == Self::English { &english::LEXICON } else { &chinese::LEXICON }
    }

    pub fn relations(self) -> &'static [Relation] {
        if self == Self::English { english::RELATIONS } else { chinese::RELATIONS }
    }

    pub fn phrases(self) -> &'static Phrases {
        if self == Self::English { &english::PHRASES } else { &chinese::PHRASES }
    }

    pub fn talks(self) -> &'static [Talk] {
        if self == Self::English { english::TALKS } else { chinese::TALKS }
    }

    /// Every pair of lists of phrasings.
    pub fn phrasings(self) -> Vec<Words> {
        let phrases = self.phrases();
        let mut all = vec![
            phrases.question,
            phrases.which,
            phrases.quiz,
            phrases.repeat,
            phrases.list,
            phrases.classify,
            phrases.json,
            phrases.add,
            phrases.subtract,
            phrases.multiply,
            phrases.weather,
            phrases.time,
            phrases.timer,
            phrases.call,
            phrases.search,
        ];
        all.extend(self.relations().iter().flat_map(|r| [r.say, r.ask]));
        let labelled = phrases.topics.iter().chain(phrases.moods);
        all.extend(labelled.map(|(_, train, eval)| (*train, *eval)));
        all
    }

    /// Between sentences.
    pub fn space(self) -> &'static str {
        if self == Self::English { " " } else { "" }
    }
}

/// What a conversation exercises.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Task {
    Extract,
    Choose,
    Missing,
    Quiz,
    Json,
    Tool,
    ToolResult,
    Arithmetic,
    List,
    Classify,
    Repeat,
    Talk,
}

impl Task {
    /// Those that are measured.
    pub const SCORED: [Self; 11] = [
        Self::Extract,
        Self::Choose,
        Self::Missing,
        Self::Json,
        Self::Tool,
        Self::ToolResult,
        Self::Quiz,
        Self::Arithmetic,
        Self::List,
        Self::Classify,
        Self::Repeat,
    ];
}

/// Messages that end with the assistant's.
#[derive(Clone, Debug)]
pub struct Conversation {
    pub task: Task,
    pub lang: Lang,
    /// As the API has them.
    pub messages: Vec<Value>,
    pub tools: Option<Value>,
}

impl Conversation {
    pub fn new(task: Task, lang: Lang) -> Self {
        Self { task, lang, messages: Vec::new(), tools: None }
    }

    /// A question and its answer.
    pub fn exchange(&mut self, user: &str, assistant: &str) {
        self.say("user", user);
        self.say("assistant", assistant);
    }

    pub fn say(&mut self, role: &str, content: &str) {
        self.messages.push(json!({"role": role, "content": content}));
    }

    /// Without its last message, and that message's text: a question for a model and the answer
    /// that is expected.
    pub fn split_last(&self) -> (&[Value], &str) {
        let (last, rest) = self.messages.split_last().expect("it is never empty; this is a bug");
        (rest, last["content"].as_str().unwrap_or_default())
    }
}

/// Fills `{x}` slots.
pub trait Phrase {
    fn fill(&self, slots: &[(&str, &str)]) -> String;
}

impl Phrase for str {
    fn fill(&self, slots: &[(&str, &str)]) -> String {
        let mut out = String::new();
        let mut rest = self;
        while let Some(start) = rest.find('{') {
            let slot = slots.iter().find(|(name, _)| rest[start..].starts_with(name));
            out.push_str(&rest[..start]);
            match slot {
                Some((name, text)) => {
                    out.push_str(text);
                    rest = &rest[start + name.len()..];
                }
                None => {
                    out.push('{');
                    rest = &rest[start + 1..];
                }
            }
        }
        out + rest
    }
}

/// How hard: grows from 0 to 1 over the first part of the training.
pub type Level = f64;

/// One conversation for training.
pub fn training(rng: &mut Rng, level: Level) -> Conversation {
    let lang = if rng.chance(0.6) { Lang::English } else { Lang::Chinese };
    let mut world = World { rng, lang, split: Split::Train };
    let mut draw = world.rng.unit();
    let mut is = |share: f64| {
        draw -= share;
        draw < 0.0
    };
    let easy = 1.0 - level;
    let mut conversation = match () {
        () if is(0.04 + 0.4 * easy) => skills::repeat(&mut world),
        () if is(0.04 * (1.0 - easy)) => skills::arithmetic(&mut world),
        () if is(0.04) => skills::list(&mut world),
        () if is(0.05) => skills::classify(&mut world),
        () if is(0.12) => skills::json(&mut world),
        () if is(0.10) => skills::tool(&mut world, None),
        () if is(0.04) => talk::talk(&mut world),
        () => tasks::reading(&mut world, level),
    };
    if rng.chance(0.2) && conversation.tools.is_none() {
        let text = match lang {
            Lang::English => "You are a helpful assistant.",
            Lang::Chinese => "你是有用的助理。",
        };
        conversation.messages.insert(0, json!({"role": "system", "content": text}));
    }
    conversation
}

/// One question of a task, from either side of the wall.
pub fn question(rng: &mut Rng, (lang, task): (Lang, Task), split: Split) -> Conversation {
    let world = &mut World { rng, lang, split };
    match task {
        Task::Extract | Task::Choose | Task::Missing | Task::Quiz => tasks::one(world, task),
        Task::Json => skills::json(world),
        Task::Tool | Task::ToolResult => skills::tool(world, Some(task)),
        Task::Arithmetic => skills::arithmetic(world),
        Task::List => skills::list(world),
        Task::Classify => skills::classify(world),
        Task::Repeat => skills::repeat(world),
        Task::Talk => talk::talk(world),
    }
}
