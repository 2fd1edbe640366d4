//! What newcomers were told, and what then happened, in simulated time.

use super::tests::promise::Random;
use super::tests::room::{Room, tenant};
use super::*;
use crate::types::{Priority, Tenant};

/// People who ask again when they have their answer, and what they were told.
struct Class {
    room: Room,
    random: Random,
    asked: Vec<Told>,
}

struct Told {
    id: SeqId,
    asked_ms: f64,
    told_ms: Option<f64>,
    waited_ms: Option<f64>,
}

/// What somebody asks: tokens of the prompt and of the answer, and what that may have.
type Ask = fn(&mut Random) -> [usize; 3];

impl Class {
    fn new(seed: u64) -> Self {
        let mut room = Room::new();
        room.check_every = 512;
        Self { room, random: Random(seed), asked: Vec::new() }
    }

    fn ask(&mut self, tenant: Tenant, [prompt, answer, max]: [usize; 3]) {
        let now = Duration::from_secs_f64(self.room.now_ms / 1e3);
        let outlook = self.room.scheduler.outlook(now, &Batch::default());
        let newcomer = newcomer(tenant, prompt, max);
        let told = outlook.wait(&newcomer, now);
        self.room.answer_max = max;
        self.room.ask(tenant, prompt as u32, answer);
        let id = self.room.asked.last().unwrap().id;
        let told_ms = told.map(|told| told.as_secs_f64() * 1e3);
        self.asked.push(Told { id, asked_ms: self.room.now_ms, told_ms, waited_ms: None });
    }

    fn step(&mut self) {
        let began_ms = self.room.now_ms;
        self.room.step();
        let scheduler = &self.room.scheduler;
        for told in self.asked.iter_mut().filter(|told| told.waited_ms.is_none()) {
            // Its first rows were in this step.
            if scheduler.running(told.id).is_some_and(|s| s.computed > 0) {
                told.waited_ms = Some(began_ms - told.asked_ms);
            }
        }
    }

    /// So many clients of so many keys, until so many were asked.
    fn go_on(&mut self, clients: u64, keys: u64, count: usize, ask: Ask) {
        let mut under_way = Vec::new();
        for client in 0..clients {
            let what = ask(&mut self.random);
            self.ask(tenant(1 + client % keys), what);
            under_way.push(self.room.asked.len() - 1);
        }
        while self.asked.len() < count {
            self.step();
            for (client, mine) in (0..).zip(&mut under_way) {
                let asked = &self.room.asked[*mine];
                if asked.first_ms.is_some() && self.room.scheduler.running(asked.id).is_none() {
                    *mine = self.room.asked.len();
                    let what = ask(&mut self.random);
                    self.ask(tenant(1 + client % keys), what);
                }
            }
        }
        while self.asked.iter().any(|told| told.waited_ms.is_none()) {
            self.step();
        }
    }

    /// The middle and the ninth of ten of how far off those were who came after the first `count`,
    /// as a part of the wait, or of two seconds where that was less; and the middle wait.
    fn errors(&self, count: usize) -> [f64; 3] {
        let mut errors = Vec::new();
        let mut waits = Vec::new();
        for told in &self.asked[count..] {
            let (told_ms, waited_ms) = (told.told_ms.unwrap(), told.waited_ms.unwrap());
            errors.push((told_ms - waited_ms).abs() / waited_ms.max(2000.0));
            waits.push(waited_ms);
        }
        errors.sort_by(f64::total_cmp);
        waits.sort_by(f64::total_cmp);
        let at = |values: &[f64], tenth: usize| values[values.len() * tenth / 10];
        [at(&errors, 5), at(&errors, 9), at(&waits, 5)]
    }
}

fn newcomer(tenant: Tenant, prompt: usize, answer_max: usize) -> Newcomer {
    Newcomer { tenant, priority: Priority::Default, prompt, answer_max, count: 1 }
}

/// Three of four are short, the fourth brings 4,000 tokens.
fn mixed(random: &mut Random) -> [usize; 3] {
    let prompt = if random.below(4) == 0 { 4000 } else { 20 + random.below(180) };
    let answer = 20 + random.below(280);
    [prompt, answer, answer]
}

/// The same, of whom most end long before they have to.
fn open_ended(random: &mut Random) -> [usize; 3] {
    let [prompt, answer, _] = mixed(random);
    [prompt, answer, 4000]
}

/// Short questions with long answers.
fn chat(random: &mut Random) -> [usize; 3] {
    let answer = 50 + random.below(500);
    [20 + random.below(180), answer, 4000]
}

#[test]
fn a_wait_that_is_told_is_about_the_wait_that_comes() {
    // Who comes later, and how long an answer will be, nobody knows: so the last but one is worse.
    let cases: [(&str, u64, u64, Ask, f64); 6] = [
        ("one key, answers as long as they may be", 80, 1, mixed, 0.12),
        ("twenty keys, the same", 80, 20, mixed, 0.12),
        ("a key for each", 80, 80, mixed, 0.12),
        ("twenty keys, answers that end by themselves", 80, 20, open_ended, 0.12),
        ("twenty keys, short prompts", 80, 20, chat, 0.25),
        ("few wait", 34, 34, open_ended, 0.12),
    ];
    for (what, clients, keys, ask, bound) in cases {
        let mut class = Class::new(7);
        class.go_on(clients, keys, 300, ask);
        let [middle, most, wait_ms] = class.errors(100);
        println!("{what}: off by {middle:.2}, nine in ten by {most:.2} or less; {wait_ms:.0} ms");
        assert!(middle < bound && most < 3.0 * bound + 0.1, "{what}: {middle} {most}");
    }
}

