//! Reading: answer from numbered passages and cite, choose the passage, say when it is not there,
//! make a quiz question.

use super::facts::Passages;
use super::world::{Words, World};
use super::{Conversation, Level, Phrase, Task};

/// How one language asks and answers.
pub struct Phrases {
    /// `{p}` passages, `{q}` the question.
    pub question: Words,
    pub missing: &'static str,
    pub which: Words,
    pub chosen: &'static str,
    pub quiz: Words,
    pub quiz_answer: &'static str,
    pub repeat: Words,
    pub list: Words,
    pub list_answer: &'static str,
    pub comma: &'static str,
    pub classify: Words,
    /// Label, sentences for training, sentences for the evaluation.
    pub topics: &'static [Labelled],
    pub moods: &'static [Labelled],
    /// `{x}` text, `{k}` keys, `{j}` JSON schema.
    pub json: Words,
    pub add: Words,
    pub subtract: Words,
    pub multiply: Words,
    pub weather: Words,
    pub time: Words,
    pub timer: Words,
    pub call: Words,
    pub search: Words,
    pub skies: &'static [&'static str],
    pub weather_answer: &'static str,
    pub time_answer: &'static str,
    pub done_answer: &'static str,
    pub search_answer: &'static str,
}

/// A label with its sentences.
pub type Labelled = (&'static str, &'static [&'static str], &'static [&'static str]);

/// Several questions about the same passages.
pub fn reading(world: &mut World<'_>, level: Level) -> Conversation {
    let hard = world.rng.chance(level);
    let (count, to) = if hard { (1 + world.rng.below(3), 3) } else { (1, 2) };
    let passages = Passages::new(world, count, 1, to);
    let mut conversation = Conversation::new(Task::Extract, world.lang);
    for turn in 0..3 + world.rng.below(6) {
        let task = match world.rng.below(20) {
            0..3 if level > 0.2 => Task::Choose,
            3..7 if level > 0.2 => Task::Missing,
            7..9 if level > 0.5 => Task::Quiz,
            _ => Task::Extract,
        };
        ask(world, &passages, task, turn == 0, &mut conversation);
    }
    conversation
}

/// One question, for the evaluation.
pub fn one(world: &mut World<'_>, task: Task) -> Conversation {
    let passages = Passages::new(world, 3, 1, 3);
    let mut conversation = Conversation::new(task, world.lang);
    ask(world, &passages, task, true, &mut conversation);
    conversation
}

fn ask(
    world: &mut World<'_>,
    passages: &Passages,
    task: Task,
    with_passages: bool,
    conversation: &mut Conversation,
) {
    let phrases = world.lang.phrases();
    let (fact, number) = passages.pick(world);
    let n = &number.to_string();
    let question = fact.question(world);
    let (text, answer) = match task {
        Task::Choose => {
            let text = world.phrase(phrases.which).fill(&[("{q}", &question)]);
            // What the passage says comes first: found once, the rest is told by its place.
            (text, phrases.chosen.fill(&[("{n}", n), ("{v}", &fact.value)]))
        }
        Task::Missing => (passages.unanswerable(world), phrases.missing.to_owned()),
        Task::Quiz => quiz(world, passages),
        _ => (question, format!("{} [{n}]", fact.value)),
    };
    let text = match with_passages {
        true => {
            let shown = passages.text(world.lang.space());
            world.phrase(phrases.question).fill(&[("{p}", &shown), ("{q}", &text)])
        }
        false => text,
    };
    conversation.exchange(&text, &answer);
}

/// The question is about the first fact of a passage, so that there is one right answer.
fn quiz(world: &mut World<'_>, passages: &Passages) -> (String, String) {
    let phrases = world.lang.phrases();
    let text = world.phrase(phrases.quiz);
    let passage = if text.contains("{n}") { world.rng.below(passages.0.len()) } else { 0 };
    let (fact, n) = (&passages.0[passage][0], &(passage + 1).to_string());
    let question = fact.relation.ask.0[0].fill(&[("{s}", &fact.subject)]);
    let slots = [("{q}", question.as_str()), ("{v}", &fact.value), ("{n}", n), ("{f}", &fact.text)];
    (text.fill(&[("{n}", n)]), phrases.quiz_answer.fill(&slots))
}
