//! One key that always has two hundred requests here, and one that asks now and then: on a machine
//! that computes a short prompt about as fast as a step of many answers, and on one that takes
//! thirty times as long for a row, so that a step of the one is as long as a short question of the
//! other.

use super::tests::room::{Room, tenant};
use crate::types::Tenant;

/// What the model of the binary costs on two cores.
const COSTS_MS: [f64; 3] = [0.15, 0.09, 0.045];
/// What one of half a billion weights does.
const LARGE_MS: [f64; 3] = [14.0, 2.4, 2.4];
const OTHER: u64 = 1;
/// And those after it.
const GREEDY: u64 = 2;

/// What became of a hundred questions of the other key.
struct Seen {
    /// Until the first token of each, ascending.
    waits_ms: Vec<f64>,
    /// Part of the time that no row took.
    idle: f64,
    /// The longest that an answer of the greedy key had no token, in steps.
    still: u64,
}

/// Numbers below `n`, the same every time.
fn dice() -> impl FnMut(u32) -> u32 {
    let mut state = 1u64;
    move |n| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((state >> 33) as u32) % n
    }
}

/// What greedy keys ask for: requests at any time, and tokens of their answers, from and to.
struct Greedy {
    keys: u64,
    requests: usize,
    answers: [usize; 2],
}

const NOBODY: Greedy = Greedy { keys: 1, requests: 0, answers: [0; 2] };
const TALKS: Greedy = Greedy { keys: 1, requests: 200, answers: [300, 500] };
/// It wants one token of each.
const CLASSIFIES: Greedy = Greedy { keys: 1, requests: 200, answers: [1, 2] };

fn questions(costs_ms: [f64; 3], prompt: u32, greedy: &Greedy) -> Seen {
    let (mut room, mut below) = (Room::new(), dice());
    (room.costs_ms, room.check_every) = (costs_ms, 64);
    // Somebody has had an answer here before, alone.
    room.ask(tenant(OTHER), 20, 5);
    while !room.scheduler.is_empty() {
        room.step();
    }
    let question = |due_ms| Some((due_ms, tenant(OTHER), prompt, 40));
    room.coming = question(3000.0);
    let mut steps = 0;
    let mut seen = Seen { waits_ms: Vec::new(), idle: 0.0, still: 0 };
    while seen.waits_ms.len() < 100 {
        while room.scheduler.running_count() + room.scheduler.waiting_count() < greedy.requests {
            let [from, to] = greedy.answers;
            let answer = from + below((to - from) as u32) as usize;
            let key = GREEDY + u64::from(below(greedy.keys as u32));
            room.ask(tenant(key), 200 + below(200), answer);
        }
        if room.scheduler.is_empty() {
            room.now_ms = room.coming.unwrap().0;
        }
        room.step();
        steps += 1;
        let answers = room.scheduler.running.iter().filter(|s| s.is_answer());
        let still = answers.map(|s| room.scheduler.steps - s.moved).max();
        seen.still = seen.still.max(still.unwrap_or(0));
        let last = room.asked.iter().rfind(|a| a.tenant == OTHER && room.coming.is_none());
        if let Some(last) = last.filter(|q| room.scheduler.running(q.id).is_none())
            && let Some(first_ms) = last.first_ms
        {
            seen.waits_ms.push(first_ms - last.arrived_ms);
            room.coming = question(room.now_ms + 50.0 + f64::from(below(2000)) / 10.0);
        }
    }
    seen.waits_ms.sort_by(f64::total_cmp);
    seen.idle = f64::from(steps) * costs_ms[0] / room.now_ms;
    seen
}

#[test]
fn the_first_token_of_a_short_prompt_hardly_waits_for_a_greedy_key() {
    for prompt in [200, 1200] {
        let [alone, beside] = [NOBODY, TALKS].map(|greedy| questions(COSTS_MS, prompt, &greedy));
        let ratio = beside.waits_ms[95] / alone.waits_ms[95];
        println!(
            "{prompt} tokens: p95 {:.1} ms alone, {:.1} ms beside ({ratio:.2}), {:.3} idle",
            alone.waits_ms[95], beside.waits_ms[95], beside.idle
        );
        assert!(ratio < 1.5, "{prompt} tokens: {ratio:.2}");
        assert!(beside.idle < 0.05, "short steps cost the greedy key {:.3}", beside.idle);
        assert!(beside.still <= 1, "an answer stood still for {} steps", beside.still);
    }
}

/// A step takes as long here as a short question, which is not to wait for its end; of a longer one
/// that is a small part.
#[test]
fn a_question_hardly_waits_for_a_step_of_a_greedy_key() {
    for (name, greedy) in [("talks", TALKS), ("classifies", CLASSIFIES)] {
        for prompt in [20, 40, 80, 90, 97, 120, 200, 400] {
            let [alone, beside] =
                [&NOBODY, &greedy].map(|greedy| questions(LARGE_MS, prompt, greedy));
            let ratio = beside.waits_ms[95] / alone.waits_ms[95];
            println!(
                "{name}, {prompt} tokens: p95 {:.0} ms alone, {:.0} ms beside ({ratio:.2}), {:.3} \
                 idle, {} steps still",
                alone.waits_ms[95], beside.waits_ms[95], beside.idle, beside.still
            );
            assert!(ratio < 1.5, "{name}, {prompt} tokens: {ratio:.2}");
            assert!(beside.idle < 0.15, "short steps cost the greedy key {:.3}", beside.idle);
        }
    }
}

#[test]
fn nor_does_it_for_two_greedy_keys_that_have_all_places() {
    let both = Greedy { keys: 2, ..TALKS };
    for prompt in [20, 80] {
        let [alone, beside] = [&NOBODY, &both].map(|greedy| questions(LARGE_MS, prompt, greedy));
        let ratio = beside.waits_ms[95] / alone.waits_ms[95];
        println!("two keys, {prompt} tokens: {:.0} ms beside ({ratio:.2})", beside.waits_ms[95]);
        assert!(ratio < 1.5, "{prompt} tokens: {ratio:.2}");
    }
}

#[test]
fn a_key_of_great_weight_pays_for_its_answers_too() {
    let mut room = Room::new();
    room.ask(Tenant { weight: 1 << 22, ..tenant(1) }, 20, 400);
    (0..100).for_each(|_| room.step());
    let before = room.scheduler.tenants.turn(1).1;
    (0..200).for_each(|_| room.step());
    let paid = room.scheduler.tenants.turn(1).1 - before;
    assert_eq!(paid, 200 / 4, "a token of weight 1 is 2^20");
}