#[test]
fn nothing_is_told_before_an_answer_is_over_but_that_nobody_waits() {
    let mut class = Class::new(7);
    for _ in 0..33 {
        class.ask(tenant(1), [40, 300, 300]);
    }
    let told: Vec<_> = class.asked.iter().map(|told| told.told_ms).collect();
    assert_eq!((told[0], told[1], told[32]), (Some(0.0), None, None));
    while class.asked.iter().any(|told| told.waited_ms.is_none()) {
        class.step();
    }
    class.ask(tenant(1), [40, 300, 300]);
    assert!(class.asked[33].told_ms.is_some(), "one is over");
}

#[test]
fn who_came_in_since_counts_as_if_the_scheduler_knew() {
    let mut class = Class::new(3);
    class.go_on(60, 6, 120, mixed);
    (0..40).for_each(|client| class.ask(tenant(1 + client % 6), [200, 100, 100]));
    class.step();
    let now = Duration::from_secs_f64(class.room.now_ms / 1e3);
    let look = |class: &Class| class.room.scheduler.outlook(now, &Batch::default());
    let mut before = look(&class);
    for client in 0..30 {
        let [prompt, answer, max] = mixed(&mut class.random);
        before.enter(&newcomer(tenant(1 + client % 9), prompt, max));
        class.ask(tenant(1 + client % 9), [prompt, answer, max]);
    }
    let after = look(&class);
    for of in 1..=10 {
        let ms = |look: &Outlook| {
            let wait = look.wait(&newcomer(tenant(of), 100, 100), now);
            wait.unwrap().as_secs_f64() * 1e3
        };
        let (told, want) = (ms(&before), ms(&after));
        assert!((told - want).abs() < 0.1 * want + 500.0, "tenant {of}: {told} for {want}");
    }
}

#[test]
fn a_wait_is_that_of_ones_own_turn() {
    let mut class = Class::new(5);
    (0..150).for_each(|_| class.ask(tenant(1), [300, 200, 200]));
    while class.room.asked.iter().filter(|asked| asked.first_ms.is_some()).count() < 60 {
        class.step();
    }
    let now = Duration::from_secs_f64(class.room.now_ms / 1e3);
    let outlook = class.room.scheduler.outlook(now, &Batch::default());
    let wait = |newcomer: Newcomer| outlook.wait(&newcomer, now).unwrap().as_secs_f64();
    let same = wait(newcomer(tenant(1), 300, 200));
    let urgent = Newcomer { priority: Priority::Priority, ..newcomer(tenant(1), 300, 200) };
    let urgent = wait(urgent);
    let other = wait(newcomer(tenant(2), 300, 200));
    let background = wait(newcomer(tenant(2).in_background(), 300, 200));
    let last = outlook.wait_of_last(now).unwrap().as_secs_f64();
    println!("{same:.1} s, {urgent:.1} urgent, {other:.1} of another, {background:.1} background");
    assert!(other < 1.0, "it has its turn at once: {other}");
    assert!(same > 60.0 && urgent < same / 10.0, "{same} {urgent}");
    assert!(background > 0.9 * same && (last - same).abs() < 0.1 * same, "{background} {last}");
    // Time that has passed since is no part of it.
    let later = outlook.wait(&newcomer(tenant(1), 300, 200), now + Duration::from_secs(9));
    assert!((later.unwrap().as_secs_f64() - (same - 9.0)).abs() < 1e-6);
}

/// Two steps that something else held up do not make a wait of hundreds of steps longer.
#[test]
fn a_wait_follows_the_last_second_and_not_the_last_two_steps() {
    let mut class = Class::new(3);
    class.room.ask(tenant(1), 20, 300);
    (0..250).for_each(|_| class.room.step());
    // One answer is over, so something is known.
    class.room.ask(tenant(1), 20, 2);
    (0..8).for_each(|_| class.room.step());
    let told = |class: &Class| {
        let now = Duration::from_secs_f64(class.room.now_ms / 1e3);
        let mut outlook = class.room.scheduler.outlook(now, &Batch::default());
        outlook.running_len = 1; // so it waits for those who run
        outlook.wait(&newcomer(tenant(2), 20, 40), now).unwrap().as_secs_f64()
    };
    let before_s = told(&class);
    let costs_ms = class.room.costs_ms;
    class.room.costs_ms = costs_ms.map(|ms| 4.0 * ms);
    (0..2).for_each(|_| class.room.step());
    class.room.costs_ms = costs_ms;
    let after_s = told(&class);
    assert!(before_s > 0.0, "nothing is waited for");
    assert!(after_s < 1.3 * before_s, "{before_s} and then {after_s}");
}
