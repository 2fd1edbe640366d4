//! Fairness in simulated time: a machine whose steps cost what they hold, and tenants that ask.

use super::tests::room::{Asked, Room, tenant};
use super::*;
use crate::types::{CacheScope, Priority, Tenant};

#[test]
fn two_hundred_requests_of_one_tenant_hardly_move_the_first_token_of_another() {
    let alone = Room::new().regular(tenant(2));
    let mut room = Room::new();
    (0..200).for_each(|_| room.ask(tenant(1), 300, 400));
    (0..100).for_each(|_| room.step()); // all places are taken
    let beside = room.regular(tenant(2));
    assert!(room.scheduler.waiting_count() > 50, "the greedy one still has a queue");
    let p95 = |waits: &[f64]| waits[waits.len() * 95 / 100];
    let ratio = p95(&beside) / p95(&alone);
    println!("p95 to the first token: {:.0} ms alone, {:.0} ms beside", p95(&alone), p95(&beside));
    assert!(ratio < 1.5, "{ratio:.2}");
}

#[test]
fn a_classroom_that_asks_at_once_has_its_first_tokens_before_quick_ones() {
    let mut room = Room::new();
    (0..30).for_each(|student| room.ask(tenant(student), 200, 64));
    let mut longest_ms = 0.0f64;
    while !room.scheduler.is_empty() {
        let (before_ms, answers) = (room.now_ms, room.scheduler.answers().len());
        room.step();
        if answers > 0 {
            longest_ms = longest_ms.max(room.now_ms - before_ms);
        }
    }
    let mut waits: Vec<f64> =
        room.asked.iter().map(|a| a.first_ms.unwrap() - a.arrived_ms).collect();
    waits.sort_by(f64::total_cmp);
    println!("first tokens p50 {:.0} ms, steps up to {longest_ms:.0} ms", waits[15]);
    assert!(waits[15] < 10_000.0, "{}", waits[15]);
    assert!(longest_ms < 230.0, "{longest_ms}");
}

#[test]
fn a_long_prompt_makes_the_tokens_of_others_slower_but_no_less_even() {
    let mut room = Room::new();
    (0..4).for_each(|id| room.ask(tenant(id), 20, 2000));
    (0..50).for_each(|_| room.step());
    room.ask(tenant(9), 4000, 5);
    let mut steps_ms = Vec::new();
    while room.asked[4].first_ms.is_none() {
        let before_ms = room.now_ms;
        room.step();
        steps_ms.push(room.now_ms - before_ms);
    }
    assert!(steps_ms.len() > 40, "{} steps", steps_ms.len());
    let (p50, p95) = median_and_p95(steps_ms);
    println!("steps beside a long prompt: p50 {p50:.0} ms, p95 {p95:.0} ms");
    assert!(p95 <= 2.0 * p50, "{p50} {p95}");
}

/// Thirty who ask again when they have their answer, each under a key of its own or all under one.
#[test]
fn a_classroom_that_goes_on_asking_has_even_steps() {
    for keys in [1, 30] {
        let mut room = Room::new();
        let mut under_way: Vec<usize> = Vec::new();
        for student in 0..30 {
            under_way.push(room.asked.len());
            room.ask(tenant(student % keys), 200, 64);
        }
        let mut gaps_ms = Vec::new();
        for step in 0..3000 {
            let (before_ms, answers) = (room.now_ms, room.scheduler.answers().len());
            room.step();
            // The first seconds are those of a classroom that begins.
            if answers > 0 && step >= 300 {
                gaps_ms.extend(std::iter::repeat_n(room.now_ms - before_ms, answers));
            }
            for (student, mine) in (0..30).zip(&mut under_way) {
                if room.scheduler.running(room.asked[*mine].id).is_none()
                    && room.asked[*mine].first_ms.is_some()
                {
                    *mine = room.asked.len();
                    room.ask(tenant(student % keys), 200, 64);
                }
            }
        }
        let (p50, p95) = median_and_p95(gaps_ms);
        println!("between tokens, {keys} keys: p50 {p50:.0} ms, p95 {p95:.0} ms");
        assert!(p95 <= 2.0 * p50, "{p50} {p95}");
    }
}

fn median_and_p95(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[values.len() * 95 / 100])
}

