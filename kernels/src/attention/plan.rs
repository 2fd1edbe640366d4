//! What is computed together: which lines of a batch read which keys in one go.
//!
//! Rows of several sequences that begin with the same blocks (a system prompt, a chapter, the forks
//! of one question) are lines of one tile as far as these go: K and V are read once for up to
//! sixteen lines. Behind that, each sequence reads on by itself. A partial depends on its line and
//! its chunk alone, and partials are merged from the first chunk to the last in either case, so
//! this changes no bit.

use std::collections::BTreeMap;
use std::ops::Range;

use super::tile::partial_numbers;
use super::{AttentionBatch, AttentionParams, CHUNK};
use crate::kv::KvShape;

/// Lines of a tile.
pub(super) const LINES: usize = 16;

/// Numbers of partials, at most, of sequences that read together: 64 MiB. Each has one for every
/// chunk of its own.
const PARTIALS_MAX: usize = 16 << 20;

/// What is asked for.
#[derive(Clone, Copy)]
pub(super) struct Ragged<'a> {
    pub(super) batch: &'a AttentionBatch<'a>,
    pub(super) params: &'a AttentionParams<'a>,
    pub(super) shape: KvShape,
}

impl<'a> Ragged<'a> {
    /// Query heads that share a KV head.
    pub(super) fn group(&self) -> usize {
        self.params.n_heads / self.shape.n_kv_heads
    }

    /// Rows that a sequence brings.
    fn rows_of(&self, seq: usize) -> Range<usize> {
        self.batch.cu_q[seq] as usize..self.batch.cu_q[seq + 1] as usize
    }

    /// The blocks of a sequence that hold a chunk.
    fn blocks(&self, seq: usize, chunk: usize) -> &'a [u32] {
        let len = self.shape.block_len;
        &self.batch.block_tables[seq][chunk * CHUNK / len..((chunk + 1) * CHUNK).div_ceil(len)]
    }

    /// All rows, in order, and what they see.
    fn rows(&self) -> Vec<Row> {
        let AttentionBatch { cu_q, context_len, .. } = self.batch;
        // Rows before the first sequence belong to nobody.
        let mut rows = vec![Row { at: 0, keys: 0..0 }; cu_q[0] as usize];
        for (new, &context) in cu_q.windows(2).zip(*context_len) {
            for at in new[0]..new[1] {
                let (at, end) = (at as usize, (context - (new[1] - at) + 1) as usize);
                let start = self.params.window.map_or(0, |window| end.saturating_sub(window));
                rows.push(Row { at, keys: start..end });
            }
        }
        rows
    }
}

/// A row of the batch.
#[derive(Clone, Debug)]
pub(super) struct Row {
    /// Its place in `q` and in `out`.
    pub(super) at: usize,
    /// Positions that it sees.
    pub(super) keys: Range<usize>,
}

/// Lines that read the same blocks with one KV head. Line `j` is `rows[j / group]` of the plan, and
/// head `j % group` of the group.
#[derive(Clone, Debug)]
pub(super) struct Tile {
    /// Whose block table is read.
    pub(super) seq: usize,
    pub(super) kv_head: usize,
    pub(super) lines: Range<usize>,
    /// Positions that some line of the tile sees, of those that the tile reads.
    pub(super) keys: Range<usize>,
}

impl Tile {
    /// The chunks that hold its keys.
    pub(super) fn chunks(&self) -> Range<usize> {
        self.keys.start / CHUNK..self.keys.end.div_ceil(CHUNK)
    }
}

/// Lines whose keys are read by several tiles.
#[derive(Clone, Debug)]
pub(super) struct End {
    /// Lines and KV head of the result.
    pub(super) tile: Tile,
    /// The tiles among [`Plan::parts`], from the first chunk to the last, and the first of the
    /// lines in each.
    pub(super) pieces: Vec<(usize, usize)>,
}

/// A batch, cut into tiles.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// The rows of the batch, then those of shared tiles once more.
    pub(super) rows: Vec<Row>,
    /// Tiles that read all keys of their lines.
    pub(super) whole: Vec<Tile>,
    /// Tiles that read some of them.
    pub(super) parts: Vec<Tile>,
    /// How those come together.
    pub(super) ends: Vec<End>,
}

