//! Names, numbers and things: what fills the templates, with a wall between the two splits.
//!
//! Made-up words (names, places, codes, numbers) are split by a hash: one in eight belongs to the
//! evaluation and is never drawn for training. Listed words (jobs, food, ...) have two lists.
//! Days and colours are closed classes and common to both.

use hearth_models::train::Rng;

use super::{Lang, vary};

/// Which side of the wall.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// For learning.
    Train,
    /// For measuring.
    Eval,
}

/// What kind of thing a slot takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Person,
    Place,
    Job,
    Food,
    Animal,
    Thing,
    Spot,
    Subject,
    Music,
    Colour,
    Day,
    Year,
    Price,
    Age,
    Code,
}

/// A listed class: words for training, words for the evaluation.
pub type Words = (&'static [&'static str], &'static [&'static str]);

/// The words of one language.
pub struct Lexicon {
    pub jobs: Words,
    pub foods: Words,
    pub animals: Words,
    pub things: Words,
    pub spots: Words,
    pub subjects: Words,
    pub musics: Words,
    pub colours: &'static [&'static str],
    pub days: &'static [&'static str],
    /// What a statement of training may begin with.
    pub statement_openers: &'static [&'static str],
    /// What a question of training may begin with.
    pub question_openers: &'static [&'static str],
}

impl Lexicon {
    /// Whether a word is listed for the evaluation: nobody makes it up by chance.
    fn holds_out(&self, word: &str) -> bool {
        let classes = [self.jobs, self.foods, self.animals, self.things, self.spots, self.subjects];
        classes.iter().chain([&self.musics]).any(|(_, eval)| eval.contains(&word))
    }
}

/// A source of words for one conversation.
pub struct World<'a> {
    pub rng: &'a mut Rng,
    pub lang: Lang,
    pub split: Split,
}

/// Share of listed words that training replaces by made-up ones, so that copying is learned and
/// not the list.
const MADE_UP: f64 = 0.7;

/// Share of made-up Chinese characters that come from the whole of the script: most of them are no
/// token of their own, and copying has to be learned byte by byte too.
const ANY_CHARACTER: f64 = 0.25;

/// Share of training sentences that begin with a few words more, so that an unknown phrasing is
/// nothing new.
const OPENED: f64 = 0.3;

