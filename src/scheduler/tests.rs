//! By state, not by call: what a batch holds after named steps, and random traces.

use super::*;

fn scheduler(block_count: usize, batch_tokens: usize, running_len: usize) -> Scheduler {
    let config =
        SchedulerConfig { block_count, block_len: 4, batch_tokens, running_len, score_chunk: 3 };
    Scheduler::new(config)
}

fn sequence(id: u64, prompt: usize) -> NewSequence {
    NewSequence { id: SeqId(id), prompt: vec![7; prompt], samples: true, score: false }
}

/// `id:start+rows`, with `!` where a token is sampled.
fn show(batch: &Batch) -> String {
    let entry = |e: &Entry| {
        format!("{}:{}+{}{}", e.id.0, e.start, e.rows, if e.samples { "!" } else { "" })
    };
    batch.entries.iter().map(entry).collect::<Vec<_>>().join(" ")
}

/// One step in which every sampling row yields the token 9.
fn step(scheduler: &mut Scheduler) -> String {
    let batch = scheduler.schedule();
    scheduler.check().unwrap();
    let sampled: Vec<_> = batch.entries.iter().filter(|e| e.samples).map(|e| (e.id, 9)).collect();
    scheduler.update(&batch, &sampled);
    scheduler.check().unwrap();
    show(&batch)
}

#[test]
fn a_long_prompt_is_cut_and_running_answers_go_first() {
    let mut s = scheduler(100, 8, 4);
    s.add(sequence(0, 3));
    assert_eq!(step(&mut s), "0:0+3!");
    s.add(sequence(1, 20));
    assert_eq!(step(&mut s), "0:3+1! 1:0+7");
    assert_eq!(step(&mut s), "0:4+1! 1:7+7");
    assert_eq!(step(&mut s), "0:5+1! 1:14+6!");
    assert_eq!(step(&mut s), "0:6+1! 1:20+1!");
}

#[test]
fn prompts_share_a_batch() {
    let mut s = scheduler(100, 16, 4);
    s.add(sequence(0, 5));
    s.add(sequence(1, 6));
    s.add(sequence(2, 7));
    assert_eq!(step(&mut s), "0:0+5! 1:0+6! 2:0+5");
    assert_eq!(step(&mut s), "0:5+1! 1:6+1! 2:5+2!");
}

#[test]
fn waiting_says_why() {
    let mut s = scheduler(3, 8, 2);
    s.add(sequence(0, 7)); // two blocks: seven tokens and the next
    s.add(sequence(1, 5)); // two more do not fit into three
    assert_eq!(s.schedule().admit, Admit::Later(Later::NoBlocks));
    s.finish(SeqId(0));
    s.add(sequence(2, 1));
    s.add(sequence(3, 1));
    let batch = s.schedule();
    assert_eq!(
        (show(&batch).as_str(), batch.admit),
        ("1:0+5! 2:0+1!", Admit::Later(Later::RunningFull))
    );
    let mut s = scheduler(100, 4, 2);
    s.add(sequence(0, 9));
    s.add(sequence(1, 1));
    assert_eq!(s.schedule().admit, Admit::Later(Later::BatchFull));
}

#[test]
fn the_youngest_gives_way_and_comes_back_with_its_tokens() {
    let mut s = scheduler(4, 16, 4);
    s.add(sequence(0, 7));
    s.add(sequence(1, 7));
    assert_eq!(step(&mut s), "0:0+7! 1:0+7!");
    assert_eq!(step(&mut s), "0:7+1! 1:7+1!"); // both hold two full blocks
    let batch = s.schedule(); // 0 needs a third
    assert_eq!(
        (show(&batch).as_str(), batch.preempted.as_slice()),
        ("0:8+1!", [SeqId(1)].as_slice())
    );
    s.update(&batch, &[(SeqId(0), 9)]);
    s.check().unwrap();
    assert_eq!((s.running_count(), s.waiting_count(), s.used_blocks()), (1, 1, 3));
    s.finish(SeqId(0));
    assert_eq!(step(&mut s), "1:0+9!", "prompt and answer are computed again, then it goes on");
}

#[test]
fn scoring_walks_the_prompt_in_small_chunks_and_once() {
    let mut s = scheduler(100, 16, 4);
    s.add(NewSequence { score: true, samples: false, ..sequence(0, 7) });
    let mut scored = Vec::new();
    for _ in 0..3 {
        let batch = s.schedule();
        scored.extend(batch.entries[0].score.clone());
        assert!(!batch.entries[0].samples);
        s.update(&batch, &[]);
    }
    assert_eq!(scored, (0..7).collect::<Vec<_>>());
    assert_eq!(show(&s.schedule()), "", "nothing is left to do");
}

