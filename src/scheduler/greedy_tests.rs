//! One key that always has two hundred requests here, and one that asks now and then, on a machine
//! that computes a short prompt about as fast as a step of many answers.

use super::fair_tests::{Room, tenant};
use crate::types::Tenant;

/// What the model of the binary costs on two cores.
const COSTS_MS: [f64; 3] = [0.15, 0.09, 0.045];
const GREEDY: u64 = 1;
const OTHER: u64 = 2;

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

fn questions(prompt: u32, greedy: usize) -> Seen {
    let (mut room, mut below) = (Room::new(), dice());
    (room.costs_ms, room.check_every) = (COSTS_MS, 64);
    // Somebody has had an answer here before, alone.
    room.ask(tenant(OTHER), 20, 5);
    while !room.scheduler.is_empty() {
        room.step();
    }
    let (mut due_ms, mut asked, mut steps) = (3000.0, None, 0);
    let mut seen = Seen { waits_ms: Vec::new(), idle: 0.0, still: 0 };
    while seen.waits_ms.len() < 100 {
        while room.scheduler.running_count() + room.scheduler.waiting_count() < greedy {
            room.ask(tenant(GREEDY), 200 + below(200), 300 + below(200) as usize);
        }
        if asked.is_none() && room.now_ms >= due_ms {
            asked = Some(room.asked.len());
            room.ask(tenant(OTHER), prompt, 40);
            room.asked.last_mut().unwrap().arrived_ms = due_ms; // in the middle of a step
        }
        if room.scheduler.is_empty() {
            room.now_ms = due_ms;
            continue;
        }
        room.step();
        steps += 1;
        let answers = room.scheduler.running.iter().filter(|s| s.is_answer());
        let still = answers.map(|s| room.scheduler.steps - s.moved).max();
        seen.still = seen.still.max(still.unwrap_or(0));
        let question = asked.map(|place| &room.asked[place]);
        if let Some(question) = question.filter(|q| room.scheduler.running(q.id).is_none())
            && let Some(first_ms) = question.first_ms
        {
            seen.waits_ms.push(first_ms - question.arrived_ms);
            (asked, due_ms) = (None, room.now_ms + 50.0 + f64::from(below(2000)) / 10.0);
        }
    }
    seen.waits_ms.sort_by(f64::total_cmp);
    seen.idle = f64::from(steps) * COSTS_MS[0] / room.now_ms;
    seen
}

#[test]
fn the_first_token_of_a_short_prompt_hardly_waits_for_a_greedy_key() {
    for prompt in [200, 1200] {
        let (alone, beside) = (questions(prompt, 0), questions(prompt, 200));
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
