//! Short skills: repeat, sums, lists, labels, JSON, tools.

use serde_json::{Map, Value, json};

use super::facts::{Fact, Relation};
use super::tasks::Labelled;
use super::world::{Kind, Split, Words, World, is_held_out};
use super::{Conversation, Phrase, Task};

/// Say it again.
pub fn repeat(world: &mut World<'_>) -> Conversation {
    let mut conversation = Conversation::new(Task::Repeat, world.lang);
    let (turns, most) = if world.split == Split::Eval { (1, 5) } else { (2, 9) };
    for _ in 0..turns {
        let kinds = [Kind::Person, Kind::Place, Kind::Code, Kind::Price, Kind::Thing, Kind::Food];
        let words: Vec<String> = (0..2 + world.rng.below(most))
            .map(|_| {
                let kind = kinds[world.rng.below(kinds.len())];
                world.draw(kind)
            })
            .collect();
        let text = words.join(" ");
        let phrase = world.phrase(world.lang.phrases().repeat);
        conversation.exchange(&phrase.fill(&[("{x}", &text)]), &text);
    }
    conversation
}

/// Sums in small numbers; which pairs of numbers are held out is a matter of their hash.
pub fn arithmetic(world: &mut World<'_>) -> Conversation {
    let phrases = world.lang.phrases();
    let mut conversation = Conversation::new(Task::Arithmetic, world.lang);
    for _ in 0..if world.split == Split::Eval { 1 } else { 4 } {
        let (words, a, b, result) = loop {
            let (words, sign, a, b, result) = match world.rng.below(3) {
                0 => {
                    let (a, b) = (world.rng.below(50), world.rng.below(50));
                    (phrases.add, '+', a, b, a + b)
                }
                1 => {
                    let a = world.rng.below(50);
                    let b = world.rng.below(a + 1);
                    (phrases.subtract, '-', a, b, a - b)
                }
                _ => {
                    let (a, b) = (world.rng.below(10), world.rng.below(10));
                    (phrases.multiply, '*', a, b, a * b)
                }
            };
            if is_held_out(&format!("{a}{sign}{b}")) == (world.split == Split::Eval) {
                break (words, a, b, result);
            }
        };
        let text = world.phrase(words);
        let text = text.fill(&[("{a}", &a.to_string()), ("{b}", &b.to_string())]);
        conversation.exchange(&text, &result.to_string());
    }
    conversation
}

/// A list in one sentence.
pub fn list(world: &mut World<'_>) -> Conversation {
    let phrases = world.lang.phrases();
    let mut conversation = Conversation::new(Task::List, world.lang);
    for _ in 0..if world.split == Split::Eval { 1 } else { 2 } {
        let kinds = [Kind::Thing, Kind::Food, Kind::Animal, Kind::Person];
        let kind = kinds[world.rng.below(kinds.len())];
        let count = 3 + world.rng.below(4);
        let words = world.draw_many(kind, count);
        let text = world.phrase(phrases.list).fill(&[("{x}", &words.join(phrases.comma))]);
        let n = words.len().to_string();
        let slots = [("{n}", n.as_str()), ("{a}", &words[0]), ("{z}", &words[words.len() - 1])];
        conversation.exchange(&text, &phrases.list_answer.fill(&slots));
    }
    conversation
}

/// One of several labels.
pub fn classify(world: &mut World<'_>) -> Conversation {
    let phrases = world.lang.phrases();
    let mut conversation = Conversation::new(Task::Classify, world.lang);
    for _ in 0..if world.split == Split::Eval { 1 } else { 3 } {
        let classes: &'static [Labelled] =
            if world.rng.chance(0.5) { phrases.topics } else { phrases.moods };
        let mut order: Vec<usize> = (0..classes.len()).collect();
        world.rng.shuffle(&mut order);
        order.truncate(2 + world.rng.below(classes.len() - 1));
        let (label, train, eval) = classes[order[world.rng.below(order.len())]];
        let labels: Vec<&str> = order.iter().map(|&i| classes[i].0).collect();
        let mut text = world.phrase((train, eval));
        let kinds = [Kind::Food, Kind::Animal, Kind::Music, Kind::Place, Kind::Thing];
        for (slot, kind) in ["{1}", "{2}", "{3}", "{4}", "{5}"].into_iter().zip(kinds) {
            if text.contains(slot) {
                text = text.fill(&[(slot, &world.draw(kind))]);
            }
        }
        let asked = world.phrase(phrases.classify);
        conversation
            .exchange(&asked.fill(&[("{l}", &labels.join(phrases.comma)), ("{x}", &text)]), label);
    }
    conversation
}