#[test]
fn scored_rows_are_bounded_over_the_batch_and_not_scored_again() {
    let mut s = scheduler(4, 16, 4);
    let scored = |id, prompt| NewSequence { score: true, ..sequence(id, prompt) };
    s.add(sequence(0, 4));
    s.add(scored(1, 6));
    assert_eq!(step(&mut s), "0:0+4! 1:0+3");
    s.add(scored(2, 3));
    assert_eq!(step(&mut s), "0:4+1! 1:3+3!", "no score row is left for 2");
    step(&mut s);
    step(&mut s);
    let batch = s.schedule(); // 1 needs a third block and is the youngest
    assert_eq!(batch.preempted, [SeqId(1)]);
    s.finish(SeqId(0));
    let batch = s.schedule();
    assert_eq!(show(&batch), "1:0+9! 2:0+3!");
    assert_eq!((batch.entries[0].score.len(), batch.entries[1].score.len()), (0, 3));
}

#[test]
fn ids_that_overtake_each_other_are_put_in_order() {
    let mut s = scheduler(10, 16, 4);
    s.add(sequence(1, 2));
    s.add(sequence(0, 2));
    s.check().unwrap();
    assert_eq!(step(&mut s), "0:0+2! 1:0+2!");
}

#[test]
fn a_finished_sequence_leaves_nothing() {
    let mut s = scheduler(10, 16, 4);
    s.add(sequence(0, 7));
    step(&mut s);
    s.finish(SeqId(0));
    assert!(s.is_empty());
    assert_eq!(s.used_blocks(), 0);
    s.check().unwrap();
}

/// A model that is only arithmetic: the next token depends on all tokens before it. Whatever the
/// trace does, each sequence must see the tokens it would have seen alone, each position computed
/// from the first after every preemption, none skipped.
#[test]
fn random_traces_keep_every_promise() {
    for seed in 0..200u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let running_len = 1 + random.below(6);
        let batch_tokens = running_len + random.below(20);
        let mut s = scheduler(12 + random.below(20), batch_tokens, running_len);
        let mut next_id = 0;
        let mut live: Vec<(SeqId, usize)> = Vec::new(); // with the length at which it ends
        let mut written: std::collections::HashMap<SeqId, usize> = Default::default();
        for _ in 0..500 {
            if random.below(3) == 0 && live.len() < 12 {
                let prompt = 1 + random.below(30);
                let id = SeqId(next_id);
                next_id += 1;
                s.add(NewSequence { score: random.below(4) == 0, ..sequence(id.0, prompt) });
                live.push((id, prompt + 1 + random.below(48 - prompt)));
            }
            if random.below(10) == 0 && !live.is_empty() {
                let (id, _) = live.swap_remove(random.below(live.len()));
                s.finish(id);
            }
            let batch = s.schedule();
            s.check().unwrap();
            assert!(batch.row_count() <= batch_tokens && batch.score_count() <= 3);
            let oldest_preempted = batch.preempted.iter().min();
            let youngest_chosen = batch.entries.iter().map(|e| e.id).max();
            assert!(oldest_preempted.is_none_or(|id| Some(*id) > youngest_chosen), "seed {seed}");
            assert!(batch.row_count() > 0 || live.is_empty(), "seed {seed}: no progress");
            written.retain(|id, _| !batch.preempted.contains(id));
            let mut sampled = Vec::new();
            for entry in &batch.entries {
                let done = written.entry(entry.id).or_default();
                assert_eq!(*done, entry.start, "seed {seed}: a position is skipped or repeated");
                *done += entry.rows;
                let seq = s.running(entry.id).unwrap();
                assert_eq!(entry.samples, *done == seq.tokens().len());
                assert!(seq.blocks().len() * 4 >= *done);
                if entry.samples {
                    sampled.push((entry.id, seq.tokens().iter().sum::<u32>() % 101));
                }
            }
            s.update(&batch, &sampled);
            s.check().unwrap();
            live.retain(|&(id, end)| {
                let Some(seq) = s.running(id) else { return true };
                let alive = seq.tokens().len() < end;
                if !alive {
                    let mut alone = seq.tokens()[..seq.prompt_len].to_vec();
                    while alone.len() < end {
                        alone.push(alone.iter().sum::<u32>() % 101);
                    }
                    assert_eq!(alone, seq.tokens(), "seed {seed}");
                }
                alive || {
                    s.finish(id);
                    written.remove(&id);
                    false
                }
            });
        }
        live.iter().for_each(|(id, _)| s.finish(*id));
        assert_eq!(s.used_blocks(), 0);
    }
}

/// xorshift64*
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n as u64) as usize
    }
}