impl Plan {
    pub(super) fn new(of: Ragged<'_>) -> Plan {
        let group = of.group();
        let mut plan = Plan { rows: of.rows(), ..Plan::default() };
        let mut shared = vec![Vec::new(); of.batch.context_len.len()];
        for family in Family::all(of, &plan.rows) {
            plan.share(of, &family, &mut shared);
        }
        for (seq, shared) in shared.iter().enumerate() {
            let rows = of.rows_of(seq);
            let lines = rows.start * group..rows.end * group;
            // Tiles of one KV head stand together: its keys stay in the second cache meanwhile.
            for kv_head in 0..of.shape.n_kv_heads {
                for first in lines.clone().step_by(LINES) {
                    let lines = first..lines.end.min(first + LINES);
                    let start = plan.rows[lines.start / group].keys.start;
                    let end = plan.rows[(lines.end - 1) / group].keys.end;
                    let tile = Tile { seq, kv_head, lines, keys: start..end };
                    match shared.is_empty() {
                        true => plan.whole.push(tile),
                        false => plan.go_on(tile, shared),
                    }
                }
            }
        }
        plan
    }

    /// Tiles of the rows of a whole family; `shared` notes where those of each sequence are.
    fn share(&mut self, of: Ragged<'_>, family: &Family, shared: &mut [Vec<Shared>]) {
        let (group, first) = (of.group(), self.parts.len());
        let (mut tiles, mut room): (Vec<Vec<usize>>, usize) = (Vec::new(), 0);
        for &seq in &family.members {
            let lines = of.rows_of(seq).len() * group;
            if lines > room {
                tiles.push(Vec::new());
                room = LINES;
            }
            room -= lines;
            tiles.last_mut().expect("there is room; this is a bug").push(seq);
        }
        let mut lines = Vec::new();
        for (tile, members) in tiles.iter().enumerate() {
            let start = self.rows.len();
            for &seq in members {
                let line = (self.rows.len() - start) * group;
                let (tiles, to) = (tiles.len(), family.chunks.end);
                shared[seq].push(Shared { first, tiles, tile, line, to });
                self.rows.extend_from_within(of.rows_of(seq));
            }
            lines.push(start * group..self.rows.len() * group);
        }
        let (seq, keys) =
            (family.members[0], family.chunks.start * CHUNK..family.chunks.end * CHUNK);
        for kv_head in 0..of.shape.n_kv_heads {
            let tile = |lines: &Range<usize>| Tile {
                seq,
                kv_head,
                lines: lines.clone(),
                keys: keys.clone(),
            };
            self.parts.extend(lines.iter().map(tile));
        }
    }

    /// A tile whose first keys are read by others.
    fn go_on(&mut self, mut tile: Tile, shared: &[Shared]) {
        let piece = |s: &Shared| (s.first + tile.kv_head * s.tiles + s.tile, s.line);
        let mut pieces: Vec<(usize, usize)> = shared.iter().map(piece).collect();
        let end = tile.clone();
        tile.keys.start = shared.last().map_or(0, |last| last.to * CHUNK);
        if !tile.keys.is_empty() {
            pieces.push((self.parts.len(), 0));
            self.parts.push(tile);
        }
        self.ends.push(End { tile: end, pieces });
    }

    /// Lets every tile be cut by its chunks: none is whole any more.
    pub(super) fn split(&mut self) {
        for tile in self.whole.drain(..) {
            self.ends.push(End { tile: tile.clone(), pieces: vec![(self.parts.len(), 0)] });
            self.parts.push(tile);
        }
    }

    /// Every tile.
    pub(super) fn tiles(&self) -> impl Iterator<Item = &Tile> {
        self.whole.iter().chain(&self.parts)
    }
}

/// Where the lines of a sequence are among shared tiles.
#[derive(Clone, Debug)]
struct Shared {
    /// The first of these tiles among [`Plan::parts`].
    first: usize,
    /// How many there are of each KV head, and which of them it is.
    tiles: usize,
    tile: usize,
    /// The first line in it.
    line: usize,
    /// The chunk behind the last one.
    to: usize,
}

/// Sequences that have the same blocks for some chunks, and all keys of these in sight.
struct Family {
    members: Vec<usize>,
    chunks: Range<usize>,
}

