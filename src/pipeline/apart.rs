//! Work that takes its time or waits for the disk, on threads beside those that answer: so many at
//! once of each kind, so that none of it keeps all of them.

use std::sync::Arc;

use crate::error::Error;
use crate::places::Places;
use crate::types::Tenant;

/// Threads that may wait which requests take up at most.
pub const THREADS: usize = PROMPTS + READS;
/// Prompts that are encoded at once: more than the cores only share the time and hold the memory.
const PROMPTS: usize = 8;
/// Prompts from this length on take seconds and hundreds of MB; they are encoded
/// [`LONG_PROMPTS`] at a time.
pub(super) const LONG_PROMPT_BYTES: usize = 64 << 10;
const LONG_PROMPTS: usize = 2;
/// Adapters that are read at once. A disk that hangs holds so many threads, and no prompt.
const READS: usize = 2;

/// Places for each kind, of which every key has its share: one with many long prompts delays its
/// own.
#[derive(Clone)]
pub(super) struct Apart {
    prompts: Arc<Places>,
    long_prompts: Arc<Places>,
    reads: Arc<Places>,
}

impl Apart {
    pub fn new() -> Self {
        let (prompts, long_prompts) = (Places::new(PROMPTS), Places::new(LONG_PROMPTS));
        Self { prompts, long_prompts, reads: Places::new(READS) }
    }

    /// Work on a prompt of so many bytes: a long one must not stop other streams, and many of them
    /// must not take all the memory.
    pub async fn encode<T: Send + 'static>(
        &self,
        tenant: Tenant,
        len_bytes: usize,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        match len_bytes >= LONG_PROMPT_BYTES {
            // In this order: who waits for the first holds no place of the others.
            true => run(tenant, &[&self.long_prompts, &self.prompts], work).await,
            false => run(tenant, &[&self.prompts], work).await,
        }
    }

    /// Work that reads files.
    pub async fn read<T: Send + 'static>(
        &self,
        tenant: Tenant,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        run(tenant, &[&self.reads], work).await
    }
}

/// Takes a place of each of these.
async fn run<T: Send + 'static>(
    tenant: Tenant,
    places: &[&Arc<Places>],
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let mut taken = Vec::with_capacity(places.len());
    for places in places {
        taken.push(Arc::clone(places).take(tenant).await);
    }
    let working = tokio::task::spawn_blocking(move || {
        let _taken = taken; // kept to the end even when the client goes away before
        work()
    });
    let failed = |why| Error::Internal(format!("preparing the request failed: {why}"));
    working.await.unwrap_or_else(|why| Err(failed(why)))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn a_key_with_many_long_prompts_delays_its_own() {
        let (apart, begun) = (Apart::new(), Arc::new(Mutex::new(Vec::new())));
        let (open, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let mut tasks = tokio::task::JoinSet::new();
        for id in [1, 1, 1, 1, 1, 1, 1, 2] {
            let (apart, begun, gate) = (apart.clone(), Arc::clone(&begun), Arc::clone(&gate));
            tasks.spawn(async move {
                let tenant = Tenant { id, ..Tenant::default() };
                let work = move || {
                    begun.lock().unwrap().push(id);
                    gate.lock().unwrap().recv().unwrap();
                    Ok(())
                };
                apart.encode(tenant, LONG_PROMPT_BYTES, work).await
            });
            // It has its place, or stands in the line.
            tokio::task::yield_now().await;
        }
        // As many as have places, and one more for each that ends: threads begin when they like.
        for count in LONG_PROMPTS..=tasks.len() {
            while begun.lock().unwrap().len() < count {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            open.send(()).unwrap();
        }
        (1..LONG_PROMPTS).for_each(|_| open.send(()).unwrap());
        assert!(tasks.join_all().await.iter().all(Result::is_ok));
        assert_eq!(*begun.lock().unwrap(), [1, 1, 2, 1, 1, 1, 1, 1], "the other key is next");
    }
}
