//! What must hold of a scheduler between any two calls.

use std::collections::BTreeSet;

use super::Scheduler;

impl Scheduler {
    /// Recomputes everything that is kept twice.
    pub fn check(&self) -> Result<(), String> {
        self.pool.check(self.running.iter().map(|s| s.blocks.as_slice()))?;
        self.tenants.check(&self.running)?;
        if !self.running.iter().map(|s| s.id).is_sorted() {
            return Err("sequences do not run in order of arrival".into());
        }
        // One may be here for whom nobody has made way yet.
        if self.running.len() > self.config.running_len + 1 {
            return Err(format!("{} sequences run", self.running.len()));
        }
        for s in &self.running {
            s.check(&self.pool, self.config.block_len)?;
            if s.computed >= s.prompt_len && !s.forks.is_empty() {
                return Err(format!("{} keeps its forks waiting", s.id));
            }
        }
        if let Some(s) = self.tenants.aside().find(|s| !s.forks.is_empty()) {
            return Err(format!("{} stands aside, and others wait for it", s.id));
        }
        let idle = || self.tenants.waiting().chain(self.tenants.aside());
        if let Some(s) = idle().find(|s| s.computed > 0 || !s.blocks.is_empty()) {
            return Err(format!("{} waits and holds something", s.id));
        }
        let mut ids = BTreeSet::new();
        let mut everybody = self.running.iter().chain(idle());
        let twice = everybody.find_map(|s| {
            let mut own = std::iter::once(s.id).chain(s.forks.iter().copied());
            own.find(|id| !ids.insert(*id))
        });
        twice.map_or(Ok(()), |id| Err(format!("{id} is here twice")))
    }
}
