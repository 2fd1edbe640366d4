//! By state, not by call: what a batch holds after named steps, and random traces.

pub(super) mod promise;
pub(super) mod room;

use super::*;
use crate::types::{CacheScope, Priority, Tenant};

pub(super) const BLOCK_LEN: usize = 4;

pub(super) fn scheduler(block_count: usize, batch_tokens: usize, running_len: usize) -> Scheduler {
    Scheduler::new(config(block_count, batch_tokens, running_len))
}

pub(super) fn config(
    block_count: usize,
    batch_tokens: usize,
    running_len: usize,
) -> SchedulerConfig {
    SchedulerConfig {
        block_count,
        block_len: BLOCK_LEN,
        batch_tokens,
        running_len,
        score_chunk: 3,
        target_ms: 100.0,
        proposed_rows: 8,
        price: None,
        load_blocks_min: 1,
        keep_blocks_min: None,
    }
}

pub(super) fn sequence(id: u64, prompt: usize) -> NewSequence {
    let prompt = (0..prompt as u32).map(|i| 100 * id as u32 + i).collect();
    text(id, prompt)
}

pub(super) fn text(id: u64, prompt: Vec<TokenId>) -> NewSequence {
    NewSequence {
        id: SeqId(id),
        prompt,
        answer_max: 1000,
        score: false,
        scope: CacheScope::default(),
        tenant: Tenant::default(),
        priority: Priority::Default,
        deadline: None,
        forks: Vec::new(),
    }
}

/// `id:start+rows`, with `!` where a token is sampled.
pub(super) fn show(batch: &Batch) -> String {
    let entry = |e: &Entry| {
        format!("{}:{}+{}{}", e.id.0, e.start, e.rows, if e.samples { "!" } else { "" })
    };
    batch.entries.iter().map(entry).collect::<Vec<_>>().join(" ")
}

