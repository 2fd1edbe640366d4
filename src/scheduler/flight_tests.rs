//! Steps that are scheduled while another one flies, by state.

use super::tests::{proposal, scheduler, sequence, show, step, text};
use super::*;
use crate::types::Tenant;

#[test]
fn a_step_is_scheduled_while_another_one_flies() {
    let mut s = scheduler(100, 16, 4);
    let schedule = |s: &mut Scheduler| s.schedule(Duration::ZERO, &[proposal(0, &[5; 4])], &());
    s.add(sequence(0, 5));
    s.add(sequence(1, 5));
    let first = schedule(&mut s);
    assert_eq!(show(&first), "0:0+5! 1:0+5!");
    s.launch(&first, &[SeqId(0)]);
    assert!(s.runs_on(&first));
    s.add(text(2, (0..6).collect())); // the text of 0
    let second = schedule(&mut s);
    let shown = "0:5+1! 2:0+6!";
    assert_eq!(show(&second), shown, "1 has no token, 0 no guess, and nothing is known to 2");
    s.launch(&second, &[]);
    s.check().unwrap();
    s.update(&first, &[(SeqId(0), 9), (SeqId(1), 8)], 0.0);
    s.check().unwrap();
    assert!(!s.runs_on(&second), "nobody goes on");
    assert_eq!(s.running(SeqId(0)).unwrap().tokens(), [0, 1, 2, 3, 4, 9]);
    s.finish(SeqId(0)); // it was over
    s.update(&second, &[(SeqId(2), 7)], 0.0);
    s.check().unwrap();
    assert_eq!(step(&mut s), "1:5+1! 2:6+1!");
}

#[test]
fn nobody_is_sent_back_while_rows_fly() {
    let mut s = scheduler(4, 16, 4);
    s.add(sequence(0, 7));
    s.add(sequence(1, 7));
    step(&mut s);
    let both = [SeqId(0), SeqId(1)];
    let first = s.schedule(Duration::ZERO, &[], &());
    s.launch(&first, &both);
    let second = s.schedule(Duration::ZERO, &[], &()); // both need a third block
    assert_eq!((show(&second).as_str(), second.short, second.preempted.len()), ("", true, 0));
    s.launch(&second, &[]);
    s.update(&first, &both.map(|id| (id, 9)), 0.0);
    assert!(!s.runs_on(&second));
    s.update(&second, &[], 0.0);
    let third = s.schedule(Duration::ZERO, &[], &());
    assert_eq!((show(&third).as_str(), third.preempted), ("0:8+1!", vec![SeqId(1)]));
}

#[test]
fn a_first_token_waits_for_no_answer_of_a_greedy_tenant_in_flight_either() {
    let of = |tenant, id| NewSequence {
        tenant: Tenant { id: tenant, ..Tenant::default() },
        ..sequence(id, 5)
    };
    let mut s = scheduler(100, 64, 8);
    let greedy: Vec<SeqId> = (0..4).map(SeqId).collect();
    greedy.iter().for_each(|id| s.add(of(1, id.0)));
    let tokens: Vec<_> = greedy.iter().map(|&id| (id, 9)).collect();
    // What a step costs before its first row is learned from short ones.
    (0..4).for_each(|_| drop(step(&mut s)));
    let mut flies = s.schedule(Duration::ZERO, &[], &());
    s.launch(&flies, &greedy);
    let mut shown = Vec::new();
    for i in 0..8 {
        let next = s.schedule(Duration::ZERO, &[], &());
        s.launch(&next, &greedy);
        let moved = flies.entries.iter().filter_map(|e| tokens.iter().find(|t| t.0 == e.id));
        let moved: Vec<_> = moved.copied().collect();
        s.update(&flies, &moved, 20.0);
        s.check().unwrap();
        shown.push(show(&next));
        flies = next;
        if i == 4 {
            s.add(of(2, 7));
        }
    }
    assert_eq!(shown[5], "7:0+5!", "{shown:?}");
    assert!(shown[6].starts_with("0:") && shown[6].contains("3:"), "{shown:?}");
}
