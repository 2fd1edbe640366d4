//! SentencePiece BPE driven by scores, as GGUF's `llama` vocabularies store it.
//!
//! The file has a score for every piece and no merge list. Two neighbours are joined if their
//! concatenation is a piece, best score first, leftmost first among equals; a character that is
//! no piece becomes its UTF-8 bytes as `<0xXX>` pieces, or else the unknown token. This cannot be
//! written as a list of merges: a list orders the two ways to split one piece, scores do not.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};
use std::path::{Path, PathBuf};

use tokenizers::models::bpe::BpeTrainer;
use tokenizers::{Model, Token};

/// The model.
#[derive(Debug, Clone)]
pub(super) struct ScoreBpe {
    tokens: Vec<String>,
    ids: HashMap<String, u32>,
    /// By id; `None` for tokens that text never becomes: control, unknown and byte tokens.
    scores: Vec<Option<f32>>,
    /// The `<0xXX>` token of every byte, where there is one.
    bytes: Vec<Option<u32>>,
    unknown: Option<u32>,
}

/// Two neighbours that could be joined.
struct Join {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both; differs from the present lengths once either was joined elsewhere.
    len: usize,
}

/// A run of the text, linked to its neighbours.
struct Run {
    start: usize,
    /// Bytes; 0 once the run was joined to its left neighbour.
    len: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

impl ScoreBpe {
    /// `scores[id]` is `None` for tokens that plain text must never become. As long as `tokens`.
    pub(super) fn new(tokens: Vec<String>, scores: Vec<Option<f32>>, unknown: Option<u32>) -> Self {
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0u32..).zip(&tokens) {
            ids.entry(token.clone()).or_insert(id);
        }
        let bytes = 0..=255u8;
        let bytes = bytes.map(|byte| ids.get(&format!("<0x{byte:02X}>")).copied()).collect();
        Self { tokens, ids, scores, bytes, unknown }
    }

    fn piece(&self, text: &str) -> Option<(u32, f32)> {
        let &id = self.ids.get(text)?;
        self.scores[id as usize].map(|score| (id, score))
    }

    fn join(&self, text: &str, runs: &[Run], left: usize, right: usize) -> Option<Join> {
        let len = runs[left].len + runs[right].len;
        let (_, score) = self.piece(&text[runs[left].start..runs[left].start + len])?;
        Some(Join { score, left, right, len })
    }

    /// The runs that are left when nothing can be joined any more.
    fn runs(&self, text: &str) -> Vec<Run> {
        let count = text.chars().count();
        let mut runs: Vec<Run> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Run {
                start,
                len: c.len_utf8(),
                prev: i.checked_sub(1),
                next: Some(i + 1).filter(|&next| next < count),
            })
            .collect();
        let mut queue: BinaryHeap<Join> =
            (1..count).filter_map(|i| self.join(text, &runs, i - 1, i)).collect();
        while let Some(best) = queue.pop() {
            let (left, right) = (best.left, best.right);
            let stale = runs[left].len == 0 || runs[right].len == 0;
            if stale || runs[left].len + runs[right].len != best.len {
                continue;
            }
            runs[left].len = best.len;
            runs[right].len = 0;
            runs[left].next = runs[right].next;
            if let Some(next) = runs[left].next {
                runs[next].prev = Some(left);
                queue.extend(self.join(text, &runs, left, next));
            }
            if let Some(prev) = runs[left].prev {
                queue.extend(self.join(text, &runs, prev, left));
            }
        }
        runs.retain(|run| run.len > 0);
        runs
    }

    fn push_bytes(&self, piece: &str, offset: usize, out: &mut Vec<Token>) {
        let ids: Option<Vec<u32>> = piece.bytes().map(|b| self.bytes[b as usize]).collect();
        for id in ids.unwrap_or_else(|| self.unknown.into_iter().collect()) {
            out.push(Token::new(id, piece.into(), (offset, offset + piece.len())));
        }
    }
}

impl Model for ScoreBpe {
    type Trainer = BpeTrainer;

    fn tokenize(&self, text: &str) -> tokenizers::Result<Vec<Token>> {
        let mut out = Vec::new();
        for run in self.runs(text) {
            let end = run.start + run.len;
            let piece = &text[run.start..end];
            match self.piece(piece) {
                Some((id, _)) => out.push(Token::new(id, piece.into(), (run.start, end))),
                None => self.push_bytes(piece, run.start, &mut out),
            }
        }
        Ok(out)
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        self.ids.get(token).copied()
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        self.tokens.get(id as usize).cloned()
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        self.ids.clone()
    }

    fn get_vocab_size(&self) -> usize {
        self.tokens.len()
    }

    fn save(&self, _folder: &Path, _prefix: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a vocabulary from GGUF is not written back".into())
    }

    fn get_trainer(&self) -> BpeTrainer {
        BpeTrainer::default()
    }
}

impl Ord for Join {
    /// The greatest is joined first: best score, then leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score.total_cmp(&other.score).then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Join {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Join {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Join {}