/// One step in which every sampling row yields the token 9.
pub(super) fn step(scheduler: &mut Scheduler) -> String {
    let batch = scheduler.schedule(Duration::ZERO, &[], &());
    scheduler.check().unwrap();
    let sampled: Vec<_> = batch.entries.iter().filter(|e| e.samples).map(|e| (e.id, 9)).collect();
    scheduler.update(&batch, &sampled, 0.0);
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

/// Everything was computed once.
struct All;

impl Kept for All {
    fn has(&self, _: CacheScope, _: crate::kv::Chain) -> bool {
        true
    }
}

#[test]
fn one_text_is_fetched_once_for_all_who_need_it() {
    let mut s = scheduler(100, 32, 4);
    (0..3).for_each(|id| s.add(text(id, (0..10).collect())));
    let batch = s.schedule(Duration::ZERO, &[], &All);
    assert_eq!((show(&batch).as_str(), batch.loads.len(), s.running_count()), ("", 1, 3));
    s.update(&batch, &[], 0.0);
    let Load { id, ticket, ref text, .. } = batch.loads[0];
    assert_eq!((id, &text[..]), (SeqId(0), &[0, 1, 2, 3, 4, 5, 6, 7][..]));
    assert!(s.schedule(Duration::ZERO, &[], &All).loads.is_empty());
    for _ in 0..2 {
        assert!(s.awaits(id, ticket).is_some());
        s.loaded(id);
        s.check().unwrap();
    }
    assert_eq!((s.awaits(id, ticket), s.loading_count()), (None, 0));
    assert_eq!(step(&mut s), "0:8+2! 1:8+2! 2:8+2!");
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
    assert_eq!(s.schedule(Duration::ZERO, &[], &()).admit, Admit::Later(Later::NoBlocks));
    s.finish(SeqId(0));
    s.add(sequence(2, 1));
    s.add(sequence(3, 1));
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert_eq!(
        (show(&batch).as_str(), batch.admit),
        ("1:0+5! 2:0+1!", Admit::Later(Later::RunningFull))
    );
    let mut s = scheduler(100, 4, 2);
    s.add(sequence(0, 9));
    s.add(sequence(1, 1));
    assert_eq!(s.schedule(Duration::ZERO, &[], &()).admit, Admit::Later(Later::BatchFull));
}

#[test]
fn the_youngest_gives_way_and_comes_back_with_its_tokens() {
    let mut s = scheduler(4, 16, 4);
    s.add(sequence(0, 7));
    s.add(sequence(1, 7));
    assert_eq!(step(&mut s), "0:0+7! 1:0+7!");
    assert_eq!(step(&mut s), "0:7+1! 1:7+1!"); // both hold two full blocks
    let batch = s.schedule(Duration::ZERO, &[], &()); // 0 needs a third
    assert_eq!(
        (show(&batch).as_str(), batch.preempted.as_slice()),
        ("0:8+1!", [SeqId(1)].as_slice())
    );
    s.update(&batch, &[(SeqId(0), 9)], 0.0);
    s.check().unwrap();
    assert_eq!((s.running_count(), s.waiting_count(), s.used_blocks()), (1, 1, 3));
    s.finish(SeqId(0));
    assert_eq!(step(&mut s), "1:4+5!", "what was taken is computed again, then it goes on");
}

#[test]
fn scoring_walks_the_prompt_in_small_chunks_and_once() {
    let mut s = scheduler(100, 16, 4);
    s.add(NewSequence { score: true, answer_max: 0, ..sequence(0, 7) });
    let mut scored = Vec::new();
    for _ in 0..3 {
        let batch = s.schedule(Duration::ZERO, &[], &());
        scored.extend(batch.entries[0].score.clone());
        assert!(!batch.entries[0].samples);
        s.update(&batch, &[], 0.0);
    }
    assert_eq!(scored, (0..7).collect::<Vec<_>>());
    assert_eq!(show(&s.schedule(Duration::ZERO, &[], &())), "", "nothing is left to do");
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
    let batch = s.schedule(Duration::ZERO, &[], &()); // 1 needs a third block and is the youngest
    assert_eq!(batch.preempted, [SeqId(1)]);
    s.finish(SeqId(0));
    let batch = s.schedule(Duration::ZERO, &[], &());
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

#[test]
fn a_text_that_was_computed_is_not_computed_again() {
    let mut s = scheduler(10, 32, 4);
    let shared: Vec<TokenId> = (0..9).collect();
    s.add(text(0, shared.clone()));
    assert_eq!(step(&mut s), "0:0+9!");
    // Two whole blocks of it are known, while 0 still runs.
    s.add(text(1, [&shared[..], &[50, 51]].concat()));
    assert_eq!(step(&mut s), "0:9+1! 1:8+3!");
    assert_eq!(s.running(SeqId(1)).unwrap().cached(), 8);
    assert_eq!(s.used_blocks(), 4, "two are held twice");
    s.finish(SeqId(0));
    s.finish(SeqId(1));
    assert_eq!((s.used_blocks(), s.pool().idle_count()), (0, 2));
    // The whole prompt is known, and the last token is computed all the same.
    s.add(text(2, shared[..8].to_vec()));
    assert_eq!(step(&mut s), "2:7+1!");
    assert_eq!(s.running(SeqId(2)).unwrap().cached(), 7);
}

#[test]
fn a_block_that_begins_alike_is_copied_and_written_from_where_it_differs() {
    let mut s = scheduler(8, 32, 4);
    let student =
        |id: u64| text(id, [&(0..10).collect::<Vec<_>>()[..], &[50 + id as u32; 4]].concat());
    s.add(student(0));
    assert_eq!(step(&mut s), "0:0+14!");
    let theirs = s.running(SeqId(0)).unwrap().blocks()[2];
    s.add(student(1));
    let batch = s.schedule(Duration::ZERO, &[], &());
    s.check().unwrap();
    assert_eq!(show(&batch), "0:14+1! 1:10+4!", "two blocks held, half of the third copied");
    let own = s.running(SeqId(1)).unwrap().blocks()[2];
    assert_eq!(batch.copies, [(theirs, own)]);
    assert_eq!(s.running(SeqId(1)).unwrap().cached(), 10);
    s.update(&batch, &[(SeqId(1), 9)], 0.0);
    s.check().unwrap();
    // Idle, it serves as well; of another beginning nothing does.
    (0..2).for_each(|id| s.finish(SeqId(id)));
    s.add(student(2));
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert_eq!((show(&batch), batch.copies.len()), ("2:10+4!".into(), 1));
    s.finish(SeqId(2));
    s.add(text(3, (70..84).collect()));
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert_eq!((show(&batch), batch.copies.len()), ("3:0+14!".into(), 0));
}

#[test]
fn an_answer_is_a_prefix_of_the_next_question() {
    let mut s = scheduler(10, 32, 4);
    s.add(sequence(0, 3));
    for _ in 0..6 {
        step(&mut s);
    }
    let history = s.running(SeqId(0)).unwrap().tokens().to_vec();
    s.finish(SeqId(0));
    s.add(text(1, [&history[..], &[7]].concat()));
    assert_eq!(step(&mut s), "1:8+2!", "eight of nine tokens had been computed");
}

#[test]
fn those_who_come_together_compute_their_common_part_once() {
    let mut s = scheduler(100, 8, 4);
    let student = |id: u32| [(0..20).collect::<Vec<_>>(), vec![100 + id; 3]].concat();
    for id in 0..3 {
        s.add(text(id, student(id as u32)));
    }
    assert_eq!(step(&mut s), "0:0+8");
    assert_eq!(step(&mut s), "0:8+8");
    assert_eq!(step(&mut s), "0:16+7! 1:16+1", "1 comes in where 0 has arrived");
    assert_eq!(step(&mut s), "0:23+1! 1:17+6! 2:20+1", "2 goes on where 0 has arrived");
    assert_eq!(step(&mut s), "0:24+1! 1:23+1! 2:21+2!");
    let cached = [0, 1, 2].map(|id| s.running(SeqId(id)).unwrap().cached());
    assert_eq!(cached, [0, 16, 20]);
}

#[test]
fn scopes_share_nothing() {
    let mut s = scheduler(100, 32, 4);
    let scoped = |id, tenant| NewSequence {
        scope: CacheScope { adapter: 0, tenant },
        ..text(id, (0..9).collect())
    };
    s.add(scoped(0, 1));
    assert_eq!(step(&mut s), "0:0+9!");
    s.add(scoped(1, 2));
    s.add(scoped(2, 1));
    assert_eq!(step(&mut s), "0:9+1! 1:0+9! 2:8+1!");
}

#[test]
fn what_is_idle_makes_room() {
    let mut s = scheduler(4, 32, 4);
    s.add(sequence(0, 8));
    step(&mut s);
    s.finish(SeqId(0));
    assert_eq!(s.pool().idle_count(), 2);
    s.add(sequence(1, 13));
    assert_eq!(step(&mut s), "1:0+13!");
    assert_eq!((s.pool().idle_count(), s.pool().evictions()), (0, 2));
}

#[test]
fn a_preempted_sequence_finds_its_own_blocks_and_calls_none_of_them_cached() {
    let mut s = scheduler(4, 16, 4);
    s.add(sequence(0, 7));
    s.add(sequence(1, 6));
    step(&mut s);
    step(&mut s);
    assert_eq!(s.schedule(Duration::ZERO, &[], &()).preempted, [SeqId(1)]); // 0 needs a third block
    s.finish(SeqId(0));
    assert_eq!(step(&mut s), "1:4+4!", "its first block was known and idle");
    assert_eq!(s.running(SeqId(1)).unwrap().cached(), 0);
}

#[test]
fn a_scored_prompt_is_computed_from_its_first_token() {
    let mut s = scheduler(100, 32, 4);
    s.add(sequence(0, 9));
    step(&mut s);
    s.finish(SeqId(0));
    s.add(NewSequence { score: true, ..text(1, (0..9).collect()) });
    assert_eq!(step(&mut s), "1:0+3");
    assert_eq!(s.running(SeqId(1)).unwrap().cached(), 0);
}

#[test]
fn prompts_get_the_rows_that_the_time_allows() {
    let mut s = scheduler(1000, 512, 4);
    let timed = |s: &mut Scheduler| {
        let batch = s.schedule(Duration::ZERO, &[], &());
        let sampled: Vec<_> =
            batch.entries.iter().filter(|e| e.samples).map(|e| (e.id, 9)).collect();
        let prompt_rows = batch.row_count() - batch.answers;
        s.update(&batch, &sampled, 10.0 + batch.answers as f64 * 10.0 + prompt_rows as f64);
        s.check().unwrap();
        show(&batch)
    };
    s.add(sequence(0, 3));
    assert_eq!(timed(&mut s), "0:0+3!");
    assert_eq!(timed(&mut s), "0:3+1!", "20 ms");
    s.add(sequence(1, 1000));
    for _ in 0..8 {
        timed(&mut s);
    }
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert!((70..=82).contains(&batch.entries[1].rows), "{}", show(&batch));
}

#[test]
fn forks_begin_where_the_prompt_ends_and_write_into_copies() {
    let mut s = scheduler(20, 16, 4);
    s.add(NewSequence { forks: vec![SeqId(1), SeqId(2)], ..sequence(0, 6) });
    assert_eq!(s.waiting_count(), 3);
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert_eq!(
        (show(&batch).as_str(), &batch.entries[0].forks[..]),
        ("0:0+6!", &[SeqId(1), SeqId(2)][..])
    );
    s.update(&batch, &[(SeqId(0), 9), (SeqId(1), 8), (SeqId(2), 8)], 0.0);
    s.check().unwrap();
    assert_eq!((s.running_count(), s.waiting_count(), s.used_blocks()), (3, 0, 2));
    let tail = s.running(SeqId(0)).unwrap().blocks()[1];
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert_eq!(show(&batch), "0:6+1! 1:6+1! 2:6+1!");
    // Two copies; the last holder writes in place.
    let copied: Vec<_> = batch.copies.iter().map(|(from, _)| *from).collect();
    assert_eq!((copied, s.used_blocks()), (vec![tail; 2], 4));
    assert_eq!(s.running(SeqId(2)).unwrap().blocks()[1], tail);
    s.update(&batch, &[(SeqId(0), 9), (SeqId(1), 8), (SeqId(2), 8)], 0.0);
    step(&mut s);
    step(&mut s);
    // 1 and 2 said the same, so their second block is one again.
    assert_eq!(s.running(SeqId(1)).unwrap().blocks()[1], s.running(SeqId(2)).unwrap().blocks()[1]);
}

#[test]
fn forks_without_room_come_later_and_find_the_prompt() {
    let mut s = scheduler(20, 16, 2);
    s.add(NewSequence { forks: vec![SeqId(1), SeqId(2)], ..sequence(0, 9) });
    let batch = s.schedule(Duration::ZERO, &[], &());
    assert_eq!(batch.entries[0].forks, [SeqId(1)]);
    s.update(&batch, &[(SeqId(0), 9), (SeqId(1), 9)], 0.0);
    assert_eq!((s.running_count(), s.waiting_count()), (2, 1));
    s.finish(SeqId(0));
    assert_eq!(step(&mut s), "1:9+1! 2:8+1!");
}

#[test]
fn the_first_fork_inherits_the_prompt_of_a_client_that_left() {
    let mut s = scheduler(20, 4, 4);
    s.add(NewSequence { forks: vec![SeqId(1), SeqId(2)], ..sequence(0, 9) });
    assert_eq!(step(&mut s), "0:0+4");
    s.finish(SeqId(1));
    s.finish(SeqId(0));
    assert_eq!((s.running_count(), s.waiting_count()), (0, 1));
    assert_eq!(step(&mut s), "2:4+4", "what was computed is not lost");
}

pub(super) fn proposal(id: u64, tokens: &[TokenId]) -> Proposal {
    Proposal { id: SeqId(id), tokens: tokens.to_vec() }
}

#[test]
fn what_was_proposed_and_is_wrong_leaves_nothing() {
    let mut s = scheduler(20, 16, 4);
    s.add(sequence(0, 3));
    step(&mut s);
    let batch = s.schedule(Duration::ZERO, &[proposal(0, &[9, 9, 7, 9, 9])], &());
    assert_eq!((show(&batch).as_str(), s.used_blocks()), ("0:3+6!", 3));
    assert_eq!((batch.answers, batch.proposed_count()), (1, 5));
    s.check().unwrap();
    // Two are right, the third is not.
    s.update(&batch, &[(SeqId(0), 9); 3], 0.0);
    s.check().unwrap();
    let seq = s.running(SeqId(0)).unwrap();
    assert_eq!((seq.tokens(), seq.computed, seq.known), (&[0, 1, 2, 9, 9, 9, 9][..], 6, 1));
    assert_eq!(s.used_blocks(), 2);
    assert_eq!(step(&mut s), "0:6+1!");
    s.finish(SeqId(0));
    // No row of another text is found: the second block is not full.
    s.add(text(1, vec![0, 1, 2, 9, 9, 9, 7, 9, 9]));
    assert_eq!(step(&mut s), "1:4+5!");
}

#[test]
fn proposals_come_after_everybody_else() {
    let mut s = scheduler(20, 8, 4);
    s.add(sequence(0, 3));
    step(&mut s);
    s.add(sequence(1, 11));
    let go_on = [proposal(1, &[5; 4]), proposal(0, &[9; 8])];
    let go = |s: &mut Scheduler| {
        let batch = s.schedule(Duration::ZERO, &go_on, &());
        let sampling = batch.entries.iter().filter(|e| e.samples);
        let sampled: Vec<_> = sampling.map(|e| (e.id, 9)).collect();
        s.update(&batch, &sampled, 0.0);
        s.check().unwrap();
        show(&batch)
    };
    assert_eq!(go(&mut s), "0:3+1! 1:0+7", "no row is left");
    assert_eq!(go(&mut s), "0:4+4! 1:7+4!", "three are, and a prompt cannot be guessed");
    assert_eq!(go(&mut s), "0:5+3! 1:11+5!", "in the order in which they are told");
}

#[test]
fn nobody_gives_a_block_for_a_proposal() {
    let mut s = scheduler(4, 16, 4);
    s.add(sequence(0, 7));
    s.add(sequence(1, 6));
    assert_eq!(step(&mut s), "0:0+7! 1:0+6!");
    let batch = s.schedule(Duration::ZERO, &[proposal(0, &[1; 5]), proposal(1, &[1; 5])], &());
    assert_eq!(show(&batch), "0:7+1! 1:6+2!", "to the end of the blocks that they have");
    assert_eq!((batch.preempted.len(), s.used_blocks()), (0, 4));
    let mut s = scheduler(4, 16, 4);
    s.add(NewSequence { tenant: Tenant { id: 1, ..Tenant::default() }, ..sequence(0, 3) });
    step(&mut s);
    let before = s.tenants.turn(1).1;
    let batch = s.schedule(Duration::ZERO, &[proposal(0, &[1; 5])], &());
    s.update(&batch, &[(SeqId(0), 9)], 0.0);
    let after = s.tenants.turn(1).1;
    step(&mut s);
    assert_eq!(after - before, s.tenants.turn(1).1 - after, "wrong ones are on nobody's account");
}