#[test]
fn a_long_prompt_is_not_overtaken_for_ever_by_short_ones() {
    let mut room = Room::new();
    room.ask(tenant(1), 3000, 5);
    // Thirty others, of whom two have something short at any time: each may pass by until it has
    // had as much, and the time of those who are away goes on.
    let mut next = 0;
    while room.asked[0].first_ms.is_none() && room.now_ms < 400_000.0 {
        while room.scheduler.running_count() + room.scheduler.waiting_count() < 3 {
            room.ask(tenant(2 + next % 30), 200, 5);
            next += 1;
        }
        room.step();
    }
    let first_ms = room.asked[0].first_ms.expect("it is never computed");
    println!("3,000 tokens beside {next} short prompts: {first_ms:.0} ms");
    // Three at once, for its own tokens and the credit of those who come back.
    let bound_ms = 3.0 * (3000.0 + 4096.0) * 2.4;
    assert!(first_ms < 1.5 * bound_ms, "{first_ms}");
    assert!(next > 10, "the short ones are first");
}

#[test]
fn what_is_known_of_a_prompt_does_not_make_it_wait() {
    let mut room = Room::new();
    room.ask(tenant(1), 6000, 1);
    while !room.scheduler.is_empty() {
        room.step();
    }
    let known = (0..6000).collect::<Vec<u32>>();
    // Another key computes something long; who has asked before goes on with a long chat.
    room.ask(tenant(2), 5000, 1);
    room.step();
    room.asked.push(Asked {
        id: SeqId(9),
        tenant: 1,
        arrived_ms: room.now_ms,
        first_ms: None,
        end: 6050,
    });
    room.scheduler.add(NewSequence {
        id: SeqId(9),
        prompt: known.iter().copied().chain(90_000..90_040).collect(),
        answer_max: 50,
        score: false,
        scope: CacheScope::default(),
        tenant: tenant(1),
        priority: Priority::Default,
        deadline: None,
        forks: Vec::new(),
    });
    let asked_ms = room.now_ms;
    while room.asked.last().unwrap().first_ms.is_none() {
        room.step();
    }
    let waited_ms = room.now_ms - asked_ms;
    assert!(waited_ms < 1000.0, "{waited_ms} ms for 40 tokens");
}

#[test]
fn a_key_that_may_run_one_answer_makes_no_step_longer_by_its_queue() {
    let mut room = Room::new();
    let modest = Tenant { max_running: Some(1), ..tenant(1) };
    (0..50).for_each(|_| room.ask(modest, 20, 4000));
    (0..30).for_each(|_| room.step());
    assert_eq!((room.scheduler.running_count(), room.scheduler.prompts_waiting()), (1, 0));
    room.ask(tenant(2), 20, 5);
    assert_eq!(room.scheduler.prompts_waiting(), 1);
}

#[test]
fn the_queue_of_one_tenant_makes_no_step_of_another_longer() {
    let mut room = Room::new();
    (0..200).for_each(|_| room.ask(tenant(1), 300, 400));
    (0..100).for_each(|_| room.step());
    room.ask(tenant(2), 20, 200);
    (0..5).for_each(|_| room.step());
    let before_ms = room.now_ms;
    (0..100).for_each(|_| room.step());
    let step_ms = (room.now_ms - before_ms) / 100.0;
    assert!(step_ms < 140.0, "{step_ms}");
}

#[test]
fn work_in_the_background_hardly_moves_the_first_token_of_anybody() {
    let alone = Room::new().regular(tenant(2));
    let mut room = Room::new();
    // Of the same key: it must not wait for its own work either.
    (0..200).for_each(|_| room.ask(tenant(2).in_background(), 300, 400));
    (0..100).for_each(|_| room.step());
    let beside = room.regular(tenant(2));
    assert!(room.scheduler.waiting_count() > 50, "the work is not done");
    let p95 = |waits: &[f64]| waits[waits.len() * 95 / 100];
    let ratio = p95(&beside) / p95(&alone);
    println!("p95 to the first token: {:.0} ms alone, {:.0} ms beside", p95(&alone), p95(&beside));
    assert!(ratio < 1.5, "{ratio:.2}");
}