impl World<'_> {
    /// A filling for a slot.
    pub fn draw(&mut self, kind: Kind) -> String {
        let lexicon = self.lang.lexicon();
        match kind {
            Kind::Person => self.apart(Self::person),
            Kind::Place => self.apart(Self::place),
            Kind::Job => self.listed(lexicon.jobs),
            Kind::Food => self.listed(lexicon.foods),
            Kind::Animal => self.listed(lexicon.animals),
            Kind::Thing => self.listed(lexicon.things),
            Kind::Spot => self.listed(lexicon.spots),
            Kind::Subject => self.listed(lexicon.subjects),
            Kind::Music => self.listed(lexicon.musics),
            Kind::Colour => self.rng.pick(lexicon.colours).to_owned(),
            Kind::Day => self.rng.pick(lexicon.days).to_owned(),
            Kind::Year => self.apart(|w| (1900 + w.rng.below(130)).to_string()),
            Kind::Price => self.apart(|w| (11 + w.rng.below(989)).to_string()),
            Kind::Age => self.apart(|w| (11 + w.rng.below(89)).to_string()),
            Kind::Code => self.apart(Self::code),
        }
    }

    /// Several fillings, all different; fewer when the class has no more.
    pub fn draw_many(&mut self, kind: Kind, count: usize) -> Vec<String> {
        let mut all: Vec<String> = Vec::new();
        for _ in 0..16 * count {
            let word = self.draw(kind);
            if all.len() < count && !all.contains(&word) {
                all.push(word);
            }
        }
        all
    }

    /// One of the phrasings of this split; one of training may be varied.
    pub fn phrase(&mut self, (train, eval): Words) -> String {
        match self.split {
            Split::Eval => self.rng.pick(eval).to_owned(),
            Split::Train => {
                let text = self.rng.pick(train);
                vary::varied(self.rng, self.lang, text)
            }
        }
    }

    /// One of the words of this split.
    fn word(&mut self, (train, eval): Words) -> String {
        let list = if self.split == Split::Eval { eval } else { train };
        self.rng.pick(list).to_owned()
    }

    /// Draws until the word is on this side of the wall.
    fn apart(&mut self, mut draw: impl FnMut(&mut Self) -> String) -> String {
        loop {
            let word = draw(self);
            let listed = self.lang.lexicon().holds_out(&word);
            if !listed && is_held_out(&word) == (self.split == Split::Eval) {
                return word;
            }
        }
    }

    fn listed(&mut self, words: Words) -> String {
        if self.split == Split::Train && self.rng.chance(MADE_UP) {
            return match self.lang {
                Lang::English => self.apart(|w| match w.rng.chance(0.2) {
                    true => w.letters(),
                    false => w.syllables(1, 3),
                }),
                Lang::Chinese => self.apart(|w| w.characters(1, 3)),
            };
        }
        self.word(words)
    }

    fn person(&mut self) -> String {
        match self.lang {
            Lang::English => {
                let first = capitalised(&self.syllables(1, 3));
                match self.rng.chance(0.3) {
                    true => format!("{first} {}", capitalised(&self.syllables(1, 3))),
                    false => first,
                }
            }
            Lang::Chinese => {
                let surname = self.letter(super::chinese::SURNAMES);
                format!("{surname}{}", self.characters(1, 2))
            }
        }
    }

    fn place(&mut self) -> String {
        match self.lang {
            Lang::English => capitalised(&self.syllables(1, 3)),
            Lang::Chinese => {
                format!("{}{}", self.characters(1, 2), self.rng.pick(&["市", "鎮", "村", "島", ""]))
            }
        }
    }

    fn code(&mut self) -> String {
        let letters = b"ABCDEFGHJKLMNPQRSTUVWXYZ";
        let letter = letters[self.rng.below(letters.len())] as char;
        format!("{letter}{}", 10 + self.rng.below(990))
    }

    /// A word that nobody knows, `from..=to` syllables.
    fn syllables(&mut self, from: usize, to: usize) -> String {
        syllables(self.rng, from, to)
    }

    /// Chinese characters that make no word.
    fn characters(&mut self, from: usize, to: usize) -> String {
        let count = from + self.rng.below(to - from + 1);
        let any = self.rng.chance(ANY_CHARACTER);
        (0..count)
            .map(|_| match any {
                true => self.any_character(),
                false => self.letter(super::chinese::CHARACTERS),
            })
            .collect()
    }

    /// Any of the unified ideographs.
    fn any_character(&mut self) -> char {
        const FIRST: u32 = 0x4e00;
        const COUNT: usize = 0x5200;
        let code = FIRST + self.rng.below(COUNT) as u32;
        char::from_u32(code).expect("the block has no gap; this is a bug")
    }

    /// Letters that can hardly be said.
    fn letters(&mut self) -> String {
        let count = 4 + self.rng.below(6);
        (0..count).map(|_| (b'a' + self.rng.below(26) as u8) as char).collect()
    }

    /// A sentence or a question of training now and then begins with a few words more.
    pub fn opened(&mut self, openers: &'static [&'static str], text: String) -> String {
        if self.split == Split::Eval || !self.rng.chance(OPENED) {
            return text;
        }
        format!("{}{text}", self.rng.pick(openers))
    }

    fn letter(&mut self, letters: &str) -> char {
        let at = self.rng.below(letters.chars().count());
        letters.chars().nth(at).expect("below the count; this is a bug")
    }
}

/// A word that nobody knows, `from..=to` syllables.
pub fn syllables(rng: &mut Rng, from: usize, to: usize) -> String {
    const ONSETS: &[&str] = &[
        "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n",
        "p", "pl", "qu", "r", "s", "sh", "sk", "st", "t", "th", "tr", "v", "w", "y", "z",
    ];
    const VOWELS: &[&str] = &["a", "e", "i", "o", "u", "ai", "ea", "ee", "ia", "oo", "ou", "y"];
    const CODAS: &[&str] =
        &["", "", "", "n", "r", "l", "s", "t", "m", "ck", "nd", "x", "th", "rt", "p", "g"];
    let count = from + rng.below(to - from + 1);
    let mut word = String::new();
    for _ in 0..count {
        word.push_str(rng.pick(ONSETS));
        word.push_str(rng.pick(VOWELS));
        if rng.chance(0.5) {
            word.push_str(rng.pick(CODAS));
        }
    }
    if word.len() < 3 { word + "n" } else { word }
}

/// Whether a made-up word, a number or a pair of numbers belongs to the evaluation.
pub fn is_held_out(word: &str) -> bool {
    let hash = word.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // The generator mixes what FNV leaves in the low bits of short words.
    Rng::new(hash).below(8) == 0
}

fn capitalised(word: &str) -> String {
    let (first, rest) = word.split_at(1);
    first.to_uppercase() + rest
}
