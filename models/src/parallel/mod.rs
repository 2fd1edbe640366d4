//! One model on several devices (Shoeybi et al. 2019, tensor parallelism): each rank has some heads
//! of every layer and a part of every MLP, and is a decoder like any other.
//!
//! Queries, keys, values, gate and up are divided by outputs; what multiplies their results, out
//! and down, by inputs, and after each of these two the ranks add up what they have (`reduce` of
//! the backend, [`Seat::sum`]). Embedding, norms and head are whole on every rank; the bias of a
//! sum is the first rank's. What a rank has of a tensor is [`crate::weights::Part`]'s business.
//!
//! The engine sees one [`Model`]: a step runs on one thread for each rank and ends when all of them
//! have ended. All ranks get the same rows, the first alone is asked for logits. An error or a
//! panic on one of them is an error of the step; the others leave where they would have met it.

mod group;
mod load;

pub use group::{Group, Seat};
pub(crate) use load::load;

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, ScopedJoinHandle};

use hearth_kernels::lora::Factors;

use crate::adapter::{self, Adapter, Delta, Dora};
use crate::batch::{ForwardBatch, LoraSlot, Output, Pass, Wanted};
use crate::config::ModelConfig;
use crate::kv_store::{KvGeometry, KvStore};
use crate::weights::{Part, Role};
use crate::{Error, Model, Result};

/// A model that is divided among ranks.
pub struct Parallel {
    /// Of the whole.
    config: ModelConfig,
    ranks: Vec<Mutex<Box<dyn Model>>>,
    group: Arc<Group>,
}

impl Parallel {
    /// Loads one rank after the other.
    ///
    /// # Errors
    /// What cannot be divided, by name, and what `load` says.
    pub fn load(
        config: &ModelConfig,
        group: Group,
        mut load: impl FnMut(&Part<ModelConfig>, Seat) -> Result<Box<dyn Model>>,
    ) -> Result<Self> {
        let mut part = Part { config: config.divided(group.size())?, rank: 0, size: group.size() };
        let (mut ranks, seats) = (Vec::new(), group.seats());
        let group = Arc::clone(seats[0].group());
        for seat in seats {
            part.rank = seat.rank();
            ranks.push(Mutex::new(load(&part, seat)?));
        }
        Ok(Self { config: config.clone(), ranks, group })
    }