impl Family {
    /// Chunks that sequences share; those of one sequence from the first to the last. Sequences
    /// whose own lines fill more than half of a tile gain nothing.
    fn all(of: Ragged<'_>, rows: &[Row]) -> Vec<Family> {
        let candidate = |seq: usize| {
            let own = of.rows_of(seq);
            let few = (1..=LINES / 2).contains(&(own.len() * of.group()));
            // The last row has the latest start of a window, the first one the earliest end.
            let seen = few && rows[own.end - 1].keys.start == 0;
            let whole = if seen { rows[own.start].keys.end / CHUNK } else { 0 };
            (whole > 0).then_some((seq, whole))
        };
        let seqs: Vec<(usize, usize)> =
            (0..of.batch.context_len.len()).filter_map(candidate).collect();
        let partials = |&(seq, _): &(usize, usize)| {
            let lines = of.rows_of(seq).len() * of.params.n_heads;
            let chunks = (of.batch.context_len[seq] as usize).div_ceil(CHUNK);
            lines * chunks * partial_numbers(of.shape)
        };
        let mut families = Vec::new();
        if seqs.iter().map(partials).sum::<usize>() <= PARTIALS_MAX {
            Family::among(of, seqs, 0, &mut families);
        }
        families
    }

    /// Adds those among sequences that have the same blocks before chunk `from`. With each of them
    /// stands how many chunks its rows see whole.
    fn among(of: Ragged<'_>, seqs: Vec<(usize, usize)>, from: usize, all: &mut Vec<Family>) {
        let mut same: BTreeMap<&[u32], Vec<(usize, usize)>> = BTreeMap::new();
        for (seq, whole) in seqs.into_iter().filter(|(_, whole)| *whole > from) {
            same.entry(of.blocks(seq, from)).or_default().push((seq, whole));
        }
        for seqs in same.into_values().filter(|seqs| seqs.len() > 1) {
            let first = seqs[0].0;
            let least = seqs.iter().map(|(_, whole)| *whole).min().unwrap_or(from);
            let has = |seq: usize, chunk: usize| of.blocks(seq, chunk) == of.blocks(first, chunk);
            let all_have = |chunk: &usize| seqs.iter().all(|(seq, _)| has(*seq, *chunk));
            let to = from + 1 + (from + 1..least).take_while(all_have).count();
            let members = seqs.iter().map(|(seq, _)| *seq).collect();
            all.push(Family { members, chunks: from..to });
            Family::among(of, seqs, to, all);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK_LEN: usize = 16;
    /// Blocks of a chunk.
    const BLOCKS: u32 = (CHUNK / BLOCK_LEN) as u32;

    /// A table that begins with `prefix` and goes on by itself.
    fn table(prefix: &[u32], own: u32, len: usize) -> Vec<u32> {
        let own = (0..).map(|i| own + i).skip_while(|block| prefix.contains(block));
        prefix.iter().copied().chain(own).take(len.div_ceil(BLOCK_LEN)).collect()
    }

    /// The plan of sequences with these contexts, one new row each, 4 heads over 2.
    fn plan(tables: &[Vec<u32>], contexts: &[u32], window: Option<usize>) -> Plan {
        let cu_q: Vec<u32> = (0..=contexts.len() as u32).collect();
        let tables: Vec<&[u32]> = tables.iter().map(Vec::as_slice).collect();
        let batch = AttentionBatch { cu_q: &cu_q, context_len: contexts, block_tables: &tables };
        let params = AttentionParams { n_heads: 4, scale: 1.0, softcap: None, window, sinks: None };
        let shape = KvShape { n_blocks: 10_000, block_len: BLOCK_LEN, n_kv_heads: 2, head_dim: 8 };
        Plan::new(Ragged { batch: &batch, params: &params, shape })
    }

    /// Every line reads every chunk that it sees once, from the first to the last.
    fn check(plan: &Plan, seqs: usize) {
        let group = 2;
        let mut lines = 0;
        for end in &plan.ends {
            lines += end.tile.lines.len();
            for (i, line) in end.tile.lines.clone().enumerate() {
                let mut next = end.tile.keys.start / CHUNK;
                for &(part, first) in &end.pieces {
                    let part = &plan.parts[part];
                    assert_eq!(part.kv_head, end.tile.kv_head);
                    let row = &plan.rows[(part.lines.start + first + i) / group];
                    assert_eq!(row.at, plan.rows[line / group].at);
                    assert_eq!(part.chunks().start, next);
                    next = part.chunks().end;
                }
                assert_eq!(next, end.tile.chunks().end);
            }
        }
        lines += plan.whole.iter().map(|tile| tile.lines.len()).sum::<usize>();
        assert_eq!(lines, seqs * 4, "every line has one place in the result");
        assert!(plan.tiles().all(|tile| (1..=LINES).contains(&tile.lines.len())));
    }

    #[test]
    fn a_class_reads_its_chapter_once() {
        let chapter: Vec<u32> = (0..5 * BLOCKS + 3).collect();
        let contexts: Vec<u32> = (0..30).map(|i| 1400 + 10 * i).collect();
        let tables: Vec<Vec<u32>> =
            (0..30).map(|i| table(&chapter, 1000 + 100 * i, 1400 + 10 * i as usize)).collect();
        let plan = plan(&tables, &contexts, None);
        check(&plan, 30);
        assert!(plan.whole.is_empty());
        let shared: Vec<&Tile> = plan.parts.iter().filter(|t| t.keys == (0..5 * CHUNK)).collect();
        // 60 lines of each KV head are four tiles.
        assert_eq!(shared.len(), 2 * 4);
        assert_eq!(plan.parts.len(), shared.len() + 2 * 30);
    }

    #[test]
    fn families_have_families() {
        let whole: Vec<u32> = (0..4 * BLOCKS).collect();
        let half = &whole[..2 * BLOCKS as usize];
        let tables = [
            table(&whole, 1000, 1025),
            table(half, 2000, 1025),
            table(&[], 3000, 1025),
            table(&whole, 4000, 1025),
            table(half, 5000, 600),
        ];
        let plan = plan(&tables, &[1025, 1025, 1025, 1025, 600], None);
        check(&plan, 5);
        assert_eq!(plan.whole.len(), 2, "one has a beginning of its own");
        let reads = |keys: Range<usize>| plan.parts.iter().filter(|t| t.keys == keys).count();
        assert_eq!(reads(0..512), 2);
        assert_eq!(reads(512..1024), 2);
        assert_eq!((reads(1024..1025), reads(512..1025), reads(512..600)), (4, 2, 2));
    }

    #[test]
    fn what_is_not_the_same_or_not_in_sight_is_not_shared() {
        let blocks: Vec<u32> = (0..2 * BLOCKS).collect();
        let tables = [table(&blocks, 1000, 512), table(&blocks, 2000, 512)];
        assert_eq!(plan(&tables, &[512, 512], None).ends.len(), 4);
        assert!(plan(&tables, &[512, 512], Some(511)).ends.is_empty(), "a window ends before");
        assert!(plan(&tables, &[255, 512], None).ends.is_empty(), "less than a chunk");
        let late = [table(&blocks[..15], 1000, 512), table(&blocks, 2000, 512)];
        assert!(plan(&late, &[512, 512], None).ends.is_empty(), "one block differs");
        assert!(plan(&[], &[], None).rows.is_empty());
    }

    #[test]
    fn what_would_take_too_much_memory_is_read_alone() {
        // A line of 8 numbers has 18 in a partial; there are 4 lines and 128 chunks of each.
        let (len, most) = (128 * CHUNK, PARTIALS_MAX / (4 * 128 * 18));
        let blocks: Vec<u32> = (0..127 * BLOCKS).collect();
        let one = table(&blocks, 10_000, len);
        let of = |seqs: usize| plan(&vec![one.clone(); seqs], &vec![len as u32; seqs], None);
        assert!(of(most).whole.is_empty());
        let alone = of(most + 1);
        assert!(alone.parts.is_empty() && alone.ends.is_empty());
    }

    #[test]
    fn any_tile_may_be_cut() {
        let blocks: Vec<u32> = (0..2 * BLOCKS).collect();
        let tables = [table(&blocks, 1000, 513), table(&blocks, 2000, 600), table(&[], 3000, 700)];
        let mut plan = plan(&tables, &[513, 600, 700], None);
        plan.split();
        assert!(plan.whole.is_empty());
        check(&plan, 3);
    }
}
