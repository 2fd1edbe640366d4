//! A scheduler and a machine that takes time, in numbers.

use std::time::Duration;

use crate::scheduler::{Batch, NewSequence, Scheduler, SchedulerConfig};
use crate::types::{CacheScope, Priority, SeqId, Tenant};

/// A scheduler, and a machine for it.
pub(in crate::scheduler) struct Room {
    pub(in crate::scheduler) scheduler: Scheduler,
    pub(in crate::scheduler) now_ms: f64,
    next_id: u64,
    /// Milliseconds of a step, of a row of an answer, of another row.
    pub(in crate::scheduler) costs_ms: [f64; 3],
    /// Steps between two looks at everything.
    pub(in crate::scheduler) check_every: u64,
    /// Tokens that answers may have, where that is more than they get.
    pub(in crate::scheduler) answer_max: usize,
    pub(in crate::scheduler) asked: Vec<Asked>,
    /// Somebody who asks at this time, maybe while a step is computed, and for what.
    pub(in crate::scheduler) coming: Option<(f64, Tenant, u32, usize)>,
}

/// Layers of the model: between two of them a pass may stop for somebody.
const LAYERS: usize = 16;

pub(in crate::scheduler) struct Asked {
    pub(in crate::scheduler) id: SeqId,
    pub(in crate::scheduler) tenant: u64,
    pub(in crate::scheduler) arrived_ms: f64,
    pub(in crate::scheduler) first_ms: Option<f64>,
    pub(in crate::scheduler) end: usize,
}

impl Room {
    /// A machine that reads its weights in 14 ms and computes a row in 2.4 ms.
    pub(in crate::scheduler) fn new() -> Self {
        let scheduler = Scheduler::new(SchedulerConfig {
            block_count: 4000,
            block_len: 16,
            batch_tokens: 512,
            running_len: 32,
            score_chunk: 64,
            target_ms: 100.0,
            proposed_rows: 8,
            price: None,
            load_blocks_min: 1,
            keep_blocks_min: None,
        });
        let costs_ms = [14.0, 2.4, 2.4];
        let (now_ms, next_id, answer_max, asked) = (0.0, 0, 0, Vec::new());
        let coming = None;
        Self { scheduler, now_ms, next_id, costs_ms, check_every: 1, answer_max, asked, coming }
    }

    pub(in crate::scheduler) fn ask(&mut self, tenant: Tenant, prompt: u32, answer: usize) {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        self.asked.push(Asked {
            id,
            tenant: tenant.id,
            arrived_ms: self.now_ms,
            first_ms: None,
            end: prompt as usize + answer,
        });
        self.scheduler.add(NewSequence {
            id,
            prompt: (0..prompt).map(|i| 1000 * id.0 as u32 + i).collect(),
            answer_max: answer.max(self.answer_max),
            score: false,
            scope: CacheScope::default(),
            tenant,
            priority: Priority::Default,
            deadline: None,
            forks: Vec::new(),
        });
    }

    pub(in crate::scheduler) fn step(&mut self) {
        if self.hear() {
            self.interject(&Batch::default());
        }
        let batch = self.scheduler.schedule(self.now(), &[], &());
        self.scheduler.launch(&batch, &[]);
        let took_ms = self.cost(&batch);
        let mut stops = true;
        for _ in 0..LAYERS {
            self.now_ms += took_ms / LAYERS as f64;
            if self.hear() && std::mem::take(&mut stops) {
                self.interject(&batch);
            }
        }
        self.land(&batch, took_ms);
        if self.scheduler.steps.is_multiple_of(self.check_every) {
            self.scheduler.check().unwrap();
        }
    }

    fn interject(&mut self, flying: &Batch) {
        let apart = self.scheduler.interject(self.now(), flying, &());
        self.scheduler.launch(&apart, &[]);
        if !apart.entries.is_empty() {
            let took_ms = self.cost(&apart);
            self.now_ms += took_ms;
            self.land(&apart, took_ms);
        }
    }

    fn now(&self) -> Duration {
        Duration::from_secs_f64(self.now_ms / 1e3)
    }

    /// Whether somebody has come, with what is asked.
    fn hear(&mut self) -> bool {
        let due = self.coming.take_if(|(due_ms, ..)| *due_ms <= self.now_ms);
        if let Some((due_ms, tenant, prompt, answer)) = due {
            self.ask(tenant, prompt, answer);
            self.asked.last_mut().unwrap().arrived_ms = due_ms;
        }
        due.is_some()
    }

    fn cost(&self, batch: &Batch) -> f64 {
        let [step_ms, answer_ms, row_ms] = self.costs_ms;
        let others = batch.row_count() - batch.answers;
        step_ms + answer_ms * batch.answers as f64 + row_ms * others as f64
    }

    fn land(&mut self, batch: &Batch, took_ms: f64) {
        let sampled: Vec<_> =
            batch.entries.iter().filter(|e| e.samples).map(|e| (e.id, 7)).collect();
        self.scheduler.update(batch, &sampled, took_ms);
        for (id, _) in sampled {
            let now_ms = self.now_ms;
            let asked = self.asked.iter_mut().find(|a| a.id == id).unwrap();
            asked.first_ms.get_or_insert(now_ms);
            if self.scheduler.running(id).unwrap().tokens().len() >= asked.end {
                self.scheduler.finish(id);
            }
        }
    }

    /// A tenant that asks every four seconds, forty times; its waits for the first token.
    pub(in crate::scheduler) fn regular(&mut self, tenant: Tenant) -> Vec<f64> {
        for _ in 0..40 {
            self.ask(tenant, 200, 40);
            let until_ms = self.now_ms + 4000.0;
            while self.now_ms < until_ms {
                match self.scheduler.is_empty() {
                    true => self.now_ms = until_ms,
                    false => self.step(),
                }
            }
        }
        let theirs = self.asked.iter().filter(|a| a.tenant == tenant.id);
        let mut waits: Vec<f64> =
            theirs.map(|a| a.first_ms.unwrap_or(f64::INFINITY) - a.arrived_ms).collect();
        waits.sort_by(f64::total_cmp);
        waits
    }
}

pub(in crate::scheduler) fn tenant(id: u64) -> Tenant {
    Tenant { id, ..Tenant::default() }
}
