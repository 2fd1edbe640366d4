//! Phrasings of training with a word more, a word less or another word: a few lists of templates
//! are soon known by heart, and then nothing carries over to one that is not in them.
//!
//! A variation that happens to be a phrasing of the evaluation is drawn anew.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use hearth_models::train::Rng;

use super::Lang;
use super::world::syllables;

/// Share of phrasings that stay as they are listed.
const PLAIN: f64 = 0.4;
/// Share of added words that nobody knows.
const UNKNOWN: f64 = 0.25;

/// Words that say little, for between two others.
const FILLERS: [&str; 18] = [
    "still",
    "also",
    "again",
    "really",
    "often",
    "always",
    "once",
    "mostly",
    "surely",
    "perhaps",
    "maybe",
    "truly",
    "by now",
    "in fact",
    "of course",
    "today",
    "then",
    "just",
];
/// The same in Chinese.
const CHINESE_FILLERS: [&str; 16] = [
    "真的", "一直", "也", "還", "又", "常常", "大概", "果然", "原來", "應該", "早就", "同樣",
    "總是", "目前", "好像", "已經",
];
/// Characters that a Chinese filler may stand before.
const CHINESE_VERBS: &str = "是在有住用賣喜讀學養會當搬";
/// Characters that a Chinese sentence can be understood without.
const CHINESE_PARTICLES: &str = "的了一個是在";

/// One for the other, in English; which is which does not matter.
const ALIKE: [(&str, &str); 14] = [
    ("Tell", "Show"),
    ("Tell", "Give"),
    ("Which", "What"),
    ("What", "Which"),
    ("the", "this"),
    ("the", "that"),
    ("the", "my"),
    ("Please", "Kindly"),
    ("is", "was"),
    ("is", "seems"),
    ("does", "did"),
    ("has", "had"),
    ("can", "may"),
    ("right", "correct"),
];

/// What stands in a slot is quoted as it is, so nothing is added beside these.
const PAYLOADS: [&str; 8] = ["{x}", "{p}", "{q}", "{l}", "{k}", "{j}", "{a}", "{v}"];

/// A template, or one much like it that no evaluation asks with.
pub fn varied(rng: &mut Rng, lang: Lang, template: &str) -> String {
    loop {
        let text = match (rng.unit(), lang) {
            (draw, _) if draw < PLAIN => template.to_owned(),
            (_, Lang::English) => english(rng, template),
            (_, Lang::Chinese) => chinese(rng, template),
        };
        if !held_out(lang).contains(text.as_str()) {
            return text;
        }
    }
}

/// Words go in, out or into others; the first stays first and the last keeps its stop.
fn english(rng: &mut Rng, template: &str) -> String {
    let mut words: Vec<String> = template.split(' ').map(str::to_owned).collect();
    let payload = |word: &str| PAYLOADS.iter().any(|slot| word.contains(slot));
    for _ in 0..1 + rng.below(2) {
        let at = rng.below(words.len());
        match rng.below(5) {
            0 if !words[at].contains(['{', '.', '?', ':', '\n']) && words.len() > 3 => {
                words.remove(at);
            }
            1 | 2 => {
                let alike = ALIKE.iter().filter(|(from, _)| words[at] == *from);
                let alike: Vec<&str> = alike.map(|(_, to)| *to).collect();
                if !alike.is_empty() {
                    words[at] = rng.pick(&alike).to_owned();
                }
            }
            _ if at > 0 && !payload(&words[at]) && !payload(&words[at - 1]) => {
                let word = match rng.chance(UNKNOWN) {
                    true => syllables(rng, 1, 2),
                    false => rng.pick(&FILLERS).to_owned(),
                };
                words.insert(at, word);
            }
            _ => {}
        }
    }
    words.join(" ")
}

/// A filler before a verb, or a particle less. Slots are not entered.
fn chinese(rng: &mut Rng, template: &str) -> String {
    let places = |of: &str| -> Vec<(usize, char)> {
        let mut inside = false;
        let free = |&(_, c): &(usize, char)| {
            inside = (inside || c == '{') && c != '}';
            !inside && of.contains(c)
        };
        template.char_indices().filter(free).collect()
    };
    let (verbs, particles) = (places(CHINESE_VERBS), places(CHINESE_PARTICLES));
    let mut text = template.to_owned();
    if !particles.is_empty() && rng.chance(0.3) {
        let (at, c) = particles[rng.below(particles.len())];
        text.replace_range(at..at + c.len_utf8(), "");
    } else if let Some(&(at, _)) = verbs.first() {
        text.insert_str(at, rng.pick(&CHINESE_FILLERS));
    }
    text
}

/// Every phrasing that the evaluation of a language uses.
fn held_out(lang: Lang) -> &'static BTreeSet<&'static str> {
    static SETS: [OnceLock<BTreeSet<&str>>; 2] = [OnceLock::new(), OnceLock::new()];
    SETS[lang as usize].get_or_init(|| lang.phrasings().iter().flat_map(|p| p.1).copied().collect())
}