/// A sentence or two to JSON.
pub fn json(world: &mut World<'_>) -> Conversation {
    let mut conversation = Conversation::new(Task::Json, world.lang);
    let subject = world.draw(Kind::Person);
    let relations: Vec<&'static Relation> =
        world.lang.relations().iter().filter(|r| r.about == Kind::Person).collect();
    let mut order: Vec<usize> = (0..relations.len()).collect();
    world.rng.shuffle(&mut order);
    order.truncate(1 + world.rng.below(3));
    let facts: Vec<Fact> =
        order.iter().map(|&i| Fact::of(world, relations[i], subject.clone())).collect();
    let texts: Vec<&str> = facts.iter().map(|f| f.text.as_str()).collect();
    let mut fields: Vec<(&str, Value)> = vec![("name", Value::from(subject))];
    for fact in &facts {
        let number = matches!(fact.relation.value, Kind::Age | Kind::Year);
        let value = match fact.value.parse::<u64>() {
            Ok(n) if number => Value::from(n),
            _ => Value::from(fact.value.as_str()),
        };
        fields.push((fact.relation.key, value));
    }
    world.rng.shuffle(&mut fields);
    let kept = 1 + world.rng.below(fields.len());
    fields.truncate(kept.max(2));
    let keys: Vec<&str> = fields.iter().map(|(key, _)| *key).collect();
    let asked = world.phrase(world.lang.phrases().json).fill(&[
        ("{x}", &texts.join(world.lang.space())),
        ("{k}", &keys.join(", ")),
        ("{j}", &spaced(&schema(&fields))),
    ]);
    let object: Map<String, Value> = fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    conversation.exchange(&asked, &spaced(&Value::Object(object)));
    conversation
}

fn schema(fields: &[(&str, Value)]) -> Value {
    let kind = |v: &Value| if v.is_number() { "integer" } else { "string" };
    let properties: Map<String, Value> =
        fields.iter().map(|(k, v)| ((*k).to_owned(), json!({"type": kind(v)}))).collect();
    json!({"type": "object", "properties": properties})
}

struct ToolKind {
    name: &'static str,
    description: &'static str,
    argument: &'static str,
    integer: bool,
    value: Kind,
}

const TOOLS: [ToolKind; 5] = [
    ToolKind {
        name: "get_weather",
        description: "Weather of a place",
        argument: "city",
        integer: false,
        value: Kind::Place,
    },
    ToolKind {
        name: "get_time",
        description: "Time in a place",
        argument: "city",
        integer: false,
        value: Kind::Place,
    },
    ToolKind {
        name: "set_timer",
        description: "Start a timer",
        argument: "minutes",
        integer: true,
        value: Kind::Age,
    },
    ToolKind {
        name: "call_person",
        description: "Call somebody",
        argument: "name",
        integer: false,
        value: Kind::Person,
    },
    ToolKind {
        name: "search",
        description: "Search for something",
        argument: "query",
        integer: false,
        value: Kind::Thing,
    },
];

/// A request that needs a tool, the call, its result, the answer. For the evaluation it ends with
/// the call, or with the answer.
pub fn tool(world: &mut World<'_>, only: Option<Task>) -> Conversation {
    let phrases = world.lang.phrases();
    let mut conversation = Conversation::new(only.unwrap_or(Task::Tool), world.lang);
    let mut order: Vec<usize> = (0..TOOLS.len()).collect();
    world.rng.shuffle(&mut order);
    order.truncate(if world.rng.chance(0.3) { 3 } else { 2 });
    let offered: Vec<Value> = order.iter().map(|&i| definition(&TOOLS[i])).collect();
    conversation.tools = Some(Value::Array(offered));
    let turns = if only.is_some() { 1 } else { 2 };
    for _ in 0..turns {
        let chosen = order[world.rng.below(order.len())];
        let tool = &TOOLS[chosen];
        let argument = world.draw(tool.value);
        let asks: [Words; 5] =
            [phrases.weather, phrases.time, phrases.timer, phrases.call, phrases.search];
        let asked = world.phrase(asks[chosen]).fill(&[("{x}", &argument)]);
        let value = match (tool.integer, argument.parse::<u64>()) {
            (true, Ok(n)) => Value::from(n),
            _ => Value::from(argument.as_str()),
        };
        let call = json!({"name": tool.name, "arguments": {tool.argument: value}});
        conversation.exchange(&asked, &format!("<tool_call>\n{}\n</tool_call>", spaced(&call)));
        if only == Some(Task::Tool) {
            break;
        }
        let (result, answer) = match chosen {
            0 => (world.rng.pick(phrases.skies).to_owned(), phrases.weather_answer),
            1 => (
                format!("{}:{}", 10 + world.rng.below(14), 10 + world.rng.below(50)),
                phrases.time_answer,
            ),
            4 => {
                let thing = world.draw(Kind::Thing);
                (Fact::about(world, Kind::Thing, thing).text, phrases.search_answer)
            }
            _ => ("ok".to_owned(), phrases.done_answer),
        };
        conversation.say("tool", &result);
        let answer = answer.fill(&[("{x}", &argument), ("{v}", &result)]);
        conversation.say("assistant", &answer);
    }
    conversation
}

fn definition(tool: &ToolKind) -> Value {
    let kind = if tool.integer { "integer" } else { "string" };
    let parameters = json!({
        "type": "object",
        "properties": {tool.argument: {"type": kind}},
        "required": [tool.argument],
    });
    json!({"type": "function", "function": {
        "name": tool.name, "description": tool.description, "parameters": parameters,
    }})
}

/// JSON with a space behind commas and colons, as Python writes it and as templates print it.
pub fn spaced(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let fields: Vec<String> = map
                .iter()
                .map(|(k, v)| format!("{}: {}", Value::from(k.as_str()), spaced(v)))
                .collect();
            format!("{{{}}}", fields.join(", "))
        }
        Value::Array(list) => {
            format!("[{}]", list.iter().map(spaced).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}
