//! Small worlds of facts: who or what, which relation, which value, said in a sentence.

use super::Phrase;
use super::world::{Kind, Words, World};

/// A kind of fact.
pub struct Relation {
    /// Its name in JSON.
    pub key: &'static str,
    pub about: Kind,
    pub value: Kind,
    /// Statements; `{s}` is the subject, `{v}` the value.
    pub say: Words,
    /// Questions about the value.
    pub ask: Words,
}

/// One fact of a passage.
pub struct Fact {
    pub relation: &'static Relation,
    pub subject: String,
    pub value: String,
    /// It as a sentence.
    pub text: String,
}

/// Facts in passages.
pub struct Passages(pub Vec<Vec<Fact>>);

impl Passages {
    /// `count` passages of `from..=to` facts each. Every passage has one or two subjects; no two
    /// facts share subject and relation, and values of one relation differ.
    pub fn new(world: &mut World<'_>, count: usize, from: usize, to: usize) -> Self {
        let mut passages: Vec<Vec<Fact>> = Vec::new();
        while passages.len() < count {
            let kind = if world.rng.chance(0.6) { Kind::Person } else { Kind::Thing };
            let subject_count = 1 + world.rng.below(2);
            let subjects = world.draw_many(kind, subject_count);
            let mut facts: Vec<Fact> = Vec::new();
            let wanted = from + world.rng.below(to - from + 1);
            // A subject or a value that is taken already is drawn anew, but not for ever.
            for _ in 0..4 * wanted {
                let subject = subjects[facts.len() % subjects.len()].clone();
                let fact = Fact::about(world, kind, subject);
                let clash = |f: &Fact| {
                    f.relation.key == fact.relation.key
                        && (f.subject == fact.subject || f.value == fact.value)
                        || f.value == fact.subject
                };
                let mut known = passages.iter().flatten().chain(&facts);
                if facts.len() < wanted && !known.any(clash) {
                    facts.push(fact);
                }
            }
            if !facts.is_empty() {
                passages.push(facts);
            }
        }
        Self(passages)
    }

    /// As they stand in a message.
    pub fn text(&self, space: &str) -> String {
        let passage = |(i, facts): (usize, &Vec<Fact>)| {
            let texts: Vec<&str> = facts.iter().map(|f| f.text.as_str()).collect();
            format!("[{}] {}", i + 1, texts.join(space))
        };
        self.0.iter().enumerate().map(passage).collect::<Vec<_>>().join("\n")
    }

    /// A question with its answer and the number of the passage.
    pub fn pick(&self, world: &mut World<'_>) -> (&Fact, usize) {
        let passage = world.rng.below(self.0.len());
        let facts = &self.0[passage];
        (&facts[world.rng.below(facts.len())], passage + 1)
    }

    /// A question that nothing here answers: about a subject or a relation of these passages, so
    /// that it looks as if it had an answer.
    pub fn unanswerable(&self, world: &mut World<'_>) -> String {
        loop {
            let (near, _) = self.pick(world);
            let kind = near.relation.about;
            let (subject, relation) = match world.rng.chance(0.5) {
                true => (near.subject.clone(), relation_about(world, kind)),
                false => (world.draw(kind), near.relation),
            };
            let known = |f: &Fact| f.subject == subject && f.relation.key == relation.key;
            if !self.0.iter().flatten().any(known) {
                return ask(world, relation, &subject);
            }
        }
    }
}

impl Fact {
    /// Something about a subject of this kind.
    pub fn about(world: &mut World<'_>, kind: Kind, subject: String) -> Self {
        let relation = relation_about(world, kind);
        Self::of(world, relation, subject)
    }

    /// One relation of a subject.
    pub fn of(world: &mut World<'_>, relation: &'static Relation, subject: String) -> Self {
        let value = world.draw(relation.value);
        let text = world.phrase(relation.say).fill(&[("{s}", &subject), ("{v}", &value)]);
        let text = world.opened(world.lang.lexicon().statement_openers, text);
        Self { relation, subject, value, text: sentence(&text) }
    }

    /// A question that it answers.
    pub fn question(&self, world: &mut World<'_>) -> String {
        ask(world, self.relation, &self.subject)
    }
}

fn ask(world: &mut World<'_>, relation: &Relation, subject: &str) -> String {
    let text = world.phrase(relation.ask).fill(&[("{s}", subject)]);
    world.opened(world.lang.lexicon().question_openers, text)
}

fn relation_about(world: &mut World<'_>, kind: Kind) -> &'static Relation {
    let relations = world.lang.relations();
    loop {
        let relation = &relations[world.rng.below(relations.len())];
        if relation.about == kind {
            return relation;
        }
    }
}

/// With a capital at its start.
fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |c| c.to_uppercase().chain(letters).collect())
}
