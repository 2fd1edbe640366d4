//! Sequences that stand aside: nobody reads what they say, so they hold no place, no block and no
//! turn, and others go on. What they had computed stays in the prefix cache while there is room.
//! Only of how many may run at once for their tenant they are still part: it is their own that have
//! to wait for that.

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
            None => self.tenants.remove_waiting(id, |seq| seq.forks.is_empty()),
        };
        let stands = seq.is_some();
        seq.into_iter().for_each(|seq| self.tenants.set_aside(seq));
        self.tenants.settle();
        stands
    }

    /// Lets it come back to its old place, as after a preemption.
    pub fn bring_back(&mut self, id: SeqId) {
        self.tenants.bring_back(id);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::NewSequence;
    use super::super::tests::{scheduler, sequence, show, step};
    use super::super::{Admit, Later};
    use super::*;
    use crate::types::Tenant;

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
        s.add(NewSequence { forks: vec![SeqId(3)], ..sequence(2, 20) });
        assert!(!s.set_aside(SeqId(2)), "that of one that waits is, too");
        s.finish(SeqId(2));
        s.finish(SeqId(3));
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
    #[test]
    fn who_stands_aside_has_one_of_the_places_of_its_tenant_and_none_of_others() {
        let tenant = |id, max_running| Tenant { id, max_running, ..Tenant::default() };
        let mut s = scheduler(100, 16, 4);
        for (id, of) in [(0, 1), (1, 1), (2, 1), (3, 2)] {
            s.add(NewSequence { tenant: tenant(of, Some(2)), ..sequence(id, 3) });
        }
        assert_eq!(step(&mut s), "0:0+3! 3:0+3! 1:0+3!");
        assert!(s.set_aside(SeqId(0)));
        assert_eq!(step(&mut s), "1:3+1! 3:3+1!", "2 waits as before");
        assert!(s.set_aside(SeqId(1)));
        let batch = s.schedule(Duration::ZERO, &[], &());
        let full = Admit::Later(Later::TenantFull);
        assert_eq!((show(&batch).as_str(), batch.admit), ("3:4+1!", full));
        s.update(&batch, &[], 0.0);
        s.finish(SeqId(3));
        assert_eq!(step(&mut s), "", "nor when nobody else is here");
        s.bring_back(SeqId(1));
        assert_eq!(step(&mut s), "1:4+1!", "it is older than 2");
        s.finish(SeqId(0));
        assert_eq!(step(&mut s), "1:5+1! 2:0+3!", "and who has left takes no place");
        assert!(s.set_aside(SeqId(1)) && s.set_aside(SeqId(2)));
        s.add(NewSequence { tenant: tenant(1, Some(2)), ..sequence(4, 3) });
        assert_eq!(step(&mut s), "", "a tenant that is away is known");
        s.finish(SeqId(1));
        assert_eq!(step(&mut s), "4:0+3!");
    }
}
