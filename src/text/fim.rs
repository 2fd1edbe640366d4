//! Filling in the middle: a text with a gap as the models that learned it see it.

use super::{Special, TextError, Tokenizer};

/// Marks of the families, each before the gap, after it, and where the answer begins.
const MARKS: [[&str; 3]; 5] = [
    ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
    ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
    ["<fim-prefix>", "<fim-suffix>", "<fim-middle>"],
    ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
    ["▁<PRE>", "▁<SUF>", "▁<MID>"],
];

impl Tokenizer {
    /// The prompt for what stands between `before` and `after`; `None` where the vocabulary has no
    /// marks for it.
    pub fn fill_in(&self, before: &[u32], after: &str) -> Result<Option<Vec<u32>>, TextError> {
        let ids = |marks: &[&str; 3]| {
            let [prefix, suffix, middle] = marks.map(|mark| self.id_of(mark));
            Some([prefix?, suffix?, middle?])
        };
        let Some([prefix, suffix, middle]) = MARKS.iter().find_map(ids) else { return Ok(None) };
        // What begins every text begins this one too.
        let bos = before.first().copied().filter(|&id| Some(id) == self.bos_id());
        let mut prompt: Vec<u32> = bos.into_iter().chain([prefix]).collect();
        prompt.extend(&before[usize::from(bos.is_some())..]);
        prompt.push(suffix);
        prompt.extend(self.encode(after, Special::NONE)?);
        prompt.push(middle);
        Ok(Some(prompt))
    }
}