#[test]
fn while_somebody_is_here_the_background_moves_on_and_steps_are_short() {
    let mut room = Room::new();
    (0..200).for_each(|_| room.ask(tenant(1).in_background(), 300, 400));
    (0..200).for_each(|_| room.step());
    let alone_ms = room.now_ms;
    (0..100).for_each(|_| room.step());
    let alone_ms = (room.now_ms - alone_ms) / 100.0;
    room.ask(tenant(2), 20, 200);
    (0..5).for_each(|_| room.step());
    let tokens = |room: &Room| {
        let theirs = room.scheduler.running.iter().filter(|s| s.tenant.background);
        theirs.map(|s| s.computed).sum::<usize>()
    };
    let (before_ms, before) = (room.now_ms, tokens(&room));
    (0..100).for_each(|_| room.step());
    let beside_ms = (room.now_ms - before_ms) / 100.0;
    println!(
        "a step: {alone_ms:.0} ms of the background alone, {beside_ms:.0} ms beside an answer"
    );
    // One row of the answer, every eighth of 32, and 16 of a prompt.
    assert!(beside_ms <= 14.0 + 2.4 * 21.0, "{beside_ms}");
    assert!(tokens(&room) > before + 500, "{} after {before}", tokens(&room));
}

#[test]
fn the_background_gives_every_place_back_and_takes_none_while_somebody_waits() {
    let mut room = Room::new();
    let background = tenant(1).in_background();
    (0..40).for_each(|_| room.ask(background, 20, 400));
    (0..60).for_each(|_| room.step());
    let running = |room: &Room, tenant: Tenant| {
        room.scheduler.running.iter().filter(|s| s.tenant.id == tenant.id).count()
    };
    assert_eq!(running(&room, background), 32);
    (0..31).for_each(|_| room.ask(tenant(2), 20, 2000));
    (0..60).for_each(|_| room.step());
    assert_eq!((running(&room, tenant(2)), running(&room, background)), (31, 1));
    (0..9).for_each(|_| room.ask(tenant(3), 20, 2000));
    (0..60).for_each(|_| room.step());
    assert_eq!(running(&room, background), 0, "the last one too, whoever has more");
    assert_eq!(running(&room, tenant(2)) + running(&room, tenant(3)), 32);
}

#[test]
fn two_tenants_that_always_ask_share_by_weight() {
    let mut room = Room::new();
    let tenants = [Tenant { weight: 3, ..tenant(1) }, tenant(2)];
    for _ in 0..300 {
        tenants.iter().for_each(|t| room.ask(*t, 200, 20));
    }
    while room.now_ms < 150_000.0 {
        room.step();
    }
    let served = |t: &Tenant| {
        room.asked.iter().filter(|a| a.tenant == t.id && a.first_ms.is_some()).count() as f64
    };
    let [heavy, light] = [served(&tenants[0]), served(&tenants[1])];
    assert!((2.5..3.5).contains(&(heavy / light)), "{heavy} to {light}");
}

#[test]
fn one_prompt_at_a_time_for_those_who_may_not_run_more() {
    let mut room = Room::new();
    let modest = Tenant { max_running: Some(1), ..tenant(1) };
    (0..3).for_each(|_| room.ask(modest, 20, 5));
    room.ask(tenant(2), 20, 5);
    room.step();
    assert_eq!((room.scheduler.running_count(), room.scheduler.waiting_count()), (2, 2));
    let mut most = 0;
    while !room.scheduler.is_empty() {
        room.step();
        most = most.max(room.scheduler.running.iter().filter(|s| s.tenant.id == 1).count());
    }
    assert_eq!(most, 1);
}

#[test]
fn a_running_tenant_makes_way_for_one_with_nothing() {
    let mut room = Room::new();
    (0..40).for_each(|_| room.ask(tenant(1), 20, 400));
    (0..60).for_each(|_| room.step());
    assert_eq!(room.scheduler.running_count(), 32);
    room.ask(tenant(2), 20, 5);
    let batch = room.scheduler.schedule(Duration::ZERO, &[], &());
    assert_eq!((batch.preempted.as_slice(), batch.preempted.len()), (&[SeqId(31)][..], 1));
    assert!(batch.entries.iter().any(|e| e.id == SeqId(40)));
    room.scheduler.update(&batch, &[], 100.0);
    assert_eq!(
        room.scheduler.schedule(Duration::ZERO, &[], &()).preempted,
        [],
        "one place is enough"
    );
}