    /// One rank's step. Who fails tells the others.
    fn run(
        &self,
        rank: usize,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Output> {
        let model = self.ranks[rank].lock().unwrap_or_else(PoisonError::into_inner);
        let step = || model.launch(batch, kv, wanted)?.wait();
        let done = catch_unwind(AssertUnwindSafe(step)).unwrap_or_else(|panic| {
            let what = format!("rank {rank} of the model panicked: {}", message(&*panic));
            Err(Error::Device(what))
        });
        if done.is_err() {
            self.group.fail();
        }
        done
    }
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or(panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no message")
}

impl Model for Parallel {
    fn config(&self) -> &ModelConfig {
        &self.config
    }

    fn kv_store(&self, geometry: KvGeometry) -> Result<KvStore> {
        let store = |rank: &Mutex<Box<dyn Model>>| {
            let rank = rank.lock().unwrap_or_else(PoisonError::into_inner);
            let kv_head_count = rank.config().kv_head_count;
            rank.kv_store(KvGeometry { kv_head_count, ..geometry })
        };
        Ok(KvStore::Ranks(self.ranks.iter().map(store).collect::<Result<_>>()?))
    }

    fn launch(
        &self,
        batch: &ForwardBatch,
        kv: &mut KvStore,
        wanted: &mut dyn FnMut() -> Vec<Wanted>,
    ) -> Result<Pass> {
        let [first, others @ ..] = kv.ranks()? else {
            return Err(Error::Batch("a KV store without ranks".into()));
        };
        if others.len() + 1 != self.ranks.len() {
            return Err(Error::Batch("this KV store was made for other ranks".into()));
        }
        self.group.renew()?;
        // The same rows, and no logits.
        let silent = &ForwardBatch { logit_rows: Vec::new(), ..batch.clone() };
        let done: Vec<Result<Output>> = thread::scope(|scope| {
            let begin = |(rank, kv)| {
                let work = move || self.run(rank, silent, kv, &mut Vec::new);
                thread::Builder::new().name(format!("rank-{rank}")).spawn_scoped(scope, work)
            };
            let others: Vec<_> = (1..).zip(others).map(begin).collect();
            if others.iter().any(|rank| rank.is_err()) {
                self.group.fail();
            }
            // What is not waited for is not kept either.
            let read_out = |row: Wanted| if row == Wanted::Kept { Wanted::Logits } else { row };
            let mut wanted = || wanted().into_iter().map(read_out).collect();
            let first = self.run(0, batch, first, &mut wanted);
            let end = |rank: io::Result<ScopedJoinHandle<'_, Result<Output>>>| match rank {
                Ok(rank) => rank.join().expect("a rank's panics are caught; this is a bug"),
                Err(error) => Err(Error::Device(format!("a rank has no thread: {error}"))),
            };
            std::iter::once(first).chain(others.into_iter().map(end)).collect()
        });
        let mut errors = Vec::new();
        let mut outputs = done.into_iter().filter_map(|done| done.map_err(|e| errors.push(e)).ok());
        let first = outputs.next();
        outputs.for_each(drop);
        // What went wrong, rather than who noticed.
        let at = errors.iter().position(|error| !group::is_echo(error)).unwrap_or(0);
        match (errors.is_empty(), first) {
            (true, Some(output)) => Ok(Pass::done(output)),
            _ => Err(errors.swap_remove(at)),
        }
    }

    fn put_adapters(&mut self, slot: LoraSlot, adapters: &[(Arc<Adapter>, f32)]) -> Result<()> {
        adapters.iter().try_for_each(|(adapter, _)| adapter.check(&self.config))?;
        let put = |rank: usize, model: &mut dyn Model| {
            let own = |(adapter, weight): &(Arc<Adapter>, f32)| {
                Ok((Arc::new(part_of(adapter, model.config(), rank)?), *weight))
            };
            let own = adapters.iter().map(own).collect::<Result<Vec<_>>>()?;
            model.put_adapters(slot, &own)
        };
        for rank in 0..self.ranks.len() {
            let model = self.ranks[rank].get_mut().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = put(rank, &mut **model) {
                // What the first refuses nobody has got; a number that was taken stays so.
                if rank > 0 {
                    self.drop_adapters(slot);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn drop_adapters(&mut self, slot: LoraSlot) {
        for model in &mut self.ranks {
            model.get_mut().unwrap_or_else(PoisonError::into_inner).drop_adapters(slot);
        }
    }
}

/// What a rank has of an adapter: rows of B where it has fewer outputs, columns of A where it has
/// fewer inputs; then the ranks add up what they make of theirs.
fn part_of(whole: &Adapter, own: &ModelConfig, rank: usize) -> Result<Adapter> {
    let part = |(role, delta): &(Role, Delta)| {
        let f = &delta.factors;
        let [n, k] = adapter::shape(*role, own).expect("an update of a matrix; this is a bug");
        if [n, k] == [f.n(), f.k()] {
            return (*role, delta.clone());
        }
        let first = |own: usize, all: usize| if own < all { rank * own } else { 0 };
        let (row, column) = (first(n, f.n()), first(k, f.k()));
        let a: Vec<f32> = (f.to_a().chunks_exact(f.k()))
            .flat_map(|row| row[column..column + k].iter().copied())
            .collect();
        let b = &f.to_b()[row * f.rank()..(row + n) * f.rank()];
        let factors = Arc::new(Factors::new(f.float(), [n, k, f.rank()], &a, b));
        let rows = |all: &[f32]| all[row..row + n].to_vec();
        let dora = delta.dora.as_ref().map(|dora| {
            Arc::new(Dora { magnitude: rows(&dora.magnitude), norm: rows(&dora.norm) })
        });
        (*role, Delta { factors, scale: delta.scale, dora })
    };
    Adapter::from_deltas(own, whole.deltas().iter().map(part).collect())
}

#[cfg(test)]
mod tests;
