//! Sequences that stand aside: nobody reads what they say, so they hold no place, no block and no
//! turn, and others go on. What they had computed stays in the prefix cache while there is room.

use super::Scheduler;
use crate::types::SeqId;

impl Scheduler {
    /// Takes a sequence out, whether it runs or waits. False where that cannot be now: it is not
    /// here, others wait for its prompt, or rows of it fly, whose token it will have to know.
    pub fn set_aside(&mut self, id: SeqId) -> bool {
        let seq = match self.place(id) {
            Some(place) => {
                let seq = &self.running[place];
                let can = seq.forks.is_empty() && seq.flying == 0;
                can.then(|| self.stop(place))
            }
            None => self.tenants.remove(id),
        };
        let stands = seq.is_some();
        self.aside.extend(seq.map(|seq| (id, seq)));
        self.tenants.settle();
        stands
    }

    /// Lets it come back to its old place, as after a preemption.
    pub fn bring_back(&mut self, id: SeqId) {
        if let Some(seq) = self.aside.remove(&id) {
            self.tenants.enter(seq);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::NewSequence;
    use super::super::tests::{scheduler, sequence, step};
    use super::*;

    #[test]
    fn who_stands_aside_holds_nothing_and_comes_back_to_its_text() {
        let mut s = scheduler(100, 16, 1);
        s.add(sequence(0, 7));
        s.add(sequence(1, 3));
        assert_eq!(step(&mut s), "0:0+7!");
        assert_eq!(step(&mut s), "0:7+1!", "one at a time");
        assert!(s.set_aside(SeqId(0)) && !s.set_aside(SeqId(0)));
        s.check().unwrap();
        assert_eq!((s.used_blocks(), s.running_count(), s.waiting_count()), (0, 0, 1));
        assert_eq!(step(&mut s), "1:0+3!", "its place is free");
        s.bring_back(SeqId(0));
        assert_eq!(step(&mut s), "1:3+1!", "and taken now");
        s.finish(SeqId(1));
        assert_eq!(step(&mut s), "0:8+1!", "whole blocks of it are still known");
        assert_eq!(s.running(SeqId(0)).unwrap().tokens()[7..], [9, 9, 9]);
        s.finish(SeqId(0));
        assert_eq!((s.is_empty(), s.used_blocks()), (true, 0));
    }

    #[test]
    fn who_flies_stands_aside_once_its_token_is_known() {
        let mut s = scheduler(100, 16, 1);
        s.add(sequence(0, 7));
        let batch = s.schedule(Duration::ZERO, &[], &());
        s.launch(&batch, &[]);
        assert!(!s.set_aside(SeqId(0)));
        s.update(&batch, &[(SeqId(0), 9)], 0.0);
        assert!(s.set_aside(SeqId(0)));
        s.bring_back(SeqId(0));
        assert_eq!(step(&mut s), "0:4+4!");
        assert_eq!(s.running(SeqId(0)).unwrap().tokens()[7..], [9, 9]);
    }

    #[test]
    fn who_leaves_while_aside_leaves_no_trace_and_who_leads_others_stays() {
        let mut s = scheduler(100, 16, 2);
        s.add(NewSequence { forks: vec![SeqId(1)], ..sequence(0, 20) });
        assert_eq!(step(&mut s), "0:0+16");
        assert!(!s.set_aside(SeqId(0)), "its prompt is wanted");
        assert_eq!(step(&mut s), "0:16+4!");
        assert_eq!(s.running_count(), 2);
        assert!(s.set_aside(SeqId(0)) && s.set_aside(SeqId(1)));
        s.finish(SeqId(0));
        s.bring_back(SeqId(0));
        s.bring_back(SeqId(1));
        s.check().unwrap();
        assert_eq!(s.waiting_count(), 1, "one that waits can stand aside too");
        assert!(s.set_aside(SeqId(1)));
        s.finish(SeqId(1));
        s.bring_back(SeqId(1));
        s.check().unwrap();
        assert_eq!((s.is_empty(), s.used_blocks()), (true, 0));
    }
}