#[test]
fn thirty_streams_of_thirty_tenants_all_move_in_every_step() {
    let mut room = Room::new();
    (0..30).for_each(|i| room.ask(tenant(i), 20, 4000));
    (0..60).for_each(|_| room.step());
    room.ask(tenant(30), 2000, 5);
    let batch = room.scheduler.schedule(Duration::ZERO, &[], &());
    assert_eq!(batch.answers, 30, "nobody has more than a share");
}

#[test]
fn who_comes_back_is_ahead_by_a_credit_and_no_more() {
    let mut room = Room::new();
    room.ask(tenant(1), 100_000 / 2, 1); // far more than the credit
    (0..50).for_each(|_| room.step());
    let before = room.scheduler.tenants.turn(1).1;
    room.ask(tenant(2), 20, 1);
    let credit = 4096 << 20;
    assert_eq!(room.scheduler.tenants.turn(2).1, before.saturating_sub(credit));
    room.ask(Tenant { weight: 4, ..tenant(3) }, 20, 1);
    let least = room.scheduler.tenants.turn(2).1;
    assert!(room.scheduler.tenants.turn(3).1 >= least, "a credit is in tokens, not in turns");
}

#[test]
fn a_deadline_counts_until_the_first_row() {
    let mut room = Room::new();
    room.ask(tenant(1), 20, 50);
    let late = |id: u64, deadline| NewSequence {
        tenant: Tenant { max_running: Some(1), ..tenant(1) },
        deadline: Some(Duration::from_secs(deadline)),
        forks: vec![SeqId(id + 1)],
        ..super::tests::text(id, vec![1; 20])
    };
    room.step();
    room.scheduler.add(late(10, 5));
    room.scheduler.add(late(20, 60));
    assert_eq!(room.scheduler.schedule(Duration::from_secs(5), &[], &()).expired, []);
    let batch = room.scheduler.schedule(Duration::from_secs(6), &[], &());
    assert_eq!(batch.expired, [SeqId(10), SeqId(11)]);
    room.scheduler.finish(SeqId(0));
    let batch = room.scheduler.schedule(Duration::from_secs(59), &[], &());
    assert_eq!(batch.entries[0].id, SeqId(20));
    room.scheduler.update(&batch, &[], 1.0);
    assert_eq!(
        room.scheduler.schedule(Duration::from_secs(61), &[], &()).expired,
        [],
        "it has begun"
    );
}

#[test]
fn priority_passes_a_prompt_of_its_own_tenant_that_is_being_computed() {
    let mut room = Room::new();
    room.ask(tenant(1), 20, 2000); // an answer, so that steps are short
    (0..5).for_each(|_| room.step());
    room.ask(tenant(1), 5000, 5);
    (0..3).for_each(|_| room.step());
    room.scheduler.add(NewSequence {
        id: SeqId(9),
        prompt: vec![7; 10],
        answer_max: 50,
        score: false,
        scope: CacheScope::default(),
        tenant: tenant(1),
        priority: Priority::Priority,
        deadline: None,
        forks: Vec::new(),
    });
    let batch = room.scheduler.schedule(Duration::ZERO, &[], &());
    let rows = |id: u64| batch.entries.iter().find(|e| e.id == SeqId(id)).map_or(0, |e| e.rows);
    assert_eq!(rows(9), 10, "it comes in and is computed in the very next step");
    assert!(rows(1) > 0, "what it leaves goes to the long one");
}

#[test]
fn priority_orders_what_one_tenant_asks() {
    let mut room = Room::new();
    let mut ask = |id: u64, priority| {
        room.scheduler.add(NewSequence {
            id: SeqId(id),
            prompt: vec![id as u32; 10],
            answer_max: 50,
            score: false,
            scope: CacheScope::default(),
            tenant: Tenant::default(),
            priority,
            deadline: None,
            forks: Vec::new(),
        });
    };
    ask(0, Priority::Flex);
    ask(1, Priority::Default);
    ask(2, Priority::Priority);
    ask(3, Priority::Default);
    let batch = room.scheduler.schedule(Duration::ZERO, &[], &());
    let order: Vec<u64> = batch.entries.iter().map(|e| e.id.0).collect();
    assert_eq!(order, [2, 1, 3, 0]);
}
